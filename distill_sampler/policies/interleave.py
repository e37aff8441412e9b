"""Spread teachers or domains evenly through the epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.keys import descending_bits, occurrence, sort_by
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan


@documents_fields
@dataclass(frozen=True)
class Interleave(Policy):
    """Spread each value of a column evenly through the epoch. Samples with the same value stay in order.

    Sample j of the n samples with a value (j from 0) goes to (j + ½)/n of the epoch, so a curriculum runs through every
    value at the same pace. Use it to mix domains in each batch more evenly than a shuffle does. Trade-off: the order
    between samples of different values is lost.
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
        position = (occurrence(values) + 0.5) / np.bincount(values)[values]
        # break ties between values by their smallest content hash, because codes depend on the order of the rows
        smallest = np.full(values.max() + 1, 2**64 - 1, np.uint64)
        np.minimum.at(smallest, values, content)
        tie_break = smallest[values]
        return plan.take(sort_by(descending_bits(-position), (tie_break, 32), (tie_break, 0)))
