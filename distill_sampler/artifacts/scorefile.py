"""Scores that were kept, read back as arrays: the file of `distill-sampler score`, or the folder of a run.

A run's folder is read from its record while the run goes on and after an interruption, and from `scores.parquet` and
`plans.parquet` where only these are left. Which column is the teacher, the prompt, the domain and the verdict stands in
the metadata, or is recognised by its usual name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_sampler import metrics as metrics_package
from distill_sampler.artifacts.passes import missing_column
from distill_sampler.artifacts.record import RECORD, Record, read_run, read_samples
from distill_sampler.artifacts.run_folder import PLANS, SCORES, measurements, plan_rows
from distill_sampler.artifacts.schema import decoded, metrics_from
from distill_sampler.column_names import DOMAINS, GROUPS, TEACHERS, VERDICTS
from distill_sampler.planning.sampler import fit_length
from distill_sampler.planning.why import Choice, PolicyFacts
from distill_sampler.store import drifted
from distill_sampler.types import (
    Column,
    EpochPlan,
    FloatArray,
    HashArray,
    IntArray,
    Metric,
    Policy,
    Pool,
    unknown_name,
)


class Values(Sequence[Any]):
    """An Arrow array as a sequence: ten million prompts' names are no Python objects until they are looked at."""

    def __init__(self, array: pa.Array) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Values: ...
    def __getitem__(self, index: int | slice) -> Any:
        return Values(self._array[index]) if isinstance(index, slice) else self._array[int(index)].as_py()

    def __contains__(self, value: object) -> bool:
        return self._array.null_count > 0 if value is None else super().__contains__(value)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """The scores of one file or run. Columns are read when they are asked for; rows are samples, in ascending order."""

    path: Path
    """The file, or the run's folder."""
    names: Sequence[str]
    """Columns that there are."""
    facts: Mapping[str, Any]
    """What the scores belong to: model, data, metrics, settings."""
    metrics: dict[str, Metric]
    """The metrics whose numbers there are, by name."""
    group: str | None
    teacher: str | None
    domain: str | None
    correct: str | None
    load: Callable[[list[str]], pa.Table] = field(repr=False)
    """Columns with a row for each measurement."""
    load_plans: Callable[[], pa.Table] | None = field(default=None, repr=False)
    """The rows of a run's plans; None where nothing was planned."""
    record: Record | None = field(default=None, repr=False)
    """The run's record, if it is there."""

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
        """Look into a scores file, or a run's folder. Columns that are not named are found by their usual names.

        Raises:
            ValueError: there is none, it is no Parquet file, or it holds no scores.
        """
        record: Record | None = None
        plans: Callable[[], pa.Table] | None = None
        if path.is_dir() and _has_passes(path / RECORD):
            folder = path / RECORD
            record = Record(folder, write=False)
            facts, samples = read_run(folder), read_samples(folder)
            names = measurements(record, samples, None).column_names

            def load(columns: list[str], record: Record = record, samples: pa.Table = samples) -> pa.Table:
                return measurements(record, samples, columns)

            if len(record.plans):
                plans = lambda: plan_rows(record, samples, ["epoch", "sample"])  # noqa: E731
            facts = {**facts, "drift": [dict(taken.drift) for taken in record.passes]}
        else:
            file = path / SCORES if path.is_dir() else path
            schema = _schema_of(file)
            names, facts = schema.names, decoded(schema.metadata)

            def load(columns: list[str], file: Path = file) -> pa.Table:  # type: ignore[misc]
                return pq.read_table(file, columns=columns)

            planned = path / PLANS
            if path.is_dir() and planned.exists():
                plans = lambda: pq.read_table(planned, columns=["epoch", "sample"])  # noqa: E731
            path = file
        metrics = _metrics_of(facts, names)
        if not metrics or "sample" not in names:
            raise ValueError(
                f"{path} holds no scores (its columns: {', '.join(names[:12])}). Give the file that `distill-sampler "
                "score` wrote, or the folder of a run."
            )
        told = facts.get("columns")
        columns: Mapping[str, Any] = told if isinstance(told, dict) else {}

        def find(said: str | None, known: str | None, usual: Sequence[str]) -> str | None:
            if said is not None and said not in names:
                raise ValueError(f"{path}: {unknown_name('column', said, names, 'in the scores')}")
            return next((name for name in (said, known, *usual) if name in names), None)

        return cls(
            path=path,
            names=names,
            facts=facts,
            metrics=metrics,
            group=find(group, columns.get("group"), GROUPS),
            teacher=find(teacher, columns.get("teacher"), TEACHERS),
            domain=find(domain, None, DOMAINS),
            correct=find(correct, None, VERDICTS),
            load=load,
            load_plans=plans,
            record=record,
        )

    def metric(self, name: str | None = None) -> Metric:
        """A metric by name; without one the Rank-Surprisal Ratio if any sample has it, else the first that one has.

        Raises:
            ValueError: it is not in the file.
        """
        if name is None:
            name = self._usual_metric
        if name not in self.metrics:
            raise ValueError(f"{self.path}: {unknown_name('metric', name, self.metrics, 'in the scores')}")
        return self.metrics[name]

    @cached_property
    def _usual_metric(self) -> str:
        names = sorted(self.metrics, key=lambda name: name != "rank_surprisal_ratio")
        known = (name for name in names if np.isfinite(self.load([name])[name].to_numpy().astype(float)).any())
        return next(known, names[0])

    # ---- Passes ----

    @cached_property
    def _where(self) -> tuple[IntArray, IntArray, IntArray]:
        """`[measurements]` the pass of each row, from 0, its epoch, and its sample."""
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
        return sorted(set(self._where[1].tolist())) or [0]

    def _until(self, epoch: int | None) -> int:
        """The last pass that is known for an epoch (None: the last one)."""
        passes, epochs, _ = self._where
        if epoch is None:
            return int(passes.max(initial=0))
        # an epoch that was planned need not have been scored for
        if epoch not in self.epochs and epoch not in self._planned_epochs:
            known = sorted({*self.epochs, *self._planned_epochs})
            raise ValueError(f"{self.path} has no epoch {epoch}; it has {', '.join(map(str, known))}.")
        return int(passes[epochs <= epoch].max(initial=0))

    @cached_property
    def _planned_epochs(self) -> list[int]:
        """The epochs of a run's plans, in order; empty for a file without."""
        return [] if self.load_plans is None else np.unique(self.load_plans()["epoch"].to_numpy()).tolist()

    def _last(self, until: int) -> IntArray:
        """`[samples]` where each sample's last measurement lies among the rows, up to a pass. Samples ascend."""
        if until not in self._last_rows:
            passes, _, samples = self._where
            rows = np.flatnonzero(passes <= until)
            latest = np.full(int(samples.max(initial=-1)) + 1, -1, np.int64)
            latest[samples[rows]] = rows  # a later row replaces an earlier one
            self._last_rows[until] = latest[latest >= 0]
        return self._last_rows[until]

    @cached_property
    def _last_rows(self) -> dict[int, IntArray]:
        return {}

    def read(self, names: Sequence[str], *, epoch: int | None = None) -> pa.Table:
        """Columns as they were last measured for an epoch (None: the last), a row for each sample.

        The numbers of metrics come through `numbers`, which also carries on what was not measured again.
        """
        rows = self._last(self._until(epoch))
        table = self.load(list(names))
        return table if len(rows) == table.num_rows and (np.diff(rows) == 1).all() else table.take(pa.array(rows))

    def numbers(self, *, epoch: int | None = None) -> dict[str, FloatArray]:
        """Every number of every metric as a plan of this epoch would go by, `[samples]` each; NaN where there is none.

        What a pass did not measure moves with the drift of what it did, as in training.
        """
        columns = list(dict.fromkeys(column for metric in self.metrics.values() for column in metric.columns))
        until = self._until(epoch)
        if until == 0:
            return _float_columns(self.read(columns, epoch=epoch), columns)
        passes, _, samples = self._where
        drift: Sequence[Mapping[str, float]] = self.facts.get("drift") or []
        measured = _float_columns(self.load(columns), columns)
        size = int(samples.max(initial=-1)) + 1
        known = {name: np.full(size, np.nan, np.float32) for name in columns}
        there = np.zeros(size, bool)
        for number in range(until + 1):
            rows = np.flatnonzero(passes == number)
            which = np.zeros(size, bool)
            which[samples[rows]] = True
            there |= which
            for name, moved in (drift[number] if number < len(drift) else {}).items():
                known[name] = np.where(which, known[name], drifted(known[name], moved))
            for name in columns:
                known[name][samples[rows]] = measured[name][rows]
        return {name: values[there] for name, values in known.items()}

    def missing(self, *, epoch: int | None = None) -> dict[str, IntArray]:
        """By metric, `[samples]` why there is no score (`Missing`), where the file says so."""
        names = {name: missing_column(name) for name in self.metrics if missing_column(name) in self.names}
        table = self.read(list(names.values()), epoch=epoch) if names else None
        return {} if table is None else {n: table[c].to_numpy().astype(np.int64) for n, c in names.items()}

    # ---- Columns ----

    def integers(self, name: str, *, epoch: int | None = None) -> IntArray | None:
        """A column of whole numbers; None if it is not there."""
        return np.asarray(self.read([name], epoch=epoch)[name].to_numpy(), np.int64) if name in self.names else None

    def hashes(self, *, epoch: int | None = None) -> HashArray:
        """`[samples]` what breaks ties: the content's hash, or the sample's number in a file without."""
        name = "content_hash" if "content_hash" in self.names else "sample"
        return np.asarray(self.read([name], epoch=epoch)[name].to_numpy()).astype(np.uint64)

    def column(self, name: str | None, *, epoch: int | None = None) -> Column | None:
        """A categorical column, dictionary-encoded; None if there is no such column or nothing in it."""
        if name is None or name not in self.names:
            return None
        encoded = self._encoded(name, epoch)
        if not any(value is not None for value in encoded.dictionary[:2].to_pylist()):
            return None
        return Column(codes=_codes(encoded), values=Values(encoded.dictionary))

    def codes(self, name: str | None, *, epoch: int | None = None) -> IntArray | None:
        """A categorical column's codes alone: millions of prompts need no names to be told apart."""
        return None if name is None or name not in self.names else _codes(self._encoded(name, epoch))

    def mixed_prompts(self, *, epoch: int | None = None) -> list[str]:
        """Names of groups whose responses answer different prompts: an id that was given twice."""
        groups = self.column(self.group, epoch=epoch)
        if groups is None or "prompt_hash" not in self.names:
            return []
        prompts = np.asarray(self.read(["prompt_hash"], epoch=epoch)["prompt_hash"].to_numpy())
        first = np.zeros(len(groups.values), np.uint64)
        first[groups.codes[::-1]] = prompts[::-1]  # what is written last stays: the first row's
        mixed = np.unique(groups.codes[first[groups.codes] != prompts])
        return [str(groups.values[code]) for code in mixed]

    def _encoded(self, name: str, epoch: int | None) -> pa.DictionaryArray:
        values = self.read([name], epoch=epoch)[name].combine_chunks()
        if isinstance(values, pa.ChunkedArray):
            values = pa.concat_arrays(values.chunks)
        return values.dictionary_encode(null_encoding="encode")

    # ---- Choices ----

    @property
    def policies(self) -> list[PolicyFacts]:
        """What chose in the run that the scores come from; empty for a file without."""
        told = self.facts.get("policies")
        return [PolicyFacts.from_json(one) for one in told] if isinstance(told, list) else []

    def choose(self, policies: Sequence[Policy], *, seed: int = 0, epoch: int | None = None) -> Choice:
        """Apply policies to the scores of an epoch (None: the last). Indices count the rows.

        A run's own policies with its seed give the plan that the run has made: the recorded one, or without a record
        one of the same length.

        Raises:
            ValueError: a policy names a metric or column that is not there, or leaves nothing.
        """
        if epoch is None:
            epoch = max([self.epochs[-1], *self._planned_epochs])
        of_the_run = self.facts.get("seed") == seed and self.policies == [PolicyFacts.of(policy) for policy in policies]
        if of_the_run and (recorded := self.planned(epoch)) is not None:
            return recorded
        columns = self._columns_of_data((name for policy in policies for name in policy.uses_columns), epoch)
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
        )
        candidates = np.arange(len(hashes)) if tokens is None else np.flatnonzero(tokens > 0)
        choice = replace(Choice.by(policies, candidates, pool, seed), missing=self.missing(epoch=epoch))
        if of_the_run and (length := len(self.plans().get(epoch, ()))):
            choice = replace(choice, plan=fit_length(choice.plan, length))
        return choice

    def planned(self, epoch: int | None = None) -> Choice | None:
        """The last plan of a run for an epoch (None: of all), with the reasons that were recorded when it was made.

        None without a record. Indices count the rows.
        """
        if self.record is None:
            return None
        plans = (plan for plan in reversed(self.record.plans) if epoch is None or plan.epoch == epoch)
        made = next(plans, None)
        if made is None:
            return None
        epoch = made.epoch
        samples = self.integers("sample", epoch=epoch)
        assert samples is not None
        row = np.full(len(made.left_out_by), -1, np.int64)
        row[samples] = np.arange(len(samples))
        columns = self._columns_of_data((name for policy in self.policies for name in policy.columns), epoch)
        lengths = self.integers("length", epoch=epoch)
        assert lengths is not None
        return Choice(
            policies=self.policies,
            plan=EpochPlan(indices=row[made.plan.indices], weights=made.plan.weights),
            left_out_by=made.left_out_by[samples],
            start=made.start,
            scores=self.numbers(epoch=epoch),
            higher_is_better={name: metric.higher_is_better for name, metric in self.metrics.items()},
            columns=columns,
            lengths=lengths,
            content_hash=self.hashes(epoch=epoch),
            missing=self.missing(epoch=epoch),
        )

    def _columns_of_data(self, names: Iterable[str], epoch: int | None) -> dict[str, Column]:
        """Columns by their names in the data: one that is called like one of ours is kept as `NAME_in_data`."""
        kept = {name: f"{name}_in_data" if f"{name}_in_data" in self.names else name for name in names}
        found = {name: self.column(ours, epoch=epoch) for name, ours in kept.items()}
        return {name: column for name, column in found.items() if column is not None}

    def plans(self) -> dict[int, IntArray]:
        """By epoch the samples of its plan, by their numbers in the data; empty for a file without."""
        if self.load_plans is None:
            return {}
        table = self.load_plans()
        epochs, samples = (np.asarray(table[name].to_numpy(), np.int64) for name in ("epoch", "sample"))
        return {epoch: samples[epochs == epoch] for epoch in sorted(set(epochs.tolist()))}

    def about(self) -> dict[str, Any]:
        """What a person wants to know of where the scores come from."""
        about = {name: self.facts.get(name) or None for name in ("model", "revision", "lora", "dtype", "dataset")}
        model = about["model"]
        if model and model.startswith((".", "/", "~")):  # a page is passed on: the folder's name says enough
            about["model"] = Path(model).name or model
        return about


def _has_passes(folder: Path) -> bool:
    return folder.is_dir() and bool(read_run(folder)) and len(Record(folder, write=False).passes) > 0


def _schema_of(file: Path) -> pa.Schema:
    """A Parquet file's schema.

    Raises:
        ValueError: there is no such file, or it is no Parquet file; the message says how to get one.
    """
    if not file.exists():
        cure = "Make one with `distill-sampler score DATA --model M --output scores.parquet`."
        if (file.parent / PLANS).exists() or any(file.parent.glob("checkpoint-*")):
            cure = "A run with attach keeps them as it goes; for one without, save_run(curriculum, FOLDER) writes them."
        if file.with_name(file.name + ".parts").exists():
            cure = "It is unfinished: run the same `distill-sampler score` again, and it goes on."
        raise ValueError(f"There is no scores file {file}. {cure}")
    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is no Parquet file ({str(error).splitlines()[0]}).") from None


def _metrics_of(facts: Mapping[str, Any], names: Sequence[str]) -> dict[str, Metric]:
    """The metrics that a file names; in a table that somebody made by hand, those whose columns it has."""
    told = facts.get("metrics")
    if isinstance(told, list) and all(isinstance(one, dict) for one in told):
        return {name: metric for name, metric in metrics_from(told).items() if set(metric.columns) <= set(names)}
    usual: dict[str, Metric] = {}
    for item in (getattr(metrics_package, name) for name in metrics_package.__all__):
        metric = item()
        if isinstance(metric, Metric) and set(metric.columns) <= set(names):
            usual[metric.name] = metric
    return usual


def _float_columns(table: pa.Table, names: Sequence[str]) -> dict[str, FloatArray]:
    return {name: np.array(table[name].to_numpy(), np.float32) for name in names}


def _codes(encoded: pa.DictionaryArray) -> IntArray:
    return np.asarray(encoded.indices.to_numpy(zero_copy_only=False), np.int64)
