"""Why a sample is in an epoch or not: the one place that says so, for the trainer, the report and the command line.

Whoever plans keeps for each sample which policy left it out. From that, the scores and the policies' own declarations
comes one sentence for each sample; no policy is run again to explain itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from distill_sampler.policies import apply_one_by_one
from distill_sampler.policies.keys import best_first_order, occurrence
from distill_sampler.serialize import as_typed
from distill_sampler.types import BoolArray, Column, EpochPlan, FloatArray, IntArray, Missing, Policy, Pool

KEPT = -1
"""In `left_out_by`: every policy kept the sample."""
NO_CANDIDATE = -2
"""In `left_out_by`: the sample has no token to score, so no policy was asked."""


@dataclass(frozen=True, kw_only=True)
class PolicyFacts:
    """What explaining needs to know of a policy, so that a file can be explained without the policy's code."""

    text: str
    """The policy as one would type it."""
    metrics: tuple[str, ...]
    columns: tuple[str, ...]
    group_by: str | None

    @classmethod
    def of(cls, policy: Policy) -> PolicyFacts:
        return cls(
            text=as_typed(policy),
            metrics=tuple(policy.uses_metrics),
            columns=tuple(policy.uses_columns),
            group_by=policy.group_by,
        )

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> PolicyFacts:
        """What `to_json` gave."""
        return cls(
            text=str(told["text"]),
            metrics=tuple(told["metrics"]),
            columns=tuple(told["columns"]),
            group_by=told["group_by"],
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @property
    def kind(self) -> str:
        """The policy's class."""
        return self.text.partition("(")[0]


def plan_with_reasons(
    policies: Sequence[Policy], candidates: IntArray, pool: Pool, seed: int
) -> tuple[EpochPlan, IntArray]:
    """The plan that policies make of the candidates, and who left out whom.

    Returns:
        The plan, and `[samples]` the position of the policy that left each sample out; `KEPT`, or `NO_CANDIDATE`.

    Raises:
        ValueError: a policy names a metric or column that is not there, or leaves nothing.
    """
    plan = EpochPlan(indices=candidates)
    left_out_by = np.full(len(pool.lengths), NO_CANDIDATE, np.int64)
    left_out_by[candidates] = KEPT
    for place, (_, after) in enumerate(apply_one_by_one(policies, plan, pool, seed)):
        gone = left_out_by == KEPT
        gone[after.indices] = False
        left_out_by[gone] = place
        plan = after
    return plan, left_out_by


@dataclass(frozen=True, kw_only=True, eq=False)
class ExplainedPlan:
    """A plan, what it was made of, and the reason for each sample."""

    policies: Sequence[PolicyFacts]
    plan: EpochPlan
    left_out_by: IntArray
    """`[samples]` see `plan_with_reasons`."""
    start: int = 0
    """Places of the plan that were handed out before its rest was planned anew."""
    scores: Mapping[str, FloatArray]
    """What the policies went by, `[samples]` each."""
    higher_is_better: Mapping[str, bool]
    """By metric."""
    columns: Mapping[str, Column]
    lengths: IntArray
    content_hash: Any
    missing: Mapping[str, IntArray] = field(default_factory=dict)
    """By metric, `[samples]` why there is no score (`Missing`)."""

    @classmethod
    def from_policies(cls, policies: Sequence[Policy], candidates: IntArray, pool: Pool, seed: int) -> ExplainedPlan:
        """What policies choose from a pool.

        Raises:
            ValueError: a policy names a metric or column that is not there, or leaves nothing.
        """
        plan, left_out_by = plan_with_reasons(policies, candidates, pool, seed)
        return cls(
            policies=[PolicyFacts.of(policy) for policy in policies],
            plan=plan,
            left_out_by=left_out_by,
            scores=pool.scores,
            higher_is_better={name: metric.higher_is_better for name, metric in pool.metrics.items()},
            columns=pool.columns,
            lengths=pool.lengths,
            content_hash=pool.content_hash,
        )

    @cached_property
    def in_plan(self) -> BoolArray:
        """`[samples]` True where the plan has the sample."""
        found = np.zeros(len(self.left_out_by), bool)
        found[self.plan.indices] = True
        return found

    def reason(self, sample: int) -> str:
        """Why a sample is in the plan, or is not: the end of a sentence."""
        by = int(self.left_out_by[sample])
        if by == NO_CANDIDATE:
            return "it has no response token to score"
        if self.in_plan[sample]:
            if by != KEPT:
                return "trained on before the rest of the epoch was planned anew"
            deciding = [place for place, policy in enumerate(self.policies) if policy.metrics]
            if not deciding:
                return f"kept by {', '.join(self._names)}" if self.policies else "kept: there is no policy"
            return f"kept by {self._names[deciding[0]]}{self._standing(sample, deciding[0])}"
        if by != KEPT:
            return f"left out by {self._names[by]}{self._standing(sample, by)}"
        if self.start:
            return (
                "the policies keep it by its scores when the rest of the epoch was planned anew, but others of its "
                "group, or too many others, had been trained on before"
            )
        return f"the plan was cut to {len(self.plan)} samples before its place"

    def explanation(self, sample: int, epoch: int) -> str:
        """Why a sample is in an epoch's plan, or is not: a whole sentence."""
        places = np.flatnonzero(self.plan.indices == sample)
        if not len(places):
            return f"Sample {sample} was not in epoch {epoch}: {self.reason(sample)}."
        where = ", ".join(map(str, places.tolist()))
        weight = f"{self.plan.weights[places[0]]:.3g}"
        return (
            f"Sample {sample} was in epoch {epoch}, at place {where} of {len(self.plan)}, with weight {weight}: "
            f"{self.reason(sample)}."
        )

    @cached_property
    def _names(self) -> list[str]:
        """The policies by their class; in full where a class is there twice."""
        kinds = [policy.kind for policy in self.policies]
        return [p.kind if kinds.count(p.kind) == 1 else p.text for p in self.policies]

    def _standing(self, sample: int, place: int) -> str:
        """How a sample stood among those that a policy was given."""
        policy = self.policies[place]
        if not policy.metrics:
            values = [f"{name} = {self._value(name, sample)}" for name in policy.columns]
            return f": {', '.join(values or [f'{self.lengths[sample]} tokens'])}"
        for name in policy.metrics:
            if np.isnan(self.scores[name][sample]):
                return f": it has no {name}{self._because(name, sample)}"
        if len(policy.metrics) > 1:
            return f": {', '.join(f'{name} {self.scores[name][sample]:.4g}' for name in policy.metrics)}"
        (name,) = policy.metrics
        score = self.scores[name]
        number, size, best = self._standings(place)
        rivals = str(size[sample])
        if policy.group_by is not None:
            rivals += f" with {policy.group_by} = {self._value(policy.group_by, sample)}"
        others = [f"{column} = {self._value(column, sample)}" for column in policy.columns if column != policy.group_by]
        whose = f" ({', '.join(others)})" if others else ""
        first = "" if number[sample] == 0 else f"; the best, sample {best[sample]}, has {score[best[sample]]:.4g}"
        return f": its {name} {score[sample]:.4g} is number {number[sample] + 1} of {rivals}{whose}{first}"

    def _because(self, metric: str, sample: int) -> str:
        code = self.missing.get(metric)
        reason = Missing(int(code[sample])).reason if code is not None else ""
        return f" ({reason})" if reason else ""

    def _standings(self, place: int) -> tuple[IntArray, IntArray, IntArray]:
        """For the policy at `place`, `[samples]` each: the sample's rank among its rivals (from 0), how many rivals
        there are, and which is best. Rivals are the samples that the policy was given, within the group if it has one.
        """
        if place not in self._ranked:
            policy = self.policies[place]
            given = np.flatnonzero((self.left_out_by == KEPT) | (self.left_out_by >= place))
            (name,) = policy.metrics
            goodness = self.scores[name] if self.higher_is_better[name] else -self.scores[name]
            groups = np.zeros(len(goodness), np.int64)
            if policy.group_by is not None:
                groups = self.columns[policy.group_by].codes
            order = given[best_first_order(goodness[given], self.content_hash[given], groups[given])]
            number = np.zeros(len(goodness), np.int64)
            number[order] = occurrence(groups[order])
            first = np.zeros(int(groups.max(initial=0)) + 1, np.int64)
            best = order[number[order] == 0]
            first[groups[best]] = best
            size = np.bincount(groups[given], minlength=len(first))
            self._ranked[place] = number, size[groups], first[groups]
        return self._ranked[place]

    @cached_property
    def _ranked(self) -> dict[int, tuple[IntArray, IntArray, IntArray]]:
        return {}

    def _value(self, name: str, sample: int) -> str:
        column = self.columns[name]
        return str(column.values[column.codes[sample]])


def facts_of(policies: Iterable[Policy]) -> list[dict[str, Any]]:
    """What to write to a file, so that it can be explained later."""
    return [PolicyFacts.of(policy).to_json() for policy in policies]
