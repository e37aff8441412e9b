"""From scores to an epoch's plan: the policies in order, at the constant length that the trainer expects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distill_sampler.dataset import ScoredDataset
from distill_sampler.planning.packs import PackCounts, Packing, pack_plan
from distill_sampler.planning.sampler import fit_length, replace_rest
from distill_sampler.planning.why import ExplainedPlan, PolicyFacts, plan_with_reasons
from distill_sampler.policies import apply_one_by_one
from distill_sampler.policies.best_of import refuse_single_responses
from distill_sampler.policies.stages import turning_points, unfolded
from distill_sampler.protocols import Metric, Policy, Pool
from distill_sampler.reading.reduce import columns_of
from distill_sampler.serialize import as_typed
from distill_sampler.types import EncodedColumn, EpochPlan, FloatArray, IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedEpoch:
    """A plan of an epoch, and how it came about."""

    epoch: int
    step: int
    """Optimizer steps that the student had taken when the plan was made."""
    plan: EpochPlan
    left_out_by: IntArray
    """`[samples]` the index of the policy that left each sample out (`why.plan_with_reasons`)."""
    start: int = 0
    """The position from which a replanned epoch changed; 0 for an epoch's first plan."""
    passes: int = 0
    """How many scoring passes of the run the plan is based on."""
    packed: PackCounts | None = None
    """What its packs hold, those behind `start` if the plan has one; None: it has no packs, or is of a record."""


class Planner:
    """Makes the plans of a run. Pure: equal arguments give equal plans.

    Args:
        dataset: the data set to plan.
        metrics: the scored metrics, by name.
        policies: applied in order, starting from "every candidate once, in the data set's order".
        seed: seed of all random choices.
        num_samples: length of every epoch. None: the length that the policies give if no sample lacks a score.
        plans_rest: whether epochs will be replanned midway. All policies must then have the same groups.
        packing: how plans are packed; None: samples are trained one by one.

    Raises:
        ValueError: a column that a policy needs is missing, no sample would be left, or policies disagree about groups.
    """

    def __init__(
        self,
        dataset: ScoredDataset,
        metrics: Mapping[str, Metric],
        policies: Sequence[Policy],
        *,
        seed: int,
        num_samples: int | None,
        plans_rest: bool = False,
        packing: Packing | None = None,
    ) -> None:
        self.dataset = dataset
        self.metrics = metrics
        policies = self.policies = unfolded(policies)
        self.seed = seed
        self.candidates = np.flatnonzero(dataset.scorable)
        names = dict.fromkeys(name for policy in policies for name in policy.uses_columns)
        self.columns: dict[str, EncodedColumn] = {name: dataset.column(name, complete=True) for name in names}
        refuse_single_responses(policies, self.columns)
        self.facts = [PolicyFacts.of(policy) for policy in policies]
        self.groups = self._groups(plans_rest)
        """`[samples]` equal numbers for samples of the same group, within which a policy chooses."""
        self._in_tokens = packing is not None and packing.num_packs is not None
        self._length_given = num_samples is not None or self._in_tokens
        if packing is not None:
            _refuse_longer(dataset.lengths, self.candidates, packing)
        for policy in policies:
            if policy.length_depends_on_scores and not self._length_given:
                raise ValueError(
                    f"{as_typed(policy)} keeps a number of samples that depends on their scores, and trainers lay out "
                    "their epochs before anything is scored. Say how long an epoch is: Curriculum(num_samples=…) "
                    "completes shorter plans from their start and cuts longer ones"
                    + (" (num_tokens=… does that in packs)." if packing else ".")
                )
        # equal scores for all samples show the plan's length before anything is scored
        self.num_samples = num_samples or len(self._dry_run(lambda: np.ones(len(dataset), np.float32)))
        """Samples of the policies' plan of every epoch; unless epochs are given in tokens, then it is a guess."""
        self.packing = None if packing is None else replace(packing, num_packs=self._num_packs(packing))
        turning_points_of_run = turning_points(policies)
        for epoch, step in turning_points_of_run if not self._length_given else ():
            length = len(self._dry_run(lambda: np.ones(len(dataset), np.float32), epoch=epoch, step=step))
            if length != self.num_samples:
                raise ValueError(
                    f"The policies give {self.num_samples} samples at the start of the run and {length} later, when a "
                    "stage begins or an argument has moved. Trainers lay out all epochs at the start, so say how long "
                    "an epoch is: Curriculum(num_samples=…) completes shorter plans from their start and cuts longer "
                    "ones at their end."
                )
        # different made-up scores show whether the policies set weights, which some hosts cannot apply
        made_up = (dataset.content_hash >> np.uint64(40)) / 2.0**24 + 1
        self.gives_weights = any(
            bool((self._dry_run(lambda: made_up, epoch=epoch, step=step).weights != 1).any())
            for epoch, step in ((0, 0), *turning_points_of_run)
        )
        self.samples_to_score = self._samples_to_score()
        """`[n]` the candidates whose scores some policy reads, ascending; all where no policy reads any."""

    def pool(self, epoch: int, scores: Mapping[str, FloatArray], **known: Any) -> Pool:
        """What the policies get to see.

        Args:
            epoch: the epoch to plan.
            scores: by column, `[samples]` each.
            known: other fields of `Pool`.
        """
        return Pool(
            epoch=epoch,
            metrics=self.metrics,
            scores=scores,
            columns=self.columns,
            lengths=self.dataset.lengths,
            content_hash=self.dataset.content_hash,
            cut=self.dataset.cut,
            **known,
        )

    def plan(self, pool: Pool, *, tolerate: bool = False) -> tuple[PlannedEpoch, list[str]]:
        """Plan an epoch at the constant length.

        Args:
            pool: what is known about the samples.
            tolerate: if the policies give another length, complete or cut the plan even though the user set no length,
                because samples without a score explain the difference.

        Returns:
            The plan, and notes for the user.

        Raises:
            ValueError: the policies give another length than the epochs have.
        """
        whole, notes = self._plan_of_samples(pool, tolerate=tolerate)
        if self.packing is None:
            return whole, notes
        plan, packed = pack_plan(whole.plan, self.dataset.lengths, self.packing)
        return replace(whole, plan=plan, packed=packed), [*notes, packed.sentence()]

    def _plan_of_samples(self, pool: Pool, *, tolerate: bool) -> tuple[PlannedEpoch, list[str]]:
        """See `plan`. It is not packed yet."""
        policy_plan, left_out_by = plan_with_reasons(self.policies, self.candidates, pool, self.seed)
        if len(policy_plan) != self.num_samples and not self._length_given and not tolerate:
            raise ValueError(
                f"The policies gave {len(policy_plan)} samples, but the trainer expects {self.num_samples} per epoch. "
                "If the number of samples depends on the scores, set the length of an epoch: "
                f"Curriculum(num_samples={len(policy_plan)}) completes shorter plans from their start and cuts longer "
                "ones at their end."
            )
        plan = policy_plan if self._in_tokens else fit_length(policy_plan, self.num_samples)
        notes = []
        if len(policy_plan) != len(plan):
            action = "cut at its end" if len(policy_plan) > len(plan) else "completed from its start"
            notes.append(f"the policies gave {len(policy_plan)} samples; the plan was {action} to have {len(plan)}.")
        return PlannedEpoch(epoch=pool.epoch, step=pool.step, plan=plan, left_out_by=left_out_by), notes

    def plan_rest(
        self, current: EpochPlan, start: int, pool: Pool, *, tolerate: bool = False
    ) -> tuple[PlannedEpoch, list[str]]:
        """Replan the current epoch from position `start` on; see `plan`.

        The policies plan the whole epoch from the current scores. Samples before `start` count towards it.
        """
        whole, notes = self._plan_of_samples(pool, tolerate=tolerate)
        counts: list[PackCounts] = []

        def pack(rest: EpochPlan, num_packs: int) -> EpochPlan:
            assert self.packing is not None
            packing = replace(self.packing, num_packs=num_packs)
            packed, of_rest = pack_plan(rest, self.dataset.lengths, packing)
            counts.append(of_rest)
            return packed

        plan = replace_rest(current, whole.plan, start, self.groups, None if self.packing is None else pack)
        notes = [f"replanned from position {start} on.", *notes, *(of_rest.sentence() for of_rest in counts)]
        return replace(whole, plan=plan, start=start, packed=counts[0] if counts else None), notes

    def explained(
        self, planned: PlannedEpoch, scores: Mapping[str, FloatArray], missing: Mapping[str, IntArray]
    ) -> ExplainedPlan:
        """A plan with everything that is needed to explain it."""
        return ExplainedPlan(
            policies=self.facts,
            plan=planned.plan,
            left_out_by=planned.left_out_by,
            epoch=planned.epoch,
            step=planned.step,
            start=planned.start,
            scores=scores,
            higher_is_better={name: metric.higher_is_better for name, metric in self.metrics.items()},
            columns=self.columns,
            lengths=self.dataset.lengths,
            content_hash=self.dataset.content_hash,
            cut=self.dataset.cut,
            missing=missing,
        )

    def _dry_run(self, scores: Any, *, epoch: int = 0, step: int = 0) -> EpochPlan:
        columns = {name: scores() for name in columns_of(self.metrics.values())}
        return plan_with_reasons(
            self.policies, self.candidates, self.pool(epoch, columns, step=step, dry_run=True), self.seed
        )[0]

    @property
    def num_rows(self) -> int:
        """Rows of every epoch: packs, or without packs, samples."""
        return self.num_samples if self.packing is None else self.packing.num_packs or 0

    def _num_packs(self, packing: Packing) -> int:
        if packing.num_packs is not None:
            return packing.num_packs
        plan = fit_length(self._dry_run(lambda: np.ones(len(self.dataset), np.float32)), self.num_samples)
        return pack_plan(plan, self.dataset.lengths, packing)[1].packs

    def _samples_to_score(self) -> IntArray:
        constant = {name: np.ones(len(self.dataset), np.float32) for name in columns_of(self.metrics.values())}
        read = np.zeros(len(self.dataset), bool)
        for epoch, step in ((0, 0), *turning_points(self.policies)):  # stages may read the scores of other samples
            pool = self.pool(epoch, constant, step=step, dry_run=True)
            plan = EpochPlan(indices=self.candidates)
            for policy, after in apply_one_by_one(self.policies, plan, pool, self.seed):
                if policy.uses_metrics:
                    needed = policy.samples_to_score(plan, pool)
                    if needed is None:
                        return self.candidates
                    read[needed] = True
                plan = after
        return np.flatnonzero(read) if read.any() else self.candidates

    def _groups(self, plans_rest: bool) -> IntArray:
        declared = {policy.group_by: type(policy).__name__ for policy in self.policies if policy.group_by is not None}
        if not declared:
            return np.arange(len(self.dataset))
        (first, kind), *others = declared.items()
        groups = self.columns[first].codes
        for name, other in others if plans_rest else ():
            if not _same_groups(groups, self.columns[name].codes):
                raise ValueError(
                    f"{kind} chooses within groups of equal '{first}', but {other} within groups of equal '{name}'. "
                    "With Rescore(every_steps=), a sample that was trained on counts for its group, so all policies "
                    "must have the same groups. Use one column for both, or leave out every_steps=."
                )
        return groups


def _same_groups(left: IntArray, right: IntArray) -> bool:
    """Whether two columns define the same groups."""
    # codes are numbered by first appearance, so equal groups have equal codes
    return bool(np.array_equal(left, right))


def _refuse_longer(lengths: IntArray, candidates: IntArray, packing: Packing) -> None:
    """Refuse samples that no pack has room for."""
    longer = candidates[lengths[candidates] > packing.capacity]
    if len(longer):
        raise ValueError(
            f"{packing.argument}={packing.capacity}: {len(longer)} of {len(candidates)} samples have more tokens, the "
            f"longest {lengths[longer].max()} (first: row {longer[0]}). Make the packs larger, leave these samples out "
            'of the data set, or say what to do with them: attach(…, pack_overlong="truncate") or "split".'
        )
