"""Reading scores back as arrays: from the file of `distill-sampler score`, or from the folder of a run.

A run's folder is read from its record, also during the run, or from `scores.parquet` and `plans.parquet` if only these
are left. The metadata says which columns name the prompt and the teacher. Otherwise these columns, the domain and the
correctness are found by their usual names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_sampler.artifacts.arrow_columns import Values, codes_of, float_columns, has_passes, read_record, replayed
from distill_sampler.artifacts.passes import missing_column
from distill_sampler.artifacts.record import RECORD, Record, read_run, read_samples
from distill_sampler.artifacts.run_folder import PLANS, SCORES, schema_of
from distill_sampler.artifacts.schema import columns_of_data, metrics_in_file
from distill_sampler.column_names import DOMAINS, GROUPS, TEACHERS, VERDICTS
from distill_sampler.planning.sampler import fit_length
from distill_sampler.planning.why import ExplainedPlan, PolicyFacts
from distill_sampler.policies.best_of import refuse_single_responses
from distill_sampler.policies.stages import unfolded
from distill_sampler.protocols import Metric, Policy, Pool
from distill_sampler.serialize import decode_facts
from distill_sampler.short_names import full_name
from distill_sampler.showing import html_table
from distill_sampler.types import BoolArray, EncodedColumn, EpochPlan, FloatArray, HashArray, IntArray, unknown_name


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """The scores of one file or run. Columns are read when they are needed; rows are samples, in ascending order."""

    path: Path
    """The file, or the run's folder."""
    names: Sequence[str]
    """The columns of the file."""
    facts: Mapping[str, Any]
    """What the scores belong to: model, data, metrics, settings."""
    metrics: dict[str, Metric]
    """The metrics whose numbers the file has, by name."""
    group: str | None
    teacher: str | None
    domain: str | None
    correct: str | None
    """The names of the user's columns; None if there is no such column."""
    load: Callable[[list[str]], pa.Table] = field(repr=False)
    """Reads columns, with one row for each measurement."""
    load_plans: Callable[[], pa.Table] | None = field(default=None, repr=False)
    """Reads the rows of a run's plans; None if there are none."""
    record: Record | None = field(default=None, repr=False)
    """The run's record, if there is one."""

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        teacher: str | None = None,
        group: str | None = None,
        domain: str | None = None,
        correct: str | None = None,
    ) -> Scores:
        """Open a scores file or a run's folder. Columns that are not given are found by their usual names.

        Raises:
            ValueError: there is no scores file, it is not a Parquet file, or it holds no scores.
        """
        record: Record | None = None
        plans: Callable[[], pa.Table] | None = None
        if path.is_dir() and has_passes(path / RECORD):
            folder = path / RECORD
            record = Record(folder, write=False)
            names, facts, load, plans = read_record(record, read_run(folder), read_samples(folder))
        else:
            file = path / SCORES if path.is_dir() else path
            schema = schema_of(file)
            names, facts = schema.names, decode_facts(schema.metadata)
            load = lambda columns: pq.read_table(file, columns=columns)  # noqa: E731
            planned = path / PLANS
            if path.is_dir() and planned.exists():
                plans = lambda: pq.read_table(planned, columns=["epoch", "sample"])  # noqa: E731
            path = file
        given = {"teacher": teacher, "group": group, "domain": domain, "correct": correct}
        return cls._made(path, names, facts, load, plans, record, given)

    @classmethod
    def of_record(cls, record: Record, run: Mapping[str, Any], samples: pa.Table) -> Scores:
        """The scores of a run from its record, which may be in memory, before or while it trains.

        Args:
            record: the passes and plans.
            run: what they belong to (`schema.run_facts`).
            samples: what each sample is, one row each.

        Raises:
            ValueError: nothing has been scored yet.
        """
        if not len(record.passes):
            raise ValueError("Nothing has been scored in this run yet. Train an epoch first, or call curriculum.score.")
        return cls._made(record.folder or Path("run"), *read_record(record, run, samples), record, {})

    @classmethod
    def _made(
        cls,
        path: Path,
        names: Sequence[str],
        facts: Mapping[str, Any],
        load: Callable[[list[str]], pa.Table],
        plans: Callable[[], pa.Table] | None,
        record: Record | None,
        given: Mapping[str, str | None],
    ) -> Scores:
        """Find the metrics and the user's columns. `given` has the names that the user gave, by kind."""
        metrics = metrics_in_file(facts, names)
        if not metrics or "sample" not in names:
            raise ValueError(
                f"{path} holds no scores (its columns: {', '.join(names[:12])}). Give the file that `distill-sampler "
                "score` wrote, or the folder of a run."
            )
        columns = facts.get("columns")
        recorded: Mapping[str, Any] = columns if isinstance(columns, dict) else {}

        def find(kind: str, recorded: str | None, usual: Sequence[str]) -> str | None:
            wanted = given.get(kind)
            if wanted is not None and wanted not in names:
                raise ValueError(f"{path}: {unknown_name('column', wanted, names, 'in the scores')}")
            return next((name for name in (wanted, recorded, *usual) if name in names), None)

        return cls(
            path=path,
            names=names,
            facts=facts,
            metrics=metrics,
            group=find("group", recorded.get("group"), GROUPS),
            teacher=find("teacher", recorded.get("teacher"), TEACHERS),
            domain=find("domain", None, DOMAINS),
            correct=find("correct", None, VERDICTS),
            load=load,
            load_plans=plans,
            record=record,
        )

    def __repr__(self) -> str:
        return f"Scores({str(self.path)!r}, metrics {', '.join(self.metrics)})"

    def _repr_html_(self) -> str:
        """Each metric's scores, for a notebook."""
        rows = []
        numbers = self.numbers()
        for name, metric in self.metrics.items():
            finite = numbers[name][np.isfinite(numbers[name])].astype(np.float64)
            figures = [float(f(finite)) if len(finite) else None for f in (np.mean, np.min, np.median, np.max)]
            rows.append((name, "higher" if metric.higher_is_better else "lower", len(finite), *figures))
        headings = ("metric", "better", "scored", "mean", "lowest", "median", "highest")
        return html_table(repr(self), headings, rows, note=f"{len(self._pass_epoch_sample[0]):,} measurements")

    def metric(self, name: str | None = None) -> Metric:
        """A metric by name. By default RSR if any sample has one, otherwise the first metric that any sample has.

        Raises:
            ValueError: the file does not have the metric.
        """
        if name is None:
            name = self._default_metric
        name = full_name(name, self.metrics)
        if name not in self.metrics:
            raise ValueError(f"{self.path}: {unknown_name('metric', name, self.metrics, 'in the scores')}")
        return self.metrics[name]

    @cached_property
    def _default_metric(self) -> str:
        names = sorted(self.metrics, key=lambda name: name != "rank_surprisal_ratio")
        scored = (name for name in names if np.isfinite(self.load([name])[name].to_numpy().astype(float)).any())
        return next(scored, names[0])

    # ---- Passes ----

    @cached_property
    def _pass_epoch_sample(self) -> tuple[IntArray, IntArray, IntArray]:
        """`[measurements]` the pass of each row (from 0), its epoch, and its sample."""
        names = [name for name in ("pass", "epoch", "sample") if name in self.names]
        table = self.load(names)
        sample = np.asarray(table["sample"].to_numpy(), np.int64)
        zeros = np.zeros(len(sample), np.int64)
        epoch = np.asarray(table["epoch"].to_numpy(), np.int64) if "epoch" in names else zeros
        if "pass" in names:
            return np.asarray(table["pass"].to_numpy(), np.int64), epoch, sample
        return epoch, epoch, sample

    @cached_property
    def epochs(self) -> list[int]:
        """The epochs that were scored for; `[0]` for a file of one pass."""
        return sorted(set(self._pass_epoch_sample[1].tolist())) or [0]

    def _last_pass(self, epoch: int | None) -> int:
        """The last pass for an epoch or before it (None: the last pass of all)."""
        passes, epochs, _ = self._pass_epoch_sample
        if epoch is None:
            return self._with_lost(int(passes.max(initial=0)))
        # an epoch that was planned need not have been scored for
        if epoch not in self.epochs and epoch not in self._planned_epochs:
            known = sorted({*self.epochs, *self._planned_epochs})
            raise ValueError(f"{self.path} has no epoch {epoch}; it has {', '.join(map(str, known))}.")
        return self._with_lost(int(passes[epochs <= epoch].max(initial=0)))

    @property
    def _drift(self) -> Sequence[Mapping[str, float] | None]:
        """By pass, how far the numbers moved that it did not measure; None: the pass was deleted from the record."""
        return self.facts.get("drift") or []

    def _with_lost(self, last: int) -> int:
        """Add to the last pass those that were deleted after it: they may have been of the same epoch."""
        while last + 1 < len(self._drift) and self._drift[last + 1] is None:
            last += 1
        return last

    @cached_property
    def _planned_epochs(self) -> list[int]:
        """The epochs of a run's plans, in order; empty for a file without."""
        if self.load_plans is None:
            return []
        return np.flatnonzero(np.bincount(self.load_plans()["epoch"].to_numpy())).tolist()

    def _latest_rows(self, last_pass: int) -> IntArray:
        """`[samples]` the row of each sample's last measurement up to a pass. Samples ascend."""
        if last_pass not in self._cached_rows:
            passes, _, samples = self._pass_epoch_sample
            rows = np.flatnonzero(passes <= last_pass)
            latest = np.full(int(samples.max(initial=-1)) + 1, -1, np.int64)
            latest[samples[rows]] = rows  # a later row replaces an earlier one
            self._cached_rows[last_pass] = latest[latest >= 0]
        return self._cached_rows[last_pass]

    @cached_property
    def _cached_rows(self) -> dict[int, IntArray]:
        return {}

    def read(self, names: Sequence[str], *, epoch: int | None = None) -> pa.Table:
        """Columns as last measured for an epoch (None: the last one), one row for each sample.

        For the numbers of metrics use `numbers`, which also computes the estimates.
        """
        rows = self._latest_rows(self._last_pass(epoch))
        table = self.load(list(names))
        return table if len(rows) == table.num_rows and (np.diff(rows) == 1).all() else table.take(pa.array(rows))

    def numbers(self, *, epoch: int | None = None) -> dict[str, FloatArray]:
        """Every number of every metric as used to plan an epoch, `[samples]` each; NaN where there is none.

        Numbers that a pass did not measure move with its drift, as in training. What depends on a pass that was deleted
        from the run's record is NaN.
        """
        columns = list(dict.fromkeys(column for metric in self.metrics.values() for column in metric.columns))
        last_pass = self._last_pass(epoch)
        if last_pass == 0:
            return float_columns(self.read(columns, epoch=epoch), columns)
        passes, _, samples = self._pass_epoch_sample
        return replayed(float_columns(self.load(columns), columns), passes, samples, self._drift, last_pass)

    def missing(self, *, epoch: int | None = None) -> dict[str, IntArray]:
        """By metric, `[samples]` why a sample has no score (`Missing`), if the file says so."""
        names = {name: missing_column(name) for name in self.metrics if missing_column(name) in self.names}
        table = self.read(list(names.values()), epoch=epoch) if names else None
        return {} if table is None else {n: table[c].to_numpy().astype(np.int64) for n, c in names.items()}

    # ---- Columns ----

    def integers(self, name: str, *, epoch: int | None = None) -> IntArray | None:
        """A column of whole numbers; None if there is no such column."""
        return np.asarray(self.read([name], epoch=epoch)[name].to_numpy(), np.int64) if name in self.names else None

    def cut(self, *, epoch: int | None = None) -> BoolArray | None:
        """`[samples]` True where truncation cut off the response; None: the file does not say."""
        tokens = self.integers("tokens_cut", epoch=epoch)
        return None if tokens is None else tokens != 0

    def hashes(self, *, epoch: int | None = None) -> HashArray:
        """`[samples]` the content hash, which breaks ties; the sample's number if the file has no hashes."""
        name = "content_hash" if "content_hash" in self.names else "sample"
        return np.asarray(self.read([name], epoch=epoch)[name].to_numpy()).astype(np.uint64)

    def column(self, name: str | None, *, epoch: int | None = None) -> EncodedColumn | None:
        """A categorical column, dictionary-encoded; None if there is no such column, or it is empty."""
        if name is None or name not in self.names:
            return None
        encoded = self._encoded(name, epoch)
        if not any(value is not None for value in encoded.dictionary[:2].to_pylist()):
            return None
        return EncodedColumn(codes=codes_of(encoded), values=Values(encoded.dictionary))

    def codes(self, name: str | None, *, epoch: int | None = None) -> IntArray | None:
        """The codes of a categorical column without its values, which saves reading millions of prompt names."""
        return None if name is None or name not in self.names else codes_of(self._encoded(name, epoch))

    def mixed_prompts(self, *, epoch: int | None = None) -> list[str]:
        """Names of groups whose responses answer different prompts, because an id was used twice."""
        groups = self.column(self.group, epoch=epoch)
        if groups is None or "prompt_hash" not in self.names:
            return []
        prompts = np.asarray(self.read(["prompt_hash"], epoch=epoch)["prompt_hash"].to_numpy())
        first = np.zeros(len(groups.values), np.uint64)
        first[groups.codes[::-1]] = prompts[::-1]  # the last write wins, which is that of the group's first row
        mixed = np.flatnonzero(np.bincount(groups.codes[first[groups.codes] != prompts])).tolist()
        return [str(groups.values[code]) for code in mixed]

    def _encoded(self, name: str, epoch: int | None) -> pa.DictionaryArray:
        values = self.read([name], epoch=epoch)[name].combine_chunks()
        if isinstance(values, pa.ChunkedArray):
            values = pa.concat_arrays(values.chunks)
        return values.dictionary_encode(null_encoding="encode")

    # ---- Choices ----

    @property
    def policies(self) -> list[PolicyFacts]:
        """The policies of the run that the scores come from; empty if they do not come from a run."""
        recorded = self.facts.get("policies")
        return [PolicyFacts.from_json(one) for one in recorded] if isinstance(recorded, list) else []

    def choose(self, policies: Sequence[Policy], *, seed: int = 0, epoch: int | None = None) -> ExplainedPlan:
        """Apply policies to the scores of an epoch (None: the last one). The plan's indices are row numbers.

        A run's own policies with its seed give the plan that the run has made: the recorded one, or without a record
        one of the same length.

        Raises:
            ValueError: a policy names an unknown metric or column, or leaves no sample.
        """
        policies = unfolded(policies)
        if epoch is None:
            epoch = max([self.epochs[-1], *self._planned_epochs])
        of_the_run = self.facts.get("seed") == seed and self.policies == [PolicyFacts.of(policy) for policy in policies]
        if of_the_run and (recorded := self.last_plan(epoch)) is not None:
            return recorded
        wanted = {name for policy in policies for name in policy.uses_columns}
        columns = self._columns_of_data(wanted, epoch)
        if wanted - columns.keys():  # refused below, with the names of those that there are; none is read for that
            unread = EncodedColumn(codes=np.zeros(0, np.int64), values=())
            columns = dict.fromkeys(columns_of_data(self.names, self.metrics), unread) | columns
        refuse_single_responses(policies, columns)
        tokens = self.integers("num_tokens", epoch=epoch)
        lengths = self.integers("length", epoch=epoch)
        hashes = self.hashes(epoch=epoch)
        if lengths is None:
            lengths = np.zeros(len(hashes), np.int64) if tokens is None else tokens
        pool = Pool(
            epoch=epoch,
            metrics=self.metrics,
            scores=self.numbers(epoch=epoch),
            columns=columns,
            lengths=lengths,
            content_hash=hashes,
            cut=self.cut(epoch=epoch),
        )
        candidates = np.arange(len(hashes)) if tokens is None else np.flatnonzero(tokens > 0)
        choice = ExplainedPlan.from_policies(policies, candidates, pool, seed)
        choice = replace(choice, missing=self.missing(epoch=epoch))
        if of_the_run and (length := len(self.plans().get(epoch, ()))):
            choice = replace(choice, plan=fit_length(choice.plan, length))
        return choice

    def last_plan(self, epoch: int | None = None) -> ExplainedPlan | None:
        """The last plan of a run for an epoch (None: of all), with the recorded reasons; None without a record.

        Its indices are row numbers.

        Raises:
            ValueError: it may have been deleted from the record.
        """
        if self.record is None:
            return None
        if epoch is None:
            epoch = max(self.record.last_plans(), default=0)
        if (made := self.record.last_plan(epoch)) is None:
            return None
        samples, lengths = (self.integers(name, epoch=epoch) for name in ("sample", "length"))
        assert samples is not None
        row = np.full(len(made.left_out_by), -1, np.int64)
        row[samples] = np.arange(len(samples))
        columns = self._columns_of_data((name for policy in self.policies for name in policy.columns), epoch)
        assert lengths is not None
        return ExplainedPlan(
            policies=self.policies,
            plan=EpochPlan(indices=row[made.plan.indices], weights=made.plan.weights),
            left_out_by=made.left_out_by[samples],
            epoch=epoch,
            step=made.step,
            start=made.start,
            scores=self.numbers(epoch=epoch),
            higher_is_better={name: metric.higher_is_better for name, metric in self.metrics.items()},
            columns=columns,
            lengths=lengths,
            content_hash=self.hashes(epoch=epoch),
            cut=self.cut(epoch=epoch),
            missing=self.missing(epoch=epoch),
        )

    def _columns_of_data(self, names: Iterable[str], epoch: int | None) -> dict[str, EncodedColumn]:
        """Columns by their names in the data. If the library uses a name itself, the file has `NAME_in_data`."""
        kept = {name: f"{name}_in_data" if f"{name}_in_data" in self.names else name for name in names}
        found = {name: self.column(ours, epoch=epoch) for name, ours in kept.items()}
        return {name: column for name, column in found.items() if column is not None}

    def plans(self) -> dict[int, IntArray]:
        """By epoch, the samples of its plan, as row numbers of the data set; empty if there are no plans."""
        if self.load_plans is None:
            return {}
        table = self.load_plans()
        epochs, samples = (np.asarray(table[name].to_numpy(), np.int64) for name in ("epoch", "sample"))
        return {epoch: samples[epochs == epoch] for epoch in sorted(set(epochs.tolist()))}

    def about(self) -> dict[str, Any]:
        """The origin of the scores, for people to read."""
        kept = ("model", "revision", "lora", "dtype", "dataset", "lacks")
        about = {name: self.facts.get(name) or None for name in kept}
        model = about["model"]
        if model and model.startswith((".", "/", "~")):  # reports are shared, so show only the name of a local folder
            about["model"] = Path(model).name or model
        return about
