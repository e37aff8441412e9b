"""Limit how much of the plan one teacher may supply."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.keys import random_keys
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan


@documents_fields
@dataclass(frozen=True)
class MixTeachers(Policy):
    """Drop samples of the most frequent teachers until none has more than `max_share`. The order of the plan stays.

    In the RSR paper (arXiv:2601.14249) one teacher supplies 45-77 % of each selected set. As few samples as possible
    are dropped; which ones is redrawn each epoch. Trade-off: prompts that only these teachers answered are lost.
    """

    max_share: float
    """Largest share of the resulting plan that one teacher may have, in (0, 1]."""
    teacher: str = "teacher"
    """Column that names the teacher."""

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
            digits = 2 + len(str(num_teachers))
            least = math.ceil(10**digits / num_teachers) / 10**digits  # rounded up: 1 / 3 -> 0.334
            raise ValueError(
                f"MixTeachers(max_share={self.max_share}): the plan has {num_teachers} teachers, and they cannot all "
                f"have so small a share. Use {math.ceil(1 / share)} teachers, or max_share={least}."
            )
        # find the largest number of samples per teacher that respects the share: `low` does, `high` does not
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
