"""The per-epoch cycle of one run on one data set: score with the current student, plan, hand the plan to the sampler.

`Curriculum.bind` makes it, whole. It composes the planner, the score store, the sampler and the run's record, and knows
no host.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from distill_sampler.artifacts.parts import Parts
from distill_sampler.artifacts.record import RECORD, Record
from distill_sampler.artifacts.run_folder import column_values, measurement_rows, sample_rows
from distill_sampler.artifacts.schema import run_facts
from distill_sampler.dataset import ScoredDataset
from distill_sampler.distributed import Ranks
from distill_sampler.planning.planner import PlannedEpoch, Planner
from distill_sampler.planning.rescore import Rescore
from distill_sampler.planning.sampler import DistillSampler
from distill_sampler.planning.summary import EpochSummary, ScoringSummary, summarise
from distill_sampler.planning.why import ExplainedPlan
from distill_sampler.reading.reduce import data_columns_of
from distill_sampler.reading.scorer import Scorer
from distill_sampler.scoring import PassRunner
from distill_sampler.serialize import described, differences, digest, pack, unpack
from distill_sampler.store import ScoreStore, replay, replay_missing
from distill_sampler.truncation import cut_sentence
from distill_sampler.types import Column, EpochPlan, FloatArray, IntArray, Metric, Policy, Pool

logger = logging.getLogger(__name__)

STATE_VERSION = 4


class Cycle:
    """One run. The arguments are those of `Curriculum`, checked, and the data set.

    Raises:
        ValueError: a column that a metric or policy reads is missing, or no sample would be left.
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
    ) -> None:
        self.dataset = dataset
        self.metrics = dict(metrics)
        self.rescore = rescore
        self.scorer = scorer
        self.planner = Planner(
            dataset,
            self.metrics,
            policies,
            seed=seed,
            num_samples=num_samples,
            plans_rest=rescore.every_steps is not None,
        )
        self.teachers: Column | None = None
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
        """What scores and plans belong to."""
        self.sampler = DistillSampler(self.planner.num_samples)
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
        self._places: int | None = None
        self._num_epochs: int | None = None
        self._plans = 0
        """Plans of the run, those before a resume included."""
        self._skipped = 0
        """Passes of the run that the record lacks, because it is kept in memory and the run was resumed."""
        self._known_before = {name: values.copy() for name, values in self.store.latest.items()}
        """What was known before the first pass of the record: nothing, or after a resume what the checkpoint had."""
        self.record.trim(0, 0)

    def keep(self, folder: Path | None, *, run: str = "", write: bool = True) -> None:
        """Keep passes, plans and interrupted passes in a run's output folder from here on. None: in memory.

        Args:
            folder: the output folder.
            run: identity of the run; the record of another one that lies there is moved aside.
            write: whether this process writes.
        """
        self._run = run
        self.pass_runner.parts = None
        try:
            record = Record(None if folder is None else folder / RECORD, write=write)
            if folder is not None:
                record.begin(self.facts(), self.samples_table())
        except OSError as error:
            logger.warning("The record of the run cannot be kept in %s (%s); it stays in memory.", folder, error)
            record = Record()
        self.record = record
        if folder is not None:
            self.pass_runner.parts = folder / RECORD.parent / "scoring.parts"

    def done(self) -> None:
        """The run is over: no interrupted pass is left to take up."""
        if self.pass_runner.parts is not None:
            Parts(self.pass_runner.parts).remove()

    def start_epoch(self, epoch: int, model: nn.Module, *, step: int, num_epochs: int | None) -> EpochPlan:
        """Score, plan, and hand the plan to the sampler; see `Curriculum.start_epoch`."""
        ranks = Ranks.of(model)
        self._num_epochs = num_epochs
        if self.epoch == epoch and self.sampler.plan is not None:
            ranks.require_equal(self.sampler.plan.fingerprint, "plan")
            return self.sampler.plan
        ranks.require_equal(self.dataset.fingerprint, "data set")
        if self.sampler.plan is not None:
            self._trained_before = self.times_trained(otherwise=self.planner.num_samples)
            self.sampler.plan = None
        scoring = self.score(model, epoch=epoch, step=step, indices=self.pass_runner.due(ranks, epoch=epoch))
        planned, notes = self.planner.plan(self._pool(epoch, step), tolerate=_explains_length(scoring))
        ranks.require_equal(planned.plan.fingerprint, "plan")
        self.sampler.set_plan(planned.plan)
        self.epoch = epoch
        self._places = None
        self._note(planned, scoring, notes)
        return planned.plan

    def replan(self, model: nn.Module, *, step: int, into_epoch: int, start: int) -> EpochPlan | None:
        """Plan the rest of the epoch anew, if it is time; see `Curriculum.replan`."""
        if start >= self.planner.num_samples or into_epoch == 0 or not self.rescore.due(epoch=0, into_epoch=into_epoch):
            return None
        assert self.epoch is not None
        assert self.sampler.plan is not None
        ranks = Ranks.of(model)
        indices = self.pass_runner.due(ranks, epoch=self.epoch, into_epoch=into_epoch)
        scoring = self.score(model, epoch=self.epoch, step=step, indices=indices)
        planned, notes = self.planner.plan_rest(
            self.sampler.plan, start, self._pool(self.epoch, step), tolerate=_explains_length(scoring)
        )
        ranks.require_equal(planned.plan.fingerprint, "plan")
        self.sampler.set_rest(planned.plan, start)
        self._note(planned, scoring, notes)
        return planned.plan

    def score(self, model: nn.Module, *, epoch: int, step: int, indices: IntArray | None = None) -> ScoringSummary:
        """See `Curriculum.score`."""
        summary, taken = self.pass_runner.score(model, epoch=epoch, step=step, indices=indices)
        if taken is not None:
            self._keep(lambda: self.record.add_pass(taken))
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

    def _note(self, planned: PlannedEpoch, scoring: ScoringSummary, notes: Sequence[str]) -> None:
        """Keep a plan, and its numbers for the log."""
        planned = dataclasses.replace(planned, passes=len(self.store.passes))
        self._keep(lambda: self.record.add_plan(planned))
        self._plans += 1
        said = list(notes)
        for name, number in scoring.not_applicable.items():
            said.insert(0, f"{name} does not apply to {number} samples; they are not chosen by it.")
        if len(scoring.non_finite):
            said.insert(
                0,
                f"the student's logits are NaN or infinite for {len(scoring.non_finite)} samples (first: sample "
                f"{scoring.non_finite[0]}); they are not chosen by score.",
            )
        if not self.summaries and self.dataset.cut.any():
            said.append(cut_sentence(self.dataset.cut, self.teachers))
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
                notes=said,
            )
        )

    def _keep(self, write: Any) -> None:
        """Add to the record; where that fails (a full disk), training goes on without one."""
        try:
            write()
        except OSError as error:
            logger.warning("The record of the run cannot be kept any more (%s). Training goes on.", error)
            self.record = Record(None, write=False)

    # ---- What host and researcher ask ----

    def progress(self, places: int) -> None:
        """See `Curriculum.progress`."""
        self._places = min(places, self.planner.num_samples)

    def times_trained(self, *, otherwise: int = 0) -> IntArray:
        """`[samples]` how often each sample was trained on.

        Args:
            otherwise: places of the current plan that were trained on, if the host has not told.
        """
        if self.sampler.plan is None:
            return self._trained_before
        places = otherwise if self._places is None else self._places
        now = np.bincount(self.sampler.plan.indices[:places], minlength=len(self.dataset))
        return self._trained_before + now

    def explained(self, planned: PlannedEpoch) -> ExplainedPlan:
        """A plan with what it went by, for explaining it."""
        passes = self.record.passes[: planned.passes - self._skipped]
        return self.planner.explained(
            planned, replay(passes, self._known_before), replay_missing(passes, self.metrics, len(self.dataset))
        )

    def scores_after(self, passes: int) -> dict[str, FloatArray]:
        """The numbers that were known after so many passes of the run, `[samples]` each."""
        return replay(self.record.passes[: passes - self._skipped], self._known_before)

    def explain(self, index: int, epoch: int) -> str:
        """See `Curriculum.explain`."""
        if not 0 <= index < len(self.dataset):
            raise ValueError(f"There is no sample {index}; the data set has {len(self.dataset)} rows, from 0.")
        plans = {planned.epoch: planned for planned in self.record.plans}
        if epoch not in plans:
            raise ValueError(f"Epoch {epoch} was not planned in this run; {sorted(plans)} were.")
        return self.explained(plans[epoch]).explanation(index, epoch)

    def history(self, *columns: str) -> pa.Table:
        """See `Curriculum.history`."""
        samples = pa.table(
            {"sample": np.arange(len(self.dataset)), **{name: column_values(self.dataset, name) for name in columns}}
        )
        return measurement_rows(self.record, samples, None, unmeasured=False)

    def samples(self, *columns: str) -> pa.Table:
        """See `Curriculum.samples`."""
        return pa.table(
            {
                "sample": np.arange(len(self.dataset)),
                **{name: column_values(self.dataset, name) for name in columns},
                **self.store.latest,
                "step": self.store.step,
                "estimated": self.store.estimated,
                "times_scored": self.store.times_scored,
                "times_trained": self.times_trained(),
            }
        )

    def samples_table(self, *columns: str) -> pa.Table:
        """One row for each sample with the columns that tell what it is; see `sample_rows`."""
        read = [*self.planner.columns, *data_columns_of(self.metrics.values())]
        return sample_rows(self.dataset, columns or self.dataset.identifying_columns(*read))

    def facts(self) -> dict[str, Any]:
        """What the run's scores belong to, for files."""
        groups = dict.fromkeys(policy.group_by for policy in self.planner.policies if policy.group_by)
        return run_facts(
            run=self._run,
            metrics=list(self.metrics.values()),
            policies=self.planner.policies,
            group=next(iter(groups), None),
            teacher=None if self.teachers is None else self._teacher,
            dataset=self.dataset.fingerprint,
            seed=self.planner.seed,
            numerics=self.store.numerics,
            drift=[dict(taken.drift) for taken in self.record.passes],
        )

    # ---- State ----

    def state_dict(self) -> dict[str, Any]:
        """See `Curriculum.state_dict`."""
        plan = self.sampler.plan
        state = {
            "version": STATE_VERSION,
            "num_samples": self.planner.num_samples,
            "epoch": self.epoch,
            "plan": None if plan is None else {"indices": pack(plan.indices), "weights": pack(plan.weights)},
            "plans": self._plans,
            "trained": pack(self._trained_before),
            "clock": self.pass_runner.clock.state_dict(),
            "scores": self.store.state_dict(),
        }
        return {**state, "digest": digest(state)}

    def load_state_dict(self, state: Mapping[str, Any], *, accept_changes: bool, epoch_over: bool) -> None:
        """See `Curriculum.load_state_dict`."""
        _require_whole(state, self.planner.num_samples)
        saved, here = state["scores"]["origin"], self.origin
        same_data = saved["dataset"] == here["dataset"]
        if differing := differences(saved, here):
            sentence = f"The plan and scores to resume from belong to another run: {differing}. "
            if not same_data and not epoch_over:
                raise ValueError(
                    sentence + "The plan of a begun epoch counts the rows of its own data set, so another cannot be "
                    "accepted. Resume with that data set, or start a new run from the checkpoint's weights."
                )
            if not accept_changes:
                raise ValueError(
                    sentence + "Resume with what they were made with, or accept the change with accept_changes=True: "
                    "an epoch that was begun is trained to its end as planned, and the next is scored and planned anew."
                )
            logger.warning("%sAccepted: they take effect from the next epoch that begins.", sentence)
        record, self.record = self.record, Record()
        self.reset()
        self.record = record
        read = {f"column '{name}'" for name in data_columns_of(self.metrics.values())}
        same_metrics = all(saved.get(name) == here.get(name) for name in ("metrics", *read))
        if same_data:
            self._trained_before = unpack(state["trained"]).astype(np.int64)
        if same_data and same_metrics:
            self.store.load_state_dict({**state["scores"], "origin": here})
            self.pass_runner.clock.load_state_dict(state["clock"])
            self._plans = state["plans"]
            self.record.trim(len(self.store.passes), state["plans"])
            if len(self.record.passes) < len(self.store.passes):
                self._skipped = len(self.store.passes) - len(self.record.passes)
                self._known_before = {name: values.copy() for name, values in self.store.latest.items()}
        else:
            self.record.trim(0, 0)
        self.epoch = state["epoch"]
        if same_data and state["plan"] is not None:
            indices, weights = (unpack(state["plan"][name]) for name in ("indices", "weights"))
            self.sampler.set_plan(EpochPlan(indices=indices, weights=weights))


def _explains_length(scoring: ScoringSummary) -> bool:
    """Whether samples without a score explain that policies give a plan of another length."""
    return bool(len(scoring.non_finite) + len(scoring.too_long) + len(scoring.not_applicable))


def _require_whole(state: Mapping[str, Any], num_samples: int) -> None:
    """Refuse a state that is damaged, or of another version or epoch length.

    Raises:
        ValueError: the message says which.
    """
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"The curriculum's state has version {state.get('version')}, this library reads {STATE_VERSION}. Resume "
            "with the version of distill_sampler that wrote it."
        )
    if state.get("digest") != digest(state):
        raise ValueError(
            "The curriculum's state is damaged: its content does not have the hash that was written with it. Resume "
            "from another checkpoint."
        )
    if state["num_samples"] != num_samples:
        raise ValueError(
            f"The curriculum's state is of epochs of {state['num_samples']} samples, here they have {num_samples}. "
            f"Resume with Curriculum(num_samples={state['num_samples']})."
        )
