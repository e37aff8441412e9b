"""Order the epoch by a score: a curriculum from easy to hard, or the other way round."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.expressions import MetricExpression, column_names, metric_names
from distill_sampler.policies.keys import best_first_order, random_keys, to_unit_interval
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan


@documents_fields
@dataclass(frozen=True)
class SortBy(Policy):
    """Sort the plan by a metric. Samples without a score come last; ties are broken by content hash.

    This is plain curriculum learning (Bengio et al., 2009). Trade-off: neighbours in the epoch resemble each other (in
    length, in domain), so batches are less varied. `jitter`, or `Shuffle(bucket=)` after it, loosens the order.
    """

    metric: str | MetricExpression
    """Name of the metric, for example `"global_naturalness"`, a `Column` of the data set, or an expression such as
    `RankAverage`."""
    best_first: bool = True
    """Whether the best come first. False: the worst first, for an anti-curriculum control."""
    jitter: float = 0.0
    """How far a sample may move from its sorted position, as a share of the epoch. Redrawn each epoch."""

    def __post_init__(self) -> None:
        if not 0 <= self.jitter < math.inf:
            raise ValueError(f"SortBy(jitter={self.jitter}): give a share of the epoch, 0 or more, such as 0.1.")

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return metric_names(self.metric)

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return column_names(self.metric)

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        goodness = pool.goodness(self.metric)[plan.indices]
        order = best_first_order(goodness if self.best_first else -goodness, pool.content_hash[plan.indices])
        if self.jitter:
            scored = order[: np.count_nonzero(~np.isnan(goodness))]
            shift = self.jitter * len(scored) * (to_unit_interval(random_keys(plan, pool, rng)[scored]) - 0.5)
            order[: len(scored)] = scored[np.argsort(np.arange(len(scored)) + shift, kind="stable")]
        return plan.take(order)
