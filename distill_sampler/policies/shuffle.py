"""A fresh random order each epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.keys import random_keys
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan


@documents_fields
@dataclass(frozen=True)
class Shuffle(Policy):
    """Shuffle the plan, anew each epoch, the same on every rank. All orders of distinct samples are equally likely.

    With `bucket`, samples move only within their bucket: batches get mixed while a curriculum stays in order at the
    larger scale. Small buckets keep more of the order, large ones mix better.
    """

    bucket: int | None = None
    """How many consecutive samples are shuffled together. None: the whole plan."""

    def __post_init__(self) -> None:
        if self.bucket is not None and self.bucket < 1:
            raise ValueError(
                f"Shuffle(bucket={self.bucket}): give at least 1 sample, or None to shuffle the whole plan."
            )

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        keys = random_keys(plan, pool, rng)
        if self.bucket is not None:
            buckets = np.arange(len(plan), dtype=np.uint64) // np.uint64(self.bucket)
            bits = (len(plan) // self.bucket).bit_length()  # the bucket's number in the high bits, random bits below
            keys = buckets << np.uint64(64 - bits) | keys >> np.uint64(bits) if bits else keys
        return plan.take(np.argsort(keys, kind="stable"))
