"""Policies applied to scores on disk: what is chosen, what is not, and the reason for each, in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.policies import trace_policies
from distill_sampler.policies.keys import best_first, occurrence
from distill_sampler.types import Column, EpochPlan, FloatArray, IntArray, Policy, Pool


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """What policies made of the samples of one pass."""

    policies: Sequence[Policy]
    plan: EpochPlan
    left_out_by: IntArray
    """`[samples]` which of the policies left it out; -1: it is in the plan."""
    pool: Pool

    def reason(self, sample: int) -> str:
        """Why a sample is in the plan, or is not."""
        by = int(self.left_out_by[sample])
        if by >= 0:
            return f"left out by {self._named[by]}{self._standing(sample, by)}"
        deciding = [place for place, policy in enumerate(self.policies) if policy.uses_metrics]
        if not deciding:
            return "kept by " + (", ".join(self._named) if self.policies else "default: nothing selects")
        return f"kept by {self._named[deciding[0]]}{self._standing(sample, deciding[0])}"

    @cached_property
    def _named(self) -> list[str]:
        """The policies by their class; in full where a class is there twice."""
        kinds = [type(policy).__name__ for policy in self.policies]
        return [
            kind if kinds.count(kind) == 1 else short(policy) for kind, policy in zip(kinds, self.policies, strict=True)
        ]

    def _standing(self, sample: int, place: int) -> str:
        policy = self.policies[place]
        found = self._standings[place]
        if found is None:
            values = [f"{name} = {_value(self.pool.columns[name], sample)}" for name in policy.uses_columns]
            return f": {', '.join(values or [f'{self.pool.lengths[sample]} tokens'])}"
        number, size, best, score = found
        name = policy.uses_metrics[0]
        if np.isnan(score[sample]):
            return f": it has no {name}"
        among = f" of {size[sample]}"
        if policy.uses_columns:
            column = policy.uses_columns[-1] if len(policy.uses_columns) > 1 else policy.uses_columns[0]
            among += f" with {column} = {_value(self.pool.columns[column], sample)}"
        rival = "" if number[sample] == 0 else f"; the best has {score[best[sample]]:.3f}"
        return f": {name} {score[sample]:.3f} is number {number[sample] + 1}{among}{rival}"

    @cached_property
    def _standings(self) -> list[tuple[IntArray, IntArray, IntArray, FloatArray] | None]:
        """For each policy that reads one metric: each sample's place, how many rivals it has, their best, scores."""
        return [self._ranked(policy) for policy in self.policies]

    def _ranked(self, policy: Policy) -> tuple[IntArray, IntArray, IntArray, FloatArray] | None:
        if len(policy.uses_metrics) != 1:
            return None
        scores = self.pool.scores[policy.uses_metrics[0]]
        groups = np.zeros(len(scores), np.int64)
        if policy.uses_columns:
            groups = self.pool.columns[policy.uses_columns[-1]].codes
        order = best_first(self.pool.goodness(policy.uses_metrics[0]), self.pool.content_hash, groups)
        number = np.empty(len(order), np.int64)
        number[order] = occurrence(groups[order])
        first = np.zeros(int(groups.max()) + 1, np.int64)
        first[groups[order[number[order] == 0]]] = order[number[order] == 0]
        return number, np.bincount(groups)[groups], first[groups], scores


def select(scores: Scores, policies: Sequence[Policy], *, seed: int = 0, epoch: int | None = None) -> Selection:
    """Apply policies to one pass of the scores (the last, if `epoch` is None).

    Raises:
        ValueError: a policy names a metric or column that is not there, or leaves nothing.
    """
    needed = dict.fromkeys(name for policy in policies for name in policy.uses_columns)
    columns = {name: column for name in needed if (column := scores.column(name, epoch=epoch)) is not None}
    lengths = scores.integers("length", epoch=epoch)
    tokens = scores.integers("num_tokens", epoch=epoch)
    hashes = scores.hashes(epoch=epoch)
    if lengths is None:
        lengths = np.zeros(len(hashes), np.int64) if tokens is None else tokens
    pool = Pool(
        epoch=scores.epochs[-1] if epoch is None else epoch,
        metrics=scores.metrics,
        scores=scores.numbers(epoch=epoch),
        columns=columns,
        lengths=lengths,
        content_hash=hashes,
    )
    before = np.ones(len(hashes), bool) if tokens is None else tokens > 0
    plan = EpochPlan(indices=np.flatnonzero(before))
    left_out_by = np.full(len(hashes), -1)
    left_out_by[~before] = 0
    for place, (_, after) in enumerate(trace_policies(policies, plan, pool, seed)):
        gone = np.ones(len(hashes), bool)
        gone[after.indices] = False
        left_out_by[gone & (left_out_by < 0)] = place
        plan = after
    return Selection(policies=tuple(policies), plan=plan, left_out_by=left_out_by, pool=pool)


def short(policy: Any) -> str:
    """A policy as one would type it: `BestOf('rank_surprisal_ratio', per='prompt_id')`, without defaults."""
    said = []
    for place, field in enumerate(fields(policy)):
        value = getattr(policy, field.name)
        if field.default is MISSING or value != field.default:
            said.append(repr(value) if place == 0 else f"{field.name}={value!r}")
    return f"{type(policy).__name__}({', '.join(said)})"


def _value(column: Column, sample: int) -> str:
    return str(column.values[column.codes[sample]])
