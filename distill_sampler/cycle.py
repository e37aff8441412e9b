"""The cycle of one run on one data set: before each epoch, score with the current student, plan, and set the plan.

`Curriculum.bind` makes a `Cycle`. It combines the planner, the scoring passes, the sampler and the run's record, and
does not know which trainer it runs in.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import nn

from distill_sampler.artifacts.parts import Parts
from distill_sampler.artifacts.record import RECORD, Record
from distill_sampler.artifacts.run_folder import kept_as, sample_rows, write_tables
from distill_sampler.artifacts.schema import run_facts
from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.artifacts.state import as_state, content_of
from distill_sampler.dataset import ScoredDataset
from distill_sampler.distributed import Ranks
from distill_sampler.planning.packs import Packing, require_same_packing
from distill_sampler.planning.planner import PlannedEpoch, Planner
from distill_sampler.planning.rescore import Rescore
from distill_sampler.planning.sampler import DistillSampler
from distill_sampler.planning.summary import EpochSummary, ScoringSummary, summarise
from distill_sampler.planning.why import ExplainedPlan
from distill_sampler.protocols import Metric, Policy, Pool
from distill_sampler.reading.reduce import data_columns_of
from distill_sampler.reading.scorer import Scorer
from distill_sampler.scoring import PassRunner
from distill_sampler.serialize import described, differences, encode_facts
from distill_sampler.store import ScoreStore, ScoringPass, replay, replay_missing
from distill_sampler.truncation import truncation_notes
from distill_sampler.types import EncodedColumn, EpochPlan, FloatArray, IntArray

logger = logging.getLogger(__name__)


class Cycle:
    """One run. Takes the arguments of `Curriculum`, already checked, and the data set.

    Raises:
        ValueError: a column that a metric or policy reads is missing, or the policies would leave no sample.
    """

    def __init__(
        self,
        dataset: ScoredDataset,
        *,
        metrics: Mapping[str, Metric],
        policies: Sequence[Policy],
        num_samples: int | None,
        rescore: Rescore,
        observe: bool,
        seed: int,
        scorer: Scorer,
        teacher: str,
        packing: Packing | None = None,
        scores: Path | None = None,
    ) -> None:
        self.dataset = dataset
        self.metrics = dict(metrics)
        self.rescore = rescore
        self.scorer = scorer
        replans = rescore.every_steps is not None
        self.planner = Planner(
            dataset, self.metrics, policies, seed=seed, num_samples=num_samples, plans_rest=replans, packing=packing
        )
        self.teachers: EncodedColumn | None = None
        if teacher in dataset.column_names:
            self.teachers = self.planner.columns.get(teacher) or dataset.column(teacher)
        self._teacher = teacher
        read = dict.fromkeys([*self.planner.columns, *data_columns_of(self.metrics.values())])
        self.origin: dict[str, Any] = {
            "dataset": dataset.fingerprint,
            "metrics": [described(metric) for metric in self.metrics.values()],
            "policies": [described(policy) for policy in policies],
            "rescore": described(rescore),
            "observe": observe,
            "seed": seed,
            **{f"column '{name}'": dataset.column_fingerprint(name) for name in read},
        }
        """What the scores and plans belong to."""
        self.sampler = DistillSampler(self.planner.num_rows, packs=packing is not None)
        self.summaries: list[EpochSummary] = []
        self.record = Record()
        self._run = ""
        self.pass_runner = PassRunner(
            dataset,
            self.metrics,
            self.planner.samples_to_score,
            self.origin,
            rescore=rescore,
            scorer=scorer,
            seed=seed,
            given=scores,
        )
        self.reset()

    @property
    def store(self) -> ScoreStore:
        """The latest scores."""
        return self.pass_runner.store

    # ---- Life cycle ----

    def reset(self) -> None:
        """Forget scores and plans, for a run that starts from the beginning."""
        self.pass_runner = self.pass_runner.without_scores()
        self.epoch: int | None = None
        self.sampler.plan = None
        self.summaries.clear()
        self._trained_before: IntArray = np.zeros(len(self.dataset), np.int64)
        self._progress: int | None = None
        """How many samples of the current plan were trained on; None if the host has not said."""
        self._num_epochs: int | None = None
        self._num_plans = 0
        """Plans of the run, including those before a resume."""
        self._at_resume: tuple[int, dict[str, FloatArray]] | None = None
        """After a resume whose record lacks earlier passes: how many there were, and the latest numbers after them."""
        self._before_passes = {name: values.copy() for name, values in self.store.latest.items()}
        """The latest numbers before the run's first pass: none."""
        self.record.trim(0, 0)

    def keep(self, folder: Path | None, *, run: str = "", write: bool = True, earlier: Path | None = None) -> None:
        """From now on, keep passes, plans and the parts of an unfinished pass in the run's output folder.

        Args:
            folder: the output folder; None: keep them in memory.
            run: identity of the run. If the folder has the record of another run, that record is moved aside.
            write: whether this process writes.
            earlier: the output folder that the run may have had until now; its record goes on here.
        """
        self._run = run
        self.pass_runner.parts = self.pass_runner.readings = None
        self.record = Record()  # the facts of this run are not those of an earlier one's record
        try:
            record = Record(None if folder is None else folder / RECORD, write=write)
            if folder is not None:
                kept = None if earlier is None else earlier / RECORD
                record.begin(self.facts(), self.samples_table(), earlier=kept)
        except OSError as error:
            logger.warning("The run's record cannot be written to %s (%s). It stays in memory.", folder, error)
            record = Record()
        self.record = record
        if folder is not None:
            self.pass_runner.parts = folder / RECORD.parent / "scoring.parts"
            self.pass_runner.readings = folder / RECORD.parent / "readings"

    def done(self, folder: Path) -> None:
        """The run is over: write its tables into its output folder, and remove the parts of its last pass."""
        if self.pass_runner.parts is not None:
            Parts(self.pass_runner.parts).remove()
        try:
            self.save(folder)
        except (OSError, ValueError) as error:  # a full disk, or a record that was damaged meanwhile
            logger.warning("scores.parquet and plans.parquet cannot be written: %s", error)

    def start_epoch(self, epoch: int, model: nn.Module, *, step: int, num_epochs: int | None) -> EpochPlan:
        """Score, plan, and hand the plan to the sampler; see `Curriculum.start_epoch`."""
        ranks = Ranks.of(model)
        self._num_epochs = num_epochs
        if self.epoch == epoch and self.sampler.plan is not None:
            ranks.require_equal(self.sampler.plan.fingerprint, "plan")
            return self.sampler.plan
        ranks.require_equal(self.dataset.fingerprint, "data set")
        if self.sampler.plan is not None:
            self._trained_before = self.times_trained(assumed_progress=self.sampler.places(len(self.sampler)))
            self.sampler.plan = None
        summary = self.score(model, epoch=epoch, step=step, indices=self.pass_runner.due(ranks, epoch=epoch))
        planned, notes = self.planner.plan(self._pool(epoch, step), tolerate=_any_without_score(summary))
        ranks.require_equal(planned.plan.fingerprint, "plan")
        self.sampler.set_plan(planned.plan)
        self.epoch = epoch
        self._progress = None
        self._add_plan(planned, summary, notes)
        return planned.plan

    def replan(self, model: nn.Module, *, step: int, into_epoch: int, start: int) -> EpochPlan | None:
        """Replan the rest of the epoch, if it is time; see `Curriculum.replan`."""
        if into_epoch == 0 or not self.rescore.due(epoch=0, into_epoch=into_epoch):
            return None
        if self.sampler.rows(start) >= self.sampler.num_rows:
            return None
        assert self.epoch is not None
        assert self.sampler.plan is not None
        ranks = Ranks.of(model)
        indices = self.pass_runner.due(ranks, epoch=self.epoch, into_epoch=into_epoch)
        summary = self.score(model, epoch=self.epoch, step=step, indices=indices)
        planned, notes = self.planner.plan_rest(
            self.sampler.plan, start, self._pool(self.epoch, step), tolerate=_any_without_score(summary)
        )
        ranks.require_equal(planned.plan.fingerprint, "plan")
        self.sampler.set_rest(planned.plan, start)
        self._add_plan(planned, summary, notes)
        return planned.plan

    def score(self, model: nn.Module, *, epoch: int, step: int, indices: IntArray | None = None) -> ScoringSummary:
        """See `Curriculum.score`."""
        summary, scoring_pass = self.pass_runner.score(model, epoch=epoch, step=step, indices=indices)
        if scoring_pass is not None:
            self.record.add_pass(scoring_pass)
        return summary

    def _pool(self, epoch: int, step: int) -> Pool:
        return self.planner.pool(
            epoch,
            self.store.latest,
            times_trained=self.times_trained(),
            score_step=self.store.step,
            estimated=self.store.estimated,
            step=step,
            num_epochs=self._num_epochs,
        )

    def _add_plan(self, planned: PlannedEpoch, scoring: ScoringSummary, notes: Sequence[str]) -> None:
        """Add a plan to the record, and its numbers to the summaries."""
        planned = dataclasses.replace(planned, passes=len(self.store.passes))
        self.record.add_plan(planned)
        self._num_plans += 1
        all_notes = list(notes)
        for name, number in scoring.not_applicable.items():
            all_notes.insert(0, f"{name} does not apply to {number} samples, so they have no score by it.")
        if len(scoring.non_finite):
            weights = scoring.non_finite_weights
            all_notes.insert(
                0,
                (f"the student's weights are NaN or infinite ({weights}). " if weights else "")
                + f"the student's logits are NaN or infinite for {len(scoring.non_finite)} samples (first: sample "
                f"{scoring.non_finite[0]}), so they have no score.",
            )
        if not self.summaries:
            all_notes += truncation_notes(self.dataset, teacher=self._teacher, group=self.group)
        if not self.summaries and (note := self.sampler.whole_steps_note()):
            all_notes.append(note)
        self.summaries.append(
            summarise(
                epoch=planned.epoch,
                step=planned.step,
                plan=planned.plan,
                metrics=self.metrics,
                scores=self.store.latest,
                teacher=self.teachers,
                candidates=self.planner.candidates,
                num_scored=self.dataset.num_scored,
                scoring=scoring,
                notes=all_notes,
                packed=planned.packed,
            )
        )

    @property
    def teacher(self) -> str | None:
        """The column that names the teacher, if the data set has it."""
        return None if self.teachers is None else self._teacher

    @property
    def group(self) -> str | None:
        """The column that says which rows answer the same prompt, if a policy names one."""
        return next((policy.group_by for policy in self.planner.policies if policy.group_by), None)

    # ---- What hosts and users ask for ----

    def progress(self, places: int) -> None:
        """See `Curriculum.progress`."""
        # of what completes the last step, at most a step less one sample
        self._progress = min(places, self.sampler.places(self.sampler.num_rows + self.sampler.per_step - 1))

    def times_trained(self, *, assumed_progress: int = 0) -> IntArray:
        """`[samples]` how often each sample was trained on.

        Args:
            assumed_progress: how many samples of the current plan were trained on, if the host has not said.
        """
        if self.sampler.plan is None:
            return self._trained_before
        progress = assumed_progress if self._progress is None else self._progress
        indices = self.sampler.plan.indices
        now = np.bincount(indices[np.arange(progress) % len(indices)], minlength=len(self.dataset))
        return self._trained_before + now

    def explained(self, planned: PlannedEpoch) -> ExplainedPlan:
        """A plan with the scores that it is based on, to explain it."""
        passes, before = self._passes_until(planned.passes)
        return self.planner.explained(
            planned, replay(passes, before), replay_missing(passes, self.metrics, len(self.dataset))
        )

    def scores_after(self, passes: int) -> dict[str, FloatArray]:
        """The latest numbers after the run's first `passes` scoring passes, `[samples]` each."""
        return replay(*self._passes_until(passes))

    def _passes_until(self, stop: int) -> tuple[Sequence[ScoringPass], dict[str, FloatArray]]:
        """Recorded passes, up to the run's first `stop` ones, and the latest numbers before them.

        Raises:
            ValueError: the record lacks passes that the numbers depend on.
        """
        first, before = 0, self._before_passes
        if self._at_resume is not None and self._at_resume[0] <= stop:
            first, before = self._at_resume
        return self.record.passes_between(first, stop), before

    def explain(self, index: int, epoch: int) -> str:
        """See `Curriculum.explain`."""
        if not 0 <= index < len(self.dataset):
            raise ValueError(f"There is no sample {index}: the data set has {len(self.dataset)} rows, from 0.")
        if (planned := self.record.last_plan(epoch)) is None:
            known = sorted(self.record.last_plans())
            raise ValueError(f"Epoch {epoch} was not planned in this run. Choose one of {known}.")
        return self.explained(planned).explanation(index, epoch)

    def scores(self) -> Scores:
        """The scores of the run so far, as the report reads them.

        Raises:
            ValueError: nothing has been scored yet.
        """
        return Scores.of_record(self.record, self.facts(), self.samples_table())

    def save(self, folder: Path, *columns: str) -> None:
        """See `Curriculum.save_run`."""
        write_tables(self.record, self.samples_table(*columns), encode_facts(self.facts()), folder)

    def samples_table(self, *columns: str) -> pa.Table:
        """One row for each sample, with the columns that identify it; see `sample_rows`."""
        read = [*self.planner.columns, *data_columns_of(self.metrics.values())]
        return sample_rows(self.dataset, columns or self.dataset.identifying_columns(*read), self.metrics.values())

    def facts(self) -> dict[str, Any]:
        """What the run's scores belong to, for a file's metadata."""
        return run_facts(
            run=self._run,
            metrics=list(self.metrics.values()),
            policies=self.planner.policies,
            group=self.group and kept_as(self.group, self.metrics.values()),
            teacher=None if self.teachers is None else kept_as(self._teacher, self.metrics.values()),
            dataset=self.dataset.fingerprint,
            seed=self.planner.seed,
            numerics=self.store.numerics,
            **self.record.facts(),
        )

    # ---- State ----

    def state_dict(self, arrays: dict[str, npt.NDArray[Any]] | None = None) -> dict[str, Any]:
        """See `Curriculum.state_dict`."""
        plan, packing = self.sampler.plan, self.planner.packing
        content = {
            "num_samples": self.planner.num_samples,
            "epoch": self.epoch,
            **({} if packing is None else {"packing": packing.described}),
            "plan": None if plan is None else plan.arrays(),
            "progress": self._progress,
            "plans": self._num_plans,
            "trained": self._trained_before,
            "clock": self.pass_runner.clock.state_dict(),
            "scores": self.store.state_dict(),
        }
        return as_state(content, arrays)

    def load_state_dict(
        self,
        saved_state: Mapping[str, Any],
        arrays: Mapping[str, npt.NDArray[Any]] | None,
        *,
        accept_changes: bool,
        epoch_over: bool,
    ) -> None:
        """See `Curriculum.load_state_dict`."""
        state = content_of(saved_state, arrays)
        require_same_packing(state.get("packing"), self.planner.packing)
        if self.planner.packing is None and state["num_samples"] != self.planner.num_samples:
            raise ValueError(
                f"The curriculum's state has epochs of {state['num_samples']} samples, but here they have "
                f"{self.planner.num_samples}. Resume with Curriculum(num_samples={state['num_samples']})."
            )
        saved, here = state["scores"]["origin"], self.origin
        same_data = saved["dataset"] == here["dataset"]
        if differing := differences(saved, here):
            sentence = f"The checkpoint's plan and scores belong to another configuration ({differing}). "
            if not same_data and not epoch_over:
                raise ValueError(
                    sentence + "In the middle of an epoch, another data set cannot be accepted, because a plan "
                    "refers to the rows of its own data set. Resume with that data set, or start a new run from the "
                    "checkpoint's weights."
                )
            if not accept_changes:
                raise ValueError(
                    sentence + "Resume with the old configuration, or pass accept_changes=True: an epoch that has "
                    "begun then keeps its plan, and the next one is scored and planned with the new configuration."
                )
            logger.warning("%sThe changes are accepted. They take effect with the next epoch.", sentence)
        record, self.record = self.record, Record()
        self.reset()
        self.record = record
        read = {f"column '{name}'" for name in data_columns_of(self.metrics.values())}
        same_metrics = all(saved.get(name) == here.get(name) for name in ("metrics", *read))
        if same_data:
            self._trained_before = state["trained"].astype(np.int64)
        if same_data and same_metrics:
            self.store.load_state_dict({**state["scores"], "origin": here})
            self.pass_runner.clock.load_state_dict(state["clock"])
            self._num_plans = state["plans"]
            self.record.trim(len(self.store.passes), state["plans"])
            if len(self.record.passes) < len(self.store.passes):
                latest = {name: values.copy() for name, values in self.store.latest.items()}
                self._at_resume = len(self.store.passes), latest
        else:
            self.record.trim(0, 0)
        self.epoch = state["epoch"]
        if same_data and state["plan"] is not None:
            self.sampler.set_plan(EpochPlan(**state["plan"]))
            self._progress = state["progress"]


def _any_without_score(summary: ScoringSummary) -> bool:
    """Whether some candidates have no score, which may change the length of a plan."""
    return bool(len(summary.non_finite) + len(summary.too_long) + len(summary.not_applicable))
