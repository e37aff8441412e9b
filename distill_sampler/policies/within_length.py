"""Leave out what is too short or too long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.types import EpochPlan, Policy, Pool


@documents_fields
@dataclass(frozen=True)
class WithinLength(Policy):
    """Keep the samples whose number of tokens, prompt included, is within bounds; the order of the plan stays.

    The paper of RSR uses no length filter; long traces are where most of the cost is. Trade-off: long responses are
    often the hard prompts', and as a selection of its own length is a strong confound (the longest response reaches
    57.9 where provenance tracing reaches 58.7, arXiv:2512.20908).
    """

    min_tokens: int | None = None
    """Fewest tokens that a kept sample has; None: no lower bound."""
    max_tokens: int | None = None
    """Most tokens that a kept sample has; None: no upper bound."""

    def __post_init__(self) -> None:
        if self.min_tokens is None and self.max_tokens is None:
            raise ValueError("WithinLength: give min_tokens=, max_tokens= or both.")
        if not 0 <= (self.min_tokens or 0) <= (np.inf if self.max_tokens is None else self.max_tokens):
            raise ValueError(
                f"WithinLength(min_tokens={self.min_tokens}, max_tokens={self.max_tokens}): no length is within these "
                f"bounds; give the smaller number as min_tokens."
            )

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        lengths = pool.lengths[plan.indices]
        keep = lengths >= (self.min_tokens or 0)
        if self.max_tokens is not None:
            keep &= lengths <= self.max_tokens
        return plan.take(np.flatnonzero(keep))
