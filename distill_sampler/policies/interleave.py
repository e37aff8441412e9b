"""Spread teachers or domains evenly through the epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.keys import descending_bits, occurrence, sort_by
from distill_sampler.types import EpochPlan, Policy, Pool


@documents_fields
@dataclass(frozen=True)
class Interleave(Policy):
    """Give every stretch of the epoch its share of each value of a column; within a value the order of the plan stays.

    The j-th of n samples of a value goes to (j + ½)/n of the epoch, so a curriculum runs through every value at the
    same pace. For batches that mix domains without the luck of a shuffle. Trade-off: the order between values is lost.
    """

    column: str
    """The column, for example `"teacher"` or `"domain"`."""

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        if not len(plan):
            return plan
        values = pool.column(self.column).codes[plan.indices]
        content = pool.content_hash[plan.indices]
        place = (occurrence(values) + 0.5) / np.bincount(values)[values]
        # Values that meet at one place take turns in the order of their smallest content, not of their codes.
        smallest = np.full(values.max() + 1, 2**64 - 1, np.uint64)
        np.minimum.at(smallest, values, content)
        turn = smallest[values]
        return plan.take(sort_by(descending_bits(-place), (turn, 32), (turn, 0)))
