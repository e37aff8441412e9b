"""A policy that keeps what is neither the easiest nor the hardest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_sampler import EpochPlan, Policy, Pool
from distill_sampler.policies.keys import best_first_order


@dataclass(frozen=True)
class KeepMiddle(Policy):
    """Keep the share of the samples whose scores are nearest to the median; the order stays."""

    metric: str
    """Name of the metric."""
    share: float = 0.5
    """How much of the plan is kept, of those samples that have a score."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"KeepMiddle(share={self.share}): give a share above 0, and at most 1.")

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        goodness = pool.goodness(self.metric)[plan.indices]
        scored = np.flatnonzero(~np.isnan(goodness))
        if not len(scored):
            return plan.take(scored)
        nearness = -np.abs(goodness[scored] - np.median(goodness[scored]))
        order = scored[best_first_order(nearness, pool.content_hash[plan.indices][scored])]
        return plan.take(np.sort(order[: int(np.ceil(self.share * len(scored)))]))
