"""Put samples of similar length into the same batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.keys import HALF, sort_by
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan


@documents_fields
@dataclass(frozen=True)
class GroupByLength(Policy):
    """Sort each stretch of `mega_batch` samples by length, longest first, so that batches need little padding.

    Samples move only within their stretch, so a curriculum stays in order at the larger scale. Large stretches save
    more padding, small ones keep more of the order; transformers' `group_by_length` uses 50 batches. Ties are broken by
    content hash.
    """

    mega_batch: int
    """How many consecutive samples are sorted together: a few dozen global batches."""

    def __post_init__(self) -> None:
        if self.mega_batch < 1:
            raise ValueError(f"GroupByLength(mega_batch={self.mega_batch}): give at least 1 sample.")

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        stretch = np.arange(len(plan), dtype=np.uint64) // np.uint64(self.mega_batch)
        shortness = np.uint64(2**32 - 1) - pool.lengths[plan.indices].astype(np.uint64)
        content = pool.content_hash[plan.indices]
        return plan.take(sort_by(stretch << HALF | shortness, (content, 32), (content, 0)))
