"""The per-epoch cycle and its state: score with the current student, plan, hand the plan to the sampler.

The only object that composes the others. It knows no host: `integrations` call `start_epoch` when their epoch begins,
`replan` inside it, and keep `state_dict` where the host keeps its checkpoints.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from distill_sampler.artifacts.parts import Journal, weights_identity
from distill_sampler.dataset import ScoredDataset
from distill_sampler.distributed import Ranks
from distill_sampler.metrics._tokenizer import with_tokenizer
from distill_sampler.planning.rescore import Rescore, Spent, choose
from distill_sampler.planning.sampler import DistillSampler, fit_length, with_rest
from distill_sampler.planning.summary import EpochSummary, ScoringSummary, summarise
from distill_sampler.policies import apply_policies, trace_policies
from distill_sampler.reading.in_process import positions
from distill_sampler.reading.observer import can_observe
from distill_sampler.reading.scorer import Scorer, columns_of
from distill_sampler.store import ScoreStore, differences, pack, unpack
from distill_sampler.types import BoolArray, Column, EpochPlan, FloatArray, IntArray, Metric, Policy, Pool, unknown_name

logger = logging.getLogger(__name__)

STATE_VERSION = 3


class Curriculum:
    """Which samples each epoch trains on, in which order: scored by the current student, planned by policies.

    Args:
        metrics: what to score, for example `[RankSurprisalRatio()]`. May be empty if no policy needs a score.
        policies: how the plan comes about, applied in order to "every sample once, in the data set's order".
        num_samples: length of every epoch. Left out, it is what the policies give if no sample lacks a score. It is
            constant, because trainers count their steps and lay out the learning rate once: a plan of another length
            is completed from its start or cut at its end (`fit_length`) if you gave the length, or if samples with
            non-finite logits are what is missing; otherwise it is refused.
        rescore: when the student scores again, and whom. Left out: everything before every epoch.
        observe: take the scores of what is trained on from the forwards of training, at the price of one more product
            with the output head. Trainers that are attached do it; metrics that read other sequences than the samples
            (Local Naturalness) cannot be had this way.
        seed: of everything random in the plans.
        scorer: how the student is run.
        teacher: column that says who wrote a response; for the reports. Not needed: without such a column, reports
            have no lines per teacher.

    Raises:
        ValueError: a policy names a metric that is not scored, or two metrics share a name.
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
        self.metrics = {metric.name: metric for metric in metrics}
        self.policies = tuple(policies)
        self.rescore = rescore or Rescore()
        self.observe = observe
        self.seed = seed
        self.scorer = scorer or Scorer()
        self.summaries: list[EpochSummary] = []
        """One for each plan made so far in this process: one for each epoch, and for each time its rest was changed."""
        self.plans: list[EpochPlan] = []
        """The same plans."""
        self.journal: Path | None = None
        """File that keeps the scores of a pass as they come, so that an interrupted pass only does the rest when it is
        started again. None: nothing is kept. `attach` puts it into the trainer's output folder."""
        self._given_num_samples = num_samples
        self._teacher = teacher
        names = [name for metric in metrics for name in metric.columns]
        if len(set(names)) < len(names) or len(self.metrics) < len(metrics):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(
                f"Two metrics give the same numbers ({', '.join(twice)}). Score each once, or give variants a name="
            )
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"Curriculum(num_samples={num_samples}): an epoch needs at least one sample.")
        for policy in self.policies:
            for name in policy.uses_metrics:
                if name not in self.metrics:
                    raise ValueError(
                        f"{type(policy).__name__}: {unknown_name('metric', name, self.metrics, 'in metrics=')}"
                    )

    # ---- Life cycle ----

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Give a tokenizer to the metrics that read text and have none of their own. `attach` does."""
        self.metrics = {name: with_tokenizer(metric, tokenizer) for name, metric in self.metrics.items()}

    def bind(self, dataset: ScoredDataset) -> DistillSampler:
        """Start anew on a data set. Gives the sampler for its data loader.

        Raises:
            ValueError: a column that a policy needs is missing, or no sample would be left.
        """
        self.dataset = dataset
        self._candidates = np.flatnonzero(dataset.scorable)
        if self.observe:
            some = dataset.samples(self._candidates[:: max(1, len(self._candidates) // 64)])
            if others := can_observe(list(self.metrics.values()), some):
                raise ValueError(
                    f"observe=True: {', '.join(others)} reads other sequences than training does, so training cannot "
                    "show it. Leave observe off, or score only metrics of whole responses."
                )
        needed = dict.fromkeys(name for policy in self.policies for name in policy.uses_columns)
        self._columns = {name: dataset.column(name, complete=True) for name in needed}
        self._teachers: Column | None = None
        if self._teacher in dataset.column_names:
            self._teachers = self._columns.get(self._teacher) or dataset.column(self._teacher)
        # with equal scores for all, the policies give the plan's length before there are scores
        constant = {name: np.ones(len(dataset), np.float32) for name in self._score_columns}
        self.num_samples = self._given_num_samples or len(self._plan(0, constant, dry_run=True))
        # with made-up scores that differ, they show whether they weight: hosts that cannot apply weights refuse then
        made_up = {name: (dataset.content_hash >> np.uint64(40)) / 2.0**24 + 1 for name in self._score_columns}
        self.gives_weights = bool((self._plan(0, made_up, dry_run=True).weights != 1).any())
        self.sampler = DistillSampler(self.num_samples)
        self.reset()
        return self.sampler

    def reset(self) -> None:
        """Forget scores and plans, for a run that starts from the beginning."""
        self.store = ScoreStore(
            len(self.dataset), self._score_columns, self._origin, watched=next(iter(self.metrics), None)
        )
        self.epoch: int | None = None
        self.sampler.plan = None
        self.summaries.clear()
        self.plans.clear()
        self.spent = Spent()
        self._clock = time.perf_counter()
        self._trained_before: IntArray = np.zeros(len(self.dataset), np.int64)
        self._places: int | None = None

    def start_epoch(self, epoch: int, model: nn.Module, *, step: int = 0) -> EpochPlan:
        """Score, plan, and hand the plan to the sampler. Call it before the epoch's loop over the data loader.

        An epoch that already has a plan keeps it: after `load_state_dict` in the middle of an epoch, the rest of that
        epoch trains what it would have trained.

        Args:
            epoch: from 0.
            model: the student as the host trains it, wrapped or not.
            step: optimizer steps taken so far; the scores are recorded with it.

        Raises:
            ValueError: the plan has another length than the epochs are laid out for.
        """
        ranks = Ranks.of(model)
        if self.epoch == epoch and self.sampler.plan is not None:
            ranks.require_equal(self.sampler.plan.fingerprint, "plan")
            return self.sampler.plan
        ranks.require_equal(self.dataset.fingerprint, "data set")
        if self.sampler.plan is not None:
            self._trained_before = self.times_trained(otherwise=self.num_samples)
        scoring = self.score(model, epoch=epoch, step=step, which=self._due(ranks, epoch=epoch))
        plan, notes = self._make_plan(epoch, scoring)
        ranks.require_equal(plan.fingerprint, "plan")
        self.sampler.set_plan(plan)
        self.epoch = epoch
        self._places = None
        self._note(plan, step, scoring, notes)
        return plan

    def replan(self, model: nn.Module, *, step: int, into_epoch: int, start: int) -> EpochPlan | None:
        """Inside an epoch: if `Rescore(every_steps=)` says that it is time, score, and plan the rest of the epoch anew.

        The policies plan the whole epoch by the scores of now; what was handed out already counts towards it
        (`with_rest`).

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
        if start >= self.num_samples or into_epoch == 0 or not self.rescore.due(epoch=0, into_epoch=into_epoch):
            return None
        assert self.epoch is not None
        assert self.sampler.plan is not None
        ranks = Ranks.of(model)
        which = self._due(ranks, epoch=self.epoch, into_epoch=into_epoch)
        scoring = self.score(model, epoch=self.epoch, step=step, which=which)
        whole, notes = self._make_plan(self.epoch, scoring)
        plan = with_rest(self.sampler.plan, whole, start, self._groups)
        ranks.require_equal(plan.fingerprint, "plan")
        self.sampler.set_rest(plan, start)
        self._note(plan, step, scoring, [f"planned anew from sample {start} on.", *notes])
        return plan

    def score(self, model: nn.Module, *, epoch: int, step: int, which: IntArray | None = None) -> ScoringSummary:
        """One pass: what training has shown since the last, and the samples `which` scored now, go into `store`.

        Args:
            model: the student.
            epoch: the epoch that it is for.
            step: optimizer steps taken so far.
            which: samples to score; None: every candidate. Scores of other numerics (dtype, tie rule, …) are never
                mixed: if the student computes otherwise than in the last pass, it is every candidate.
        """
        which = self._candidates if which is None else which
        first = not self.store.passes
        if self.metrics:
            numerics = self.scorer.numerics(model)
            if not first and self.store.numerics != numerics:
                logger.warning(
                    "Scores from here on cannot be compared with those so far (%s), so every candidate is scored anew.",
                    differences(self.store.numerics, numerics),
                )
                which = self._candidates
            self.store.numerics = numerics
        else:
            which = which[:0]
        ranks = Ranks.of(model)
        self.store.observed.merge(ranks)
        observed = int((self.store.observed.step >= 0).sum())
        tokens, seconds = 0, 0.0
        tokens_of: Counter[str] = Counter()
        if len(which) or observed:
            started = self._tick()
            metrics = list(self.metrics.values())
            # what an interrupted pass has left belongs to a pass over the same samples
            with self._pass_journal(model, epoch, step, which) as journal:
                self.store.begin(epoch=epoch, step=step)
                done = self._take_up(journal, ranks)
                for scored in self.scorer.score(model, self.dataset, metrics, which, done=done):
                    self.store.write(scored.indices, scored.columns)
                    journal.append(scored.indices, scored.columns)
                    tokens += scored.tokens
                    tokens_of.update(scored.tokens_of)
            self.store.settle()
            seconds = self._tick() - started
            if tokens:
                self.spent.tokens_per_second = float(self.dataset.lengths[which].sum()) / seconds
            if first:
                self.spent.run = 0.0
            else:
                self.spent.scoring += seconds
        missing = np.isnan([self.store.latest[name][self._candidates] for name in self._score_columns]).any(axis=0)
        without = self._candidates[missing]
        too_long = self.dataset.lengths[without] > positions(model)
        age = step - self.store.step[self._candidates]
        return ScoringSummary(
            samples=len(which),
            observed=observed,
            estimated=int(self.store.estimated[self._candidates].sum()),
            tokens=tokens,
            tokens_of=tokens_of,
            seconds=seconds,
            share=self.spent.scoring / self.spent.run if self.spent.run else 0.0,
            age_median=float(np.median(age)) if self.metrics else 0.0,
            age_max=int(age.max()) if self.metrics else 0,
            non_finite=without[~too_long],
            too_long=without[too_long],
        )

    # ---- What host and researcher ask ----

    def progress(self, places: int) -> None:
        """Tell how many places of the epoch's plan have been trained on. A host that does not is taken to train each
        plan to its end, once the next epoch begins."""
        self._places = min(places, self.num_samples)

    def times_trained(self, *, otherwise: int = 0) -> IntArray:
        """`[samples]` how often each sample was trained on, this run's epochs before a resume included.

        Args:
            otherwise: places of the current plan that were trained on, if the host has not told.
        """
        if self.sampler.plan is None:
            return self._trained_before
        places = otherwise if self._places is None else self._places
        now = np.bincount(self.sampler.plan.indices[:places], minlength=len(self.dataset))
        return self._trained_before + now

    def history(self, *columns: str) -> pa.Table:
        """The learning curve of every sample: one row for each time it was scored or observed in this process.

        Args:
            columns: of the data set, to have beside `sample, epoch, step, observed` and the scores.
        """
        return self.store.to_table(**{name: self._values(name) for name in columns})

    def samples(self, *columns: str) -> pa.Table:
        """One row for each sample: what is known of it now.

        `sample`, the data set's columns that were asked for, the latest scores, `step` (of the last measurement; -1:
        never), `estimated` (the scores have moved on with the drift of others since), `times_scored` and
        `times_trained`.
        """
        return pa.table(
            {
                "sample": np.arange(len(self.dataset)),
                **{name: self._values(name) for name in columns},
                **self.store.latest,
                "step": self.store.step,
                "estimated": self.store.estimated,
                "times_scored": self.store.times_scored,
                "times_trained": self.times_trained(),
            }
        )

    def merge_observed(self, model: nn.Module) -> None:
        """Give every process what training has shown the others. Call it on all of them before `state_dict`."""
        self.store.observed.merge(Ranks.of(model))

    def _pass_journal(self, model: nn.Module, epoch: int, step: int, which: IntArray) -> Journal:
        """What an interrupted pass has left, if it was this one: same data, samples, metrics, weights and batches."""
        parameter = next(model.parameters())
        ranks = Ranks.of(model)
        origin = self._origin
        identity = {
            "dataset": origin["dataset"],
            "metrics": origin["metrics"],
            "samples": hashlib.blake2b(which.tobytes(), digest_size=8).hexdigest(),
            "epoch": epoch,
            "step": step,
            "weights": weights_identity(model) if self.journal else None,
            # numbers in other batches, by other kernels, are others in their last digits
            "scorer": repr(dataclasses.replace(self.scorer, progress=False)),
            "world_size": ranks.world_size,
            "device": parameter.device.type,
            "dtype": str(parameter.dtype),
            "torch": torch.__version__,
        }
        return Journal(self.journal if ranks.rank == 0 else None, identity)

    def _take_up(self, journal: Journal, ranks: Ranks) -> BoolArray:
        """`[samples]` which samples the journal has; their numbers go into the store, on every process."""
        done = np.zeros(len(self.dataset), bool)
        if not ranks.most(len(journal.found)):
            return done
        rows = np.zeros((len(self.dataset), len(self._score_columns) + 1))
        for indices, columns in journal.found:
            rows[indices, -1] = 1
            for place, name in enumerate(self._score_columns):
                rows[indices, place] = columns[name]
        rows = ranks.total(rows)
        done = rows[:, -1] > 0
        self.store.write(
            np.flatnonzero(done),
            {name: rows[done, place].astype(np.float32) for place, name in enumerate(self._score_columns)},
        )
        logger.warning("%d of %d samples were scored before the interruption.", done.sum(), len(self._candidates))
        return done

    def explain(self, index: int, epoch: int) -> str:
        """Why a sample was, or was not, in an epoch: which policy left it out, and the numbers it went by.

        Args:
            index: row of the data set.
            epoch: one that was planned in this process.

        Raises:
            ValueError: there is no such row, or the epoch was not planned here.
        """
        if not 0 <= index < len(self.dataset):
            raise ValueError(f"There is no sample {index}; the data set has {len(self.dataset)} rows, from 0.")
        planned = [summary.epoch for summary in self.summaries]
        if epoch not in planned:
            raise ValueError(f"Epoch {epoch} was not planned in this process; {sorted(set(planned))} were.")
        if not self.dataset.scorable[index]:
            return f"Sample {index} is in no epoch: it has no response token to score."
        plan = self.plans[len(planned) - 1 - planned[::-1].index(epoch)]
        places = np.flatnonzero(plan.indices == index)
        if len(places):
            where = ", ".join(str(place) for place in places.tolist())
            return (
                f"Sample {index} was in epoch {epoch}, at place {where} of {len(plan)}, with weight "
                f"{plan.weights[places[0]]:.3g}: every policy kept it."
            )
        scores = self.store.before(epoch + 1)
        before = EpochPlan(indices=self._candidates)
        for policy, after in trace_policies(self.policies, before, self._pool(epoch, scores), self.seed):
            if index not in after.indices:
                return f"Sample {index} was not in epoch {epoch}: left out by {policy!r}. " + self._standing(
                    index, policy, before, scores
                )
            before = after
        if planned.count(epoch) > 1:
            return (
                f"Sample {index} was not in epoch {epoch}: the policies keep it by the scores of when the "
                "epoch was last planned, but others of its group, or too many others, had been handed out before."
            )
        return f"Sample {index} was not in epoch {epoch}: the plan was cut to {len(plan)} samples before its place."

    def _standing(self, index: int, policy: Policy, plan: EpochPlan, scores: Mapping[str, FloatArray]) -> str:
        """How a sample stood among those that a policy was given: overall, and within its values of the columns."""
        rivals = {"all": np.unique(plan.indices)}
        for name in policy.uses_columns:
            column = self._columns[name]
            same = column.codes[rivals["all"]] == column.codes[index]
            rivals[f"those with {name} = {column.values[column.codes[index]]!r}"] = rivals["all"][same]
        sentences = []
        for metric in policy.uses_metrics:
            score = scores[metric][index]
            if np.isnan(score):
                sentences.append(f"It has no {metric}: it is too long for the student, or its logits were not finite.")
                continue
            sentences.append(f"Its {metric} is {score:.4g}.")
            sign = -1 if self.metrics[metric].higher_is_better else 1
            for whose, indices in rivals.items():
                badness = sign * scores[metric][indices]
                best = indices[np.nanargmin(badness)]
                sentences.append(
                    f"Among {whose} it is number {1 + int((badness < sign * score).sum())} of {len(indices)}; the "
                    f"best, sample {best}, has {scores[metric][best]:.4g}."
                )
        return " ".join(sentences)

    # ---- State ----

    def state_dict(self) -> dict[str, Any]:
        """Plan, epoch and latest scores as plain JSON values, the arrays compressed.

        Goes where the host keeps its state; `accelerator.register_for_checkpointing(curriculum)` takes it as it is.
        """
        plan = self.sampler.plan
        state = {
            "version": STATE_VERSION,
            "num_samples": self.num_samples,
            "epoch": self.epoch,
            "plan": None if plan is None else {"indices": pack(plan.indices), "weights": pack(plan.weights)},
            "trained": pack(self._trained_before),
            "spent": dataclasses.asdict(self.spent),
            "scores": self.store.state_dict(),
        }
        return {**state, "digest": digest(state)}

    def load_state_dict(
        self, state: Mapping[str, Any], *, accept_changes: bool = False, epoch_over: bool = False
    ) -> None:
        """Take back what `state_dict` gave: scores and plan are loaded, never computed again.

        Args:
            state: what `state_dict` gave.
            accept_changes: go on although metrics, policies or seed are others: the rest of the epoch that was begun
                trains its plan, the next is scored and planned by what is given here. Another data set is accepted
                only if `epoch_over`, because a plan counts the rows of its own.
            epoch_over: the plan in the state was trained to its end.

        Raises:
            ValueError: it is damaged, or belongs to another data set or configuration; the message says what differs.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"The curriculum's state has version {state.get('version')}, this library reads {STATE_VERSION}. "
                "Resume with the version of distill_sampler that wrote it."
            )
        if state.get("digest") != digest(state):
            raise ValueError(
                "The curriculum's state is damaged: its content does not have the hash that was written with it. "
                "Resume from another checkpoint."
            )
        if state["num_samples"] != self.num_samples:
            raise ValueError(
                f"The curriculum's state is of epochs of {state['num_samples']} samples, here they have "
                f"{self.num_samples}. Resume with Curriculum(num_samples={state['num_samples']})."
            )
        saved, here = state["scores"]["origin"], self._origin
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
        self.reset()
        if same_data:
            self._trained_before = unpack(state["trained"]).astype(np.int64)
        if same_data and saved["metrics"] == here["metrics"]:
            self.store.load_state_dict({**state["scores"], "origin": here})
            self.spent = Spent(**state["spent"])
        self.epoch = state["epoch"]
        if same_data and state["plan"] is not None:
            indices, weights = (unpack(state["plan"][name]) for name in ("indices", "weights"))
            self.sampler.set_plan(EpochPlan(indices=indices, weights=weights))

    # ---- Parts ----

    @property
    def _score_columns(self) -> list[str]:
        return columns_of(self.metrics.values())

    @property
    def _origin(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset.fingerprint,
            "metrics": [repr(metric) for metric in self.metrics.values()],
            "policies": [repr(policy) for policy in self.policies],
            "rescore": repr(self.rescore),
            "observe": self.observe,
            "seed": self.seed,
        }

    @property
    def _groups(self) -> IntArray:
        """`[samples]` which samples stand for each other: those that a policy chooses among."""
        names = {name for policy in self.policies if (name := getattr(policy, "per", None)) is not None}
        return self._columns[names.pop()].codes if len(names) == 1 else np.arange(len(self.dataset))

    def _values(self, name: str) -> pa.Array:
        column = self.dataset.column(name)
        return pa.DictionaryArray.from_arrays(pa.array(column.codes), pa.array(column.values)).dictionary_decode()

    def _due(self, ranks: Ranks, *, epoch: int, into_epoch: int = 0) -> IntArray:
        """The samples to score now, as far as the budget goes."""
        if not self.store.passes:
            return self._candidates
        if not self.rescore.due(epoch=epoch, into_epoch=into_epoch):
            return self._candidates[:0]
        self.store.observed.merge(ranks)  # what training has shown needs no scoring
        seed = np.random.default_rng([self.seed, len(self.store.passes)]).integers(2**63)
        which = choose(self.rescore, self.store, self._candidates, self.dataset.content_hash, seed=int(seed))
        if self.rescore.max_share is not None:
            self._tick()
            affordable = -ranks.most(-self.spent.affords(self.rescore.max_share))  # by the slowest clock
            which = which[np.cumsum(self.dataset.lengths[which]) <= affordable]
        return np.sort(which)

    def _tick(self) -> float:
        """Count the time since the last tick as the run's. Gives the time of now."""
        now = time.perf_counter()
        self.spent.run += now - self._clock
        self._clock = now
        return now

    def _make_plan(self, epoch: int, scoring: ScoringSummary) -> tuple[EpochPlan, list[str]]:
        """An epoch's plan by the scores of now, at its constant length, and what a person should know of it."""
        notes = []
        if len(scoring.non_finite):
            notes.append(
                f"the student's logits are NaN or infinite for {len(scoring.non_finite)} samples (first: sample "
                f"{scoring.non_finite[0]}); they are not chosen by score."
            )
        planned = self._plan(epoch, self.store.latest)
        plan = self._fit(planned, tolerate=len(scoring.non_finite) + len(scoring.too_long) > 0)
        if len(planned) != len(plan):
            action = "cut at its end" if len(planned) > len(plan) else "completed from its start"
            notes.append(f"the policies gave {len(planned)} samples; the plan was {action} to keep {len(plan)}.")
        return plan, notes

    def _note(self, plan: EpochPlan, step: int, scoring: ScoringSummary, notes: Sequence[str]) -> None:
        assert self.epoch is not None
        self.plans.append(plan)
        self.summaries.append(
            summarise(
                epoch=self.epoch,
                step=step,
                plan=plan,
                metrics=self.metrics,
                scores=self.store.latest,
                teacher=self._teachers,
                scorable=self._candidates,
                num_scored=self.dataset.num_scored,
                scoring=scoring,
                notes=notes,
            )
        )

    def _plan(self, epoch: int, scores: Mapping[str, FloatArray], *, dry_run: bool = False) -> EpochPlan:
        start = EpochPlan(indices=self._candidates)
        return apply_policies(self.policies, start, self._pool(epoch, scores, dry_run=dry_run), self.seed)

    def _pool(self, epoch: int, scores: Mapping[str, FloatArray], *, dry_run: bool = False) -> Pool:
        return Pool(
            epoch=epoch,
            dry_run=dry_run,
            metrics=self.metrics,
            scores=scores,
            columns=self._columns,
            lengths=self.dataset.lengths,
            content_hash=self.dataset.content_hash,
        )

    def _fit(self, plan: EpochPlan, *, tolerate: bool) -> EpochPlan:
        if len(plan) != self.num_samples and self._given_num_samples is None and not tolerate:
            raise ValueError(
                f"The policies gave {len(plan)} samples, but the trainer laid out epochs of {self.num_samples}. With "
                "policies whose number of samples depends on the scores, say how long an epoch is: "
                f"Curriculum(num_samples={len(plan)}) completes shorter plans from their start and cuts longer ones."
            )
        return fit_length(plan, self.num_samples)


def digest(state: Mapping[str, Any]) -> str:
    """16 hex digits of a state's content, its own digest left out."""
    content = {name: value for name, value in state.items() if name != "digest"}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()
