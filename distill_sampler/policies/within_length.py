"""Drop samples that are too short or too long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan


@documents_fields
@dataclass(frozen=True)
class WithinLength(Policy):
    """Keep the samples whose number of tokens, prompt included, is within bounds, in the plan's order.

    Long traces cause most of the cost; the RSR paper uses no length filter. Trade-off: long responses often answer the
    hard prompts. Length alone is also a strong way to select: the longest response reaches 57.9 where provenance
    tracing reaches 58.7 (arXiv:2512.20908).
    """

    min_tokens: int | None = None
    """Drop samples with fewer tokens. None: no lower bound."""
    max_tokens: int | None = None
    """Drop samples with more tokens. None: no upper bound."""

    def __post_init__(self) -> None:
        if self.min_tokens is None and self.max_tokens is None:
            raise ValueError("WithinLength: give min_tokens=, max_tokens= or both.")
        if not 0 <= (self.min_tokens or 0) <= (np.inf if self.max_tokens is None else self.max_tokens):
            raise ValueError(
                f"WithinLength(min_tokens={self.min_tokens}, max_tokens={self.max_tokens}): no length is within these "
                f"bounds. Give the smaller number as min_tokens."
            )

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        lengths = pool.lengths[plan.indices]
        keep = lengths >= (self.min_tokens or 0)
        if self.max_tokens is not None:
            keep &= lengths <= self.max_tokens
        return plan.take(np.flatnonzero(keep))
