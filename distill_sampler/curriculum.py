"""What users configure: what to score, how to plan, and when to score again.

`bind` starts a run on a data set. The run, with its scores, plans and state, is a `Cycle`; most methods here call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pyarrow as pa
from torch import nn

from distill_sampler import notebook
from distill_sampler.contract import checked_metrics, checked_policies, require_arguments
from distill_sampler.cycle import Cycle
from distill_sampler.dataset import ScoredDataset
from distill_sampler.distributed import Ranks
from distill_sampler.planning.packs import Packing
from distill_sampler.planning.planner import Planner
from distill_sampler.planning.rescore import Rescore
from distill_sampler.planning.sampler import DistillSampler
from distill_sampler.planning.summary import EpochSummary, ScoringSummary
from distill_sampler.protocols import Metric, Policy
from distill_sampler.reading.observer import not_observable
from distill_sampler.reading.scorer import Scorer
from distill_sampler.report.pictures import figure, require_plotly
from distill_sampler.report.progress import progress
from distill_sampler.store import ScoreStore
from distill_sampler.types import EpochPlan, IntArray


class Curriculum:
    """Decides what each epoch trains on, and in which order: the current student scores samples, policies plan.

    Args:
        metrics: what to score, for example `[RankSurprisalRatio()]`. May be empty if no policy needs a score.
        policies: how to plan: applied in order, starting from "every sample once, in the data set's order".
        num_samples: length of every epoch. By default, the length that the policies give if no sample lacks a score.
            It is constant, because trainers count their steps and set up the learning-rate schedule once. A plan of
            another length is completed from its start or cut at its end (`fit_length`) if you set `num_samples`, or if
            samples without a score can explain the difference. Otherwise it is refused.
        num_tokens: length of every epoch in tokens, where the plan is packed (`attach(…, pack_to=)`): an epoch has as
            many packs as so many tokens need. By default as many as the policies' plan fills if no sample lacks a
            score.
        rescore: when the student scores again, and which samples. By default every candidate before every epoch.
        observe: also take scores from the forward passes of training, at the cost of one more product with the output
            head. Not possible for metrics that read other sequences than the samples (Local Naturalness) or use other
            readers than the student, except the live teacher of an objective and stored teachers.
        seed: seed of all random choices in the plans.
        scorer: how the student reads.
        scores: file of scores from `distill-sampler score` or `score_rows`, for the first pass. They must be those that
            the student would give: the same weights, numerics and metrics. Only samples that are not in it are scored.
        teacher: column that names the teacher, for reports. If the data set has no such column, reports do not list
            teachers.
        domain: column that names the kind of task. With `observe=True`, the trainer's log has the loss by teacher and
            by domain.

    Raises:
        ValueError: `metrics` or `policies` hold something else, a policy names a metric that is not scored, or two
            metrics have the same name.
    """

    def __init__(
        self,
        *,
        metrics: Sequence[Metric],
        policies: Sequence[Policy],
        num_samples: int | None = None,
        num_tokens: int | None = None,
        rescore: Rescore | None = None,
        observe: bool = False,
        seed: int = 0,
        scorer: Scorer | None = None,
        scores: str | Path | None = None,
        teacher: str = "teacher",
        domain: str = "domain",
    ) -> None:
        require_arguments(
            "Curriculum",
            num_samples=(num_samples, "int | None"),
            num_tokens=(num_tokens, "int | None"),
            rescore=(rescore or Rescore(), Rescore),
            observe=(observe, "bool"),
            seed=(seed, "int"),
            scorer=(scorer or Scorer(), Scorer),
            scores=(scores, "str | Path | None"),
            teacher=(teacher, "str"),
            domain=(domain, "str"),
        )
        self.metrics = checked_metrics(metrics)
        self.policies = checked_policies(policies, self.metrics)
        self.rescore = rescore or Rescore()
        self.observe = observe
        self.seed = int(seed)  # checkpoints take no numbers of numpy
        self.scorer = scorer or Scorer()
        self._scores = None if scores is None else Path(scores)
        self.teacher = teacher
        self.domain = domain
        self.driven_by: str | None = None
        """The trainer or loop that it was attached to; None: nothing yet. There can be one only."""
        self._num_samples = None if num_samples is None else int(num_samples)
        self._num_tokens = None if num_tokens is None else int(num_tokens)
        self._cycle: Cycle | None = None
        for name, given, unit in (("num_samples", num_samples, "sample"), ("num_tokens", num_tokens, "token")):
            if given is not None and given < 1:
                raise ValueError(f"Curriculum({name}={given}): an epoch needs at least one {unit}.")
        if num_samples is not None and num_tokens is not None:
            raise ValueError("Curriculum(num_samples=, num_tokens=): an epoch has one length. Give one of the two.")
        if observe and self.scorer.compile_layers:
            raise ValueError("observe=True and Scorer(compile_layers=True) round differently. Give the curriculum one.")

    # ---- Life cycle ----

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Give a tokenizer to the metrics that read text and have none. Call it before `bind`; `attach` does."""
        self.metrics = {name: metric.with_tokenizer(tokenizer) for name, metric in self.metrics.items()}

    def bind(
        self,
        dataset: ScoredDataset,
        *,
        applies_weights: bool = False,
        observes: bool = False,
        packing: Packing | None = None,
        teachers: Sequence[nn.Module] = (),
    ) -> DistillSampler:
        """Start a run on a data set. Returns the sampler for its data loader.

        `attach` and `CurriculumLoop` call this. In a loop of your own, say what it supports.

        Args:
            dataset: the prepared data set.
            applies_weights: whether the loop multiplies each sample's loss by its weight in `sampler.plan.weights`.
            observes: whether the loop takes scores from the forward passes of training.
            packing: how plans are packed. The sampler then gives tuples of indices, whose samples are one row.
            teachers: models that read each batch of training beside the student. Metrics that they read for can be
                observed too.

        Raises:
            ValueError: a column that a policy or metric needs is missing, the policies would leave no sample, or the
                curriculum needs loss weights or observed scores and the loop does not support them.
        """
        if self._num_tokens is not None:
            if packing is None:
                raise ValueError(
                    f"Curriculum(num_tokens={self._num_tokens}) is the length of an epoch in packs, but nothing is "
                    "packed. Say how many tokens a pack has, attach(trainer, curriculum, pack_to=…), or give "
                    "num_samples= instead."
                )
            packing = replace(packing, num_packs=-(-self._num_tokens // packing.capacity))
        cycle = Cycle(
            dataset,
            metrics=self.metrics,
            policies=self.policies,
            num_samples=self._num_samples,
            packing=packing,
            rescore=self.rescore,
            observe=self.observe,
            seed=self.seed,
            scorer=self.scorer,
            teacher=self.teacher,
            scores=self._scores,
        )
        if self.observe:
            candidates = cycle.planner.candidates
            examples = dataset.samples(candidates[:: max(1, len(candidates) // 64)])
            if names := not_observable(list(self.metrics.values()), examples, teachers):
                raise ValueError(
                    f"observe=True: {', '.join(names)} cannot be observed in training, because such metrics read other "
                    "sequences, or another model reads for them that does not read the batches of training (as the "
                    "teacher of an objective does). Set observe=False, or use only metrics of whole samples."
                )
            if not observes:
                raise ValueError(
                    "observe=True: this loop does not observe scores in its forward passes. Use attach with a trainer "
                    "or CurriculumLoop with accelerate, or set observe=False."
                )
        if cycle.planner.gives_weights and not applies_weights:
            raise ValueError(
                "The policies set loss weights, but this loop does not apply them. Use attach with a trainer or "
                "CurriculumLoop with accelerate. If your loop multiplies each sample's loss by its weight in "
                "curriculum.sampler.plan.weights, call bind(dataset, applies_weights=True)."
            )
        self._cycle = cycle
        return cycle.sampler

    @property
    def cycle(self) -> Cycle:
        """The run that `bind` started.

        Raises:
            ValueError: `bind` was not called yet.
        """
        if self._cycle is None:
            raise ValueError(
                "This curriculum has no data set yet. First call attach(trainer, curriculum), or in a loop of your own "
                "curriculum.bind(dataset)."
            )
        return self._cycle

    def reset(self) -> None:
        """Forget scores and plans, for a run that starts from the beginning."""
        self.cycle.reset()

    def keep(
        self, folder: Path | str | None, *, run: str = "", write: bool = True, earlier: Path | None = None
    ) -> None:
        """From now on, keep passes, plans and the parts of an unfinished pass in the run's output folder.

        `attach` and `CurriculumLoop` call this. Without it, the data for `history` and `explain` stays in memory.

        Args:
            folder: the output folder; None: keep them in memory.
            run: identity of the run. If the folder has the record of another run, that record is moved aside.
            write: whether this process writes.
            earlier: the output folder that the run may have had until now. Its record of the run is copied.
        """
        self.cycle.keep(None if folder is None else Path(folder), run=run, write=write, earlier=earlier)

    def start_epoch(self, epoch: int, model: nn.Module, *, step: int = 0, num_epochs: int | None = None) -> EpochPlan:
        """Score, plan, and hand the plan to the sampler. Call it before the epoch's loop over the data loader.

        An epoch that already has a plan keeps it. So after `load_state_dict` in the middle of an epoch, the rest of the
        epoch is trained as planned.

        Args:
            epoch: the epoch, from 0.
            model: the student as the host trains it, wrapped or not.
            step: optimizer steps taken so far; recorded with the scores.
            num_epochs: epochs of the whole run, for policies that depend on it.

        Raises:
            ValueError: the policies give another length than the epochs have.
        """
        return self.cycle.start_epoch(epoch, model, step=step, num_epochs=num_epochs)

    def replan(self, model: nn.Module, *, step: int, into_epoch: int, start: int) -> EpochPlan | None:
        """Inside an epoch: if it is time by `Rescore(every_steps=)`, score, and replan the rest of the epoch.

        The policies plan the whole epoch from the current scores. Samples before `start` count towards it
        (`replace_rest`).

        Args:
            model: the student as the host trains it.
            step: optimizer steps taken so far in the run.
            into_epoch: optimizer steps taken in this epoch.
            start: position from which the plan may change. Data loaders must not have read past it.

        Returns:
            The plan, or None if it was not time, or nothing is left to plan.

        Raises:
            ValueError: a data loader has read past `start`.
        """
        return self.cycle.replan(model, step=step, into_epoch=into_epoch, start=start)

    def score(self, model: nn.Module, *, epoch: int, step: int, which: IntArray | None = None) -> ScoringSummary:
        """Run one scoring pass: put the scores observed since the last pass, and those of `which`, into `store`.

        Args:
            model: the student.
            epoch: the epoch that the pass is for.
            step: optimizer steps taken so far.
            which: samples to score; None: every candidate. Scores with different numerics (dtype, tie rule, …) are
                never mixed: if the numerics have changed since the last pass, every candidate is scored.
        """
        return self.cycle.score(model, epoch=epoch, step=step, indices=which)

    # ---- What hosts and users ask for ----

    @property
    def dataset(self) -> ScoredDataset:
        """The data set that was bound."""
        return self.cycle.dataset

    @property
    def sampler(self) -> DistillSampler:
        """The sampler for the data loader."""
        return self.cycle.sampler

    @property
    def store(self) -> ScoreStore:
        """The latest scores."""
        return self.cycle.store

    @property
    def planner(self) -> Planner:
        """What makes the plans."""
        return self.cycle.planner

    @property
    def num_samples(self) -> int:
        """Length of every epoch."""
        return self.cycle.planner.num_samples

    @property
    def epoch(self) -> int | None:
        """The current epoch; None before the first."""
        return self.cycle.epoch

    @property
    def plans(self) -> list[EpochPlan]:
        """Every plan of the run so far: one for each epoch, and one for each time an epoch was replanned."""
        return [planned.plan for planned in self.cycle.record.plans]

    @property
    def summaries(self) -> list[EpochSummary]:
        """The numbers of each plan made in this process."""
        return self.cycle.summaries

    def progress(self, places: int) -> None:
        """Report how many samples of the epoch's plan have been trained on. If a host never does, a plan counts as
        trained to its end when the next epoch begins."""
        self.cycle.progress(places)

    def times_trained(self) -> IntArray:
        """`[samples]` how often each sample was trained on in this run, including before a resume."""
        return self.cycle.times_trained()

    def history(self, *columns: str) -> pa.Table:
        """The learning curve of every sample: one row for each time it was scored or observed in this run.

        Args:
            columns: columns of the data set to add to `sample, pass, epoch, step, observed`, the scores and `chosen`
                (whether the epoch's plan has the sample; null for a pass without a plan). By default, the columns that
                name the prompt and the teacher.
        """
        return notebook.history(self.cycle, columns)

    def samples(self, *columns: str) -> pa.Table:
        """What is known about each sample now, one row each.

        The columns are `sample`, `source_row` (its number in the data that the trainer was given), the given columns of
        the data set (by default those that name the prompt and the teacher), the latest scores, `step` (of the last
        measurement; -1: never), `estimated` (whether the scores are estimates), `times_scored`, `times_trained` and
        `chosen` (whether the current plan has it).
        """
        return notebook.samples(self.cycle, columns)

    def plot(self, metric: str | None = None) -> Any:
        """A picture of the run so far: how scores move, which teachers the plans hold, how old scores are.

        In a notebook, the last line of a cell shows it; `curriculum.plot().write_html("run.html")` keeps it.

        Args:
            metric: the metric to draw. By default the Rank-Surprisal Ratio if it is scored.

        Returns:
            A `plotly.graph_objects.Figure`.

        Raises:
            ValueError: nothing has been scored yet, there is no such metric, or plotly is not installed.
        """
        require_plotly("plot()")
        return figure(progress(self.cycle.scores(), metric=metric))

    def __repr__(self) -> str:
        return notebook.text(self.metrics, self.policies, self._cycle)

    def _repr_html_(self) -> str:
        return notebook.html(self.metrics, self.policies, self._cycle)

    def explain(self, index: int, epoch: int) -> str:
        """Why a sample was or was not in an epoch: which policy left it out, with the numbers it used.

        Args:
            index: row of the data set.
            epoch: an epoch that was planned in this run.

        Raises:
            ValueError: there is no such row, or the epoch was not planned.
        """
        return self.cycle.explain(index, epoch)

    def save_run(self, folder: str | Path, *columns: str) -> None:
        """Write the scores and plans of the run so far as `scores.parquet` and `plans.parquet`.

        Args:
            folder: usually the trainer's `output_dir`.
            columns: columns of the data set to add. By default, all with short single values (ids, teacher, domain,
                correctness).

        Raises:
            ValueError: the data set has no such column.
        """
        self.cycle.save(Path(folder), *columns)

    # ---- State ----

    def merge_observed(self, model: nn.Module) -> None:
        """Share observed scores among all processes. Call it on all of them before `state_dict`."""
        self.cycle.store.observed.merge(Ranks.of(model))

    def state_dict(self, arrays: dict[str, npt.NDArray[Any]] | None = None) -> dict[str, Any]:
        """Plan, epoch and latest scores as plain JSON values, with compressed arrays.

        Hosts save it in their checkpoints. `accelerator.register_for_checkpointing(curriculum)` works as it is.

        Args:
            arrays: if given, copies of the arrays go in here by name, to be kept in a file of their own. The JSON then
                has their hashes. For millions of samples that takes less time and memory.
        """
        return self.cycle.state_dict(arrays)

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        arrays: Mapping[str, npt.NDArray[Any]] | None = None,
        *,
        accept_changes: bool = False,
        epoch_over: bool = False,
    ) -> None:
        """Restore what `state_dict` returned. Scores and plan are loaded, never computed again.

        Args:
            state: what `state_dict` returned.
            arrays: the arrays, if it put them there.
            accept_changes: continue although metrics, policies, seed, or columns that they read have changed. The
                current epoch keeps its plan; the next one is scored and planned with the new configuration. Another
                data set is accepted only with `epoch_over`, because a plan refers to the rows of its own data set.
            epoch_over: whether the plan in the state was trained to its end.

        Raises:
            ValueError: the state is damaged, or belongs to another data set or configuration; the message says which.
        """
        self.cycle.load_state_dict(state, arrays, accept_changes=accept_changes, epoch_over=epoch_over)
