"""What users configure: what to score, how to plan, when to score again. `bind` makes a run of it on a data set.

The run itself, with its scores, plans and state, is a `Cycle`; every method here that needs one hands over to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn

from distill_sampler.artifacts.run_folder import write_tables
from distill_sampler.artifacts.schema import encode_facts
from distill_sampler.contract import checked_metrics, checked_policies
from distill_sampler.cycle import Cycle
from distill_sampler.dataset import ScoredDataset
from distill_sampler.distributed import Ranks
from distill_sampler.planning.planner import Planner
from distill_sampler.planning.rescore import Rescore
from distill_sampler.planning.sampler import DistillSampler
from distill_sampler.planning.summary import EpochSummary, ScoringSummary
from distill_sampler.reading.observer import not_observable
from distill_sampler.reading.scorer import Scorer
from distill_sampler.store import ScoreStore
from distill_sampler.types import EpochPlan, IntArray, Metric, Policy


class Curriculum:
    """Which samples each epoch trains on, in which order: scored by the current student, planned by policies.

    Args:
        metrics: what to score, for example `[RankSurprisalRatio()]`. May be empty if no policy needs a score.
        policies: how the plan comes about, applied in order to "every sample once, in the data set's order".
        num_samples: length of every epoch. Left out, it is what the policies give if no sample lacks a score. It is
            constant, because trainers count their steps and lay out the learning rate once: a plan of another length
            is completed from its start or cut at its end (`fit_length`) if you gave the length, or if samples without a
            score are what is missing; otherwise it is refused.
        rescore: when the student scores again, and whom. Left out: everything before every epoch.
        observe: take the scores of what is trained on from the forward passes of training, at the price of one more
            product with the output head. Metrics that read other sequences than the samples (Local Naturalness) or
            other readers than the student cannot be had this way.
        seed: of everything random in the plans.
        scorer: how the student reads.
        teacher: column that says who wrote a response; for the reports. Not needed: without such a column, reports
            have no lines per teacher.

    Raises:
        ValueError: something in `metrics` or `policies` is none, a policy names a metric that is not scored, or two
            metrics share a name.
    """

    def __init__(
        self,
        *,
        metrics: Sequence[Metric],
        policies: Sequence[Policy],
        num_samples: int | None = None,
        rescore: Rescore | None = None,
        observe: bool = False,
        seed: int = 0,
        scorer: Scorer | None = None,
        teacher: str = "teacher",
    ) -> None:
        self.metrics = checked_metrics(metrics)
        self.policies = checked_policies(policies, self.metrics)
        self.rescore = rescore or Rescore()
        self.observe = observe
        self.seed = seed
        self.scorer = scorer or Scorer()
        self.teacher = teacher
        self._num_samples = num_samples
        self._cycle: Cycle | None = None
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"Curriculum(num_samples={num_samples}): an epoch needs at least one sample.")

    # ---- Life cycle ----

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Give a tokenizer to the metrics that read text and have none of their own. Call it before `bind`; `attach`
        does."""
        self.metrics = {name: metric.with_tokenizer(tokenizer) for name, metric in self.metrics.items()}

    def bind(self, dataset: ScoredDataset, *, applies_weights: bool = False, observes: bool = False) -> DistillSampler:
        """Start anew on a data set. Gives the sampler for its data loader.

        `attach` and `CurriculumLoop` do this. In a loop of your own, say what the loop itself does.

        Args:
            dataset: the prepared data.
            applies_weights: the loop multiplies each sample's loss by its weight in `sampler.plan.weights`.
            observes: the host takes scores from the forward passes of training.

        Raises:
            ValueError: a column that a policy or metric needs is missing, no sample would be left, or the curriculum
                asks for loss weights or observed scores and nobody provides them.
        """
        cycle = Cycle(
            dataset,
            metrics=self.metrics,
            policies=self.policies,
            num_samples=self._num_samples,
            rescore=self.rescore,
            observe=self.observe,
            seed=self.seed,
            scorer=self.scorer,
            teacher=self.teacher,
        )
        if self.observe:
            candidates = cycle.planner.candidates
            some = dataset.samples(candidates[:: max(1, len(candidates) // 64)])
            if others := not_observable(list(self.metrics.values()), some):
                raise ValueError(
                    f"observe=True: {', '.join(others)} reads other sequences than training does, or with another "
                    "reader, so training cannot show it. Leave observe off, or score only metrics of whole responses."
                )
            if not observes:
                raise ValueError(
                    "observe=True: this loop does not take scores from its forward passes. Use attach with a trainer, "
                    "or CurriculumLoop with accelerate, or leave observe off."
                )
        if cycle.planner.gives_weights and not applies_weights:
            raise ValueError(
                "The policies give loss weights, and this loop does not apply them. Use attach with a trainer, or "
                "CurriculumLoop with accelerate; a loop that multiplies each sample's loss by "
                "curriculum.sampler.plan.weights itself says so with bind(dataset, applies_weights=True)."
            )
        self._cycle = cycle
        return cycle.sampler

    @property
    def cycle(self) -> Cycle:
        """The run on the data set that was bound.

        Raises:
            ValueError: nothing was bound.
        """
        if self._cycle is None:
            raise ValueError(
                "This curriculum has no data yet: call attach(trainer, curriculum), or curriculum.bind(dataset) in a "
                "loop of your own, first."
            )
        return self._cycle

    def reset(self) -> None:
        """Forget scores and plans, for a run that starts from the beginning."""
        self.cycle.reset()

    def keep(self, folder: Path | str | None, *, run: str = "", write: bool = True) -> None:
        """Keep every pass and plan in a run's output folder as they happen, and what an interrupted pass has done.

        `attach` and `CurriculumLoop` do this. Without it, `history` and `explain` live in memory.

        Args:
            folder: the output folder; None: in memory.
            run: identity of the run. The record of another run in that folder is moved aside.
            write: whether this process is the one that writes.
        """
        self.cycle.keep(None if folder is None else Path(folder), run=run, write=write)

    def start_epoch(self, epoch: int, model: nn.Module, *, step: int = 0, num_epochs: int | None = None) -> EpochPlan:
        """Score, plan, and hand the plan to the sampler. Call it before the epoch's loop over the data loader.

        An epoch that already has a plan keeps it: after `load_state_dict` in the middle of an epoch, the rest of that
        epoch trains what it would have trained.

        Args:
            epoch: from 0.
            model: the student as the host trains it, wrapped or not.
            step: optimizer steps taken so far; the scores are recorded with it.
            num_epochs: epochs of the whole run, for policies that depend on it.

        Raises:
            ValueError: the plan has another length than the epochs are laid out for.
        """
        return self.cycle.start_epoch(epoch, model, step=step, num_epochs=num_epochs)

    def replan(self, model: nn.Module, *, step: int, into_epoch: int, start: int) -> EpochPlan | None:
        """Inside an epoch: if `Rescore(every_steps=)` says that it is time, score, and plan the rest of the epoch anew.

        The policies plan the whole epoch by the scores of now; what was handed out already counts towards it
        (`replace_rest`).

        Args:
            model: the student as the host trains it.
            step: optimizer steps taken so far in the run.
            into_epoch: optimizer steps taken in this epoch.
            start: place of the plan from which it may change: what a data loader was given lies before it.

        Returns:
            The plan, or None if it was not time, or nothing is left to plan.

        Raises:
            ValueError: a data loader was given `start` already.
        """
        return self.cycle.replan(model, step=step, into_epoch=into_epoch, start=start)

    def score(self, model: nn.Module, *, epoch: int, step: int, which: IntArray | None = None) -> ScoringSummary:
        """One pass: what training has shown since the last one, and the samples `which` scored now, go into `store`.

        Args:
            model: the student.
            epoch: the epoch that it is for.
            step: optimizer steps taken so far.
            which: samples to score; None: every candidate. Scores of other numerics (dtype, tie rule, …) are never
                mixed: if the student computes otherwise than in the last pass, every candidate is scored.
        """
        return self.cycle.score(model, epoch=epoch, step=step, indices=which)

    # ---- What host and researcher ask ----

    @property
    def dataset(self) -> ScoredDataset:
        """The data set that was bound."""
        return self.cycle.dataset

    @property
    def sampler(self) -> DistillSampler:
        """What the data loader draws from."""
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
        """The epoch that was planned last; None before the first."""
        return self.cycle.epoch

    @property
    def plans(self) -> list[EpochPlan]:
        """Every plan of the run so far: one for each epoch, and one for each time that its rest was planned anew."""
        return [planned.plan for planned in self.cycle.record.plans]

    @property
    def summaries(self) -> list[EpochSummary]:
        """The numbers of each plan that was made in this process."""
        return self.cycle.summaries

    def progress(self, places: int) -> None:
        """Tell how many places of the epoch's plan have been trained on. A host that does not is taken to train each
        plan to its end, once the next epoch begins."""
        self.cycle.progress(places)

    def times_trained(self) -> IntArray:
        """`[samples]` how often each sample was trained on, this run's epochs before a resume included."""
        return self.cycle.times_trained()

    def history(self, *columns: str) -> pa.Table:
        """The learning curve of every sample: one row for each time it was scored or observed in this run.

        Args:
            columns: of the data set, to have beside `sample, pass, epoch, step, observed` and the scores.
        """
        return self.cycle.history(*columns)

    def samples(self, *columns: str) -> pa.Table:
        """One row for each sample: what is known of it now.

        `sample`, the data set's columns that were asked for, the latest scores, `step` (of the last measurement; -1:
        never), `estimated` (the scores have moved on with the drift of others since), `times_scored` and
        `times_trained`.
        """
        return self.cycle.samples(*columns)

    def explain(self, index: int, epoch: int) -> str:
        """Why a sample was, or was not, in an epoch: which policy left it out, and the numbers it went by.

        Args:
            index: row of the data set.
            epoch: one that was planned in this run.

        Raises:
            ValueError: there is no such row, or the epoch was not planned.
        """
        return self.cycle.explain(index, epoch)

    def save_run(self, folder: str | Path, *columns: str) -> None:
        """Write the scores and plans of the run so far as `scores.parquet` and `plans.parquet`.

        Args:
            folder: usually the trainer's `output_dir`.
            columns: of the data set, to know the rows by. Left out: all with short single values (ids, teacher, domain,
                correctness).

        Raises:
            ValueError: the data set has no such column.
        """
        write_tables(
            self.cycle.record, self.cycle.samples_table(*columns), encode_facts(self.cycle.facts()), Path(folder)
        )

    # ---- State ----

    def merge_observed(self, model: nn.Module) -> None:
        """Give every process what training has shown the others. Call it on all of them before `state_dict`."""
        self.cycle.store.observed.merge(Ranks.of(model))

    def state_dict(self) -> dict[str, Any]:
        """Plan, epoch and latest scores as plain JSON values, the arrays compressed.

        Goes where the host keeps its state; `accelerator.register_for_checkpointing(curriculum)` takes it as it is.
        """
        return self.cycle.state_dict()

    def load_state_dict(
        self, state: Mapping[str, Any], *, accept_changes: bool = False, epoch_over: bool = False
    ) -> None:
        """Take back what `state_dict` gave: scores and plan are loaded, never computed again.

        Args:
            state: what `state_dict` gave.
            accept_changes: go on although metrics, policies, seed, or columns that they read are others: the rest of
                the epoch that was begun trains its plan, the next is scored and planned by what is given here. Another
                data set is accepted only if `epoch_over`, because a plan counts the rows of its own.
            epoch_over: the plan in the state was trained to its end.

        Raises:
            ValueError: it is damaged, or belongs to another data set or configuration; the message says what differs.
        """
        self.cycle.load_state_dict(state, accept_changes=accept_changes, epoch_over=epoch_over)
