"""From scores to an epoch's plan: policies in order, at the one length that the trainer counts on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distill_sampler.dataset import ScoredDataset
from distill_sampler.planning.sampler import fit_length, replace_rest
from distill_sampler.planning.why import ExplainedPlan, PolicyFacts, plan_with_reasons
from distill_sampler.policies import apply_one_by_one
from distill_sampler.reading.reduce import columns_of
from distill_sampler.types import Column, EpochPlan, FloatArray, IntArray, Metric, Policy, Pool


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedEpoch:
    """An epoch's plan, and what was decided on the way."""

    epoch: int
    step: int
    """Optimizer steps that the student had taken when it was made."""
    plan: EpochPlan
    left_out_by: IntArray
    """`[samples]` the position of the policy that left each sample out (`why.plan_with_reasons`)."""
    start: int = 0
    """Places that were handed out before: the plan changed from here on."""
    passes: int = 0
    """Scoring passes of the run that it goes by."""


class Planner:
    """Makes the plans of a run. Pure: equal arguments give equal plans.

    Args:
        dataset: what is planned.
        metrics: what is scored, by name.
        policies: applied in order to "every candidate once, in the data set's order".
        seed: of everything random.
        num_samples: length of every epoch; None: what the policies give if no sample lacks a score.
        plans_rest: whether the rest of an epoch is to be planned anew, which needs to know the groups.

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
    ) -> None:
        self.dataset = dataset
        self.metrics = metrics
        self.policies = tuple(policies)
        self.seed = seed
        self.candidates = np.flatnonzero(dataset.scorable)
        names = dict.fromkeys(name for policy in policies for name in policy.uses_columns)
        self.columns: dict[str, Column] = {name: dataset.column(name, complete=True) for name in names}
        self.facts = [PolicyFacts.of(policy) for policy in policies]
        self.groups = self._groups(plans_rest)
        """`[samples]` equal numbers for samples that stand for each other: those that a policy chooses among."""
        self._length_given = num_samples is not None
        # with equal scores for all, the policies give the plan's length before there are scores
        self.num_samples = num_samples or len(self._dry_run(lambda: np.ones(len(dataset), np.float32)))
        # with made-up scores that differ, they show whether they weight: hosts that cannot apply weights refuse then
        made_up = (dataset.content_hash >> np.uint64(40)) / 2.0**24 + 1
        self.gives_weights = bool((self._dry_run(lambda: made_up).weights != 1).any())
        self.samples_to_score = self._samples_to_score()
        """`[n]` the candidates whose scores some policy reads, ascending; all where no policy reads any."""

    def pool(self, epoch: int, scores: Mapping[str, FloatArray], **known: Any) -> Pool:
        """What the policies get to see.

        Args:
            epoch: the epoch that is planned.
            scores: `[samples]` each.
            known: other fields of `Pool`.
        """
        return Pool(
            epoch=epoch,
            metrics=self.metrics,
            scores=scores,
            columns=self.columns,
            lengths=self.dataset.lengths,
            content_hash=self.dataset.content_hash,
            **known,
        )

    def plan(self, pool: Pool, *, tolerate: bool = False) -> tuple[PlannedEpoch, list[str]]:
        """An epoch's plan at its constant length, and sentences that a person should read.

        Args:
            pool: what is known of the samples.
            tolerate: complete or cut a plan of another length although nobody gave the length, because samples without
                a score explain it.

        Raises:
            ValueError: the plan has another length than the epochs are laid out for.
        """
        made, left_out_by = plan_with_reasons(self.policies, self.candidates, pool, self.seed)
        if len(made) != self.num_samples and not self._length_given and not tolerate:
            raise ValueError(
                f"The policies gave {len(made)} samples, but the trainer laid out epochs of {self.num_samples}. With "
                "policies whose number of samples depends on the scores, say how long an epoch is: "
                f"Curriculum(num_samples={len(made)}) completes shorter plans from their start and cuts longer ones."
            )
        plan = fit_length(made, self.num_samples)
        notes = []
        if len(made) != len(plan):
            action = "cut at its end" if len(made) > len(plan) else "completed from its start"
            notes.append(f"the policies gave {len(made)} samples; the plan was {action} to keep {len(plan)}.")
        return PlannedEpoch(epoch=pool.epoch, step=pool.step, plan=plan, left_out_by=left_out_by), notes

    def plan_rest(
        self, begun: EpochPlan, start: int, pool: Pool, *, tolerate: bool = False
    ) -> tuple[PlannedEpoch, list[str]]:
        """The plan of an epoch that was begun, changed from `start` on; see `plan`.

        The policies plan the whole epoch by what is known now; what was handed out already counts towards it.
        """
        whole, notes = self.plan(pool, tolerate=tolerate)
        plan = replace_rest(begun, whole.plan, start, self.groups)
        return replace(whole, plan=plan, start=start), [f"planned anew from sample {start} on.", *notes]

    def explained(
        self, planned: PlannedEpoch, scores: Mapping[str, FloatArray], missing: Mapping[str, IntArray]
    ) -> ExplainedPlan:
        """A plan with what is needed to explain it."""
        return ExplainedPlan(
            policies=self.facts,
            plan=planned.plan,
            left_out_by=planned.left_out_by,
            start=planned.start,
            scores=scores,
            higher_is_better={name: metric.higher_is_better for name, metric in self.metrics.items()},
            columns=self.columns,
            lengths=self.dataset.lengths,
            content_hash=self.dataset.content_hash,
            missing=missing,
        )

    def _dry_run(self, scores: Any) -> EpochPlan:
        columns = {name: scores() for name in columns_of(self.metrics.values())}
        return plan_with_reasons(self.policies, self.candidates, self.pool(0, columns, dry_run=True), self.seed)[0]

    def _samples_to_score(self) -> IntArray:
        constant = {name: np.ones(len(self.dataset), np.float32) for name in columns_of(self.metrics.values())}
        pool = self.pool(0, constant, dry_run=True)
        plan = EpochPlan(indices=self.candidates)
        read: list[IntArray] = []
        for policy, after in apply_one_by_one(self.policies, plan, pool, self.seed):
            if policy.uses_metrics:
                needed = policy.samples_to_score(plan, pool)
                if needed is None:
                    return self.candidates
                read.append(needed)
            plan = after
        return np.unique(np.concatenate(read)) if read else self.candidates

    def _groups(self, plans_rest: bool) -> IntArray:
        declared = {policy.group_by: type(policy).__name__ for policy in self.policies if policy.group_by is not None}
        if not declared:
            return np.arange(len(self.dataset))
        (first, kind), *others = declared.items()
        groups = self.columns[first].codes
        for name, other in others if plans_rest else ():
            if not _same_groups(groups, self.columns[name].codes):
                raise ValueError(
                    f"{kind} chooses within groups of equal '{first}', {other} within groups of equal '{name}', and "
                    "these are not the same groups: when the rest of an epoch is planned anew, it would not be known "
                    "which samples stand for those that were trained. Use one column for both, or leave out "
                    "Rescore(every_steps=)."
                )
        return groups


def _same_groups(left: IntArray, right: IntArray) -> bool:
    """Whether two columns put the same samples together, whatever they call the groups."""
    # codes are numbered by first appearance, and so are equal for equal partitions
    return bool(np.array_equal(left, right))
