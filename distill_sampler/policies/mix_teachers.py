"""Let no teacher flood the plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.keys import random_keys
from distill_sampler.types import EpochPlan, Policy, Pool


@documents_fields
@dataclass(frozen=True)
class MixTeachers(Policy):
    """Leave out samples of the most frequent teachers until none has more than its share; the order stays.

    In the paper of RSR (arXiv:2601.14249) one teacher supplies 45-77 % of each selected set. Which samples are left
    out is drawn anew each epoch; as few as possible are. Trade-off: the prompts that only they answered leave too.
    """

    max_share: float
    """Largest share of the resulting plan that one teacher may have, in (0, 1]."""
    teacher: str = "teacher"
    """Column that tells who wrote the response."""

    def __post_init__(self) -> None:
        if not 0 < self.max_share <= 1:
            raise ValueError(f"MixTeachers(max_share={self.max_share}): the share must lie in (0, 1]; a half is 0.5.")

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return (self.teacher,)

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        if not len(plan):
            return plan
        teachers = pool.column(self.teacher).codes[plan.indices]
        counts = np.bincount(teachers)
        share = Fraction(self.max_share).limit_denominator(10**9)
        num_teachers = int(np.count_nonzero(counts))
        if share * num_teachers < 1:
            raise ValueError(
                f"MixTeachers(max_share={self.max_share}): {num_teachers} teachers in the plan cannot all stay below "
                f"that share; it needs {math.ceil(1 / share)} teachers, or max_share={1 / num_teachers:.3g}."
            )
        # `low` samples each are few enough, `high` too many. In between: the shares hold up to one number, then fail.
        low, high = 1, int(counts.max()) + 1
        while high - low > 1:
            middle = (low + high) // 2
            fits = middle <= share * int(np.minimum(counts, middle).sum())
            low, high = (middle, high) if fits else (low, middle)
        if low == counts.max():
            return plan
        keys = random_keys(plan, pool, rng)
        order = np.argsort(keys, kind="stable")
        order = order[np.argsort(teachers[order], kind="stable")]
        rank = np.arange(len(plan)) - np.repeat(np.cumsum(counts) - counts, counts)
        return plan.take(np.sort(order[rank < low]))
