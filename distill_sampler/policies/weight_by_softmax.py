"""Weight the loss of each sample by its score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.expressions import MetricExpression, column_names, metric_names
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan


@documents_fields
@dataclass(frozen=True)
class WeightBySoftmax(Policy):
    """Multiply each sample's loss weight by floor + (1 - floor) · n · softmax(goodness / temperature), with mean 1.

    `goodness` is the score, negated if lower is better. The plan keeps its order and length, which makes this the
    gentlest way to prefer samples. A sample without a score gets the smallest weight, `floor`; if none has a score, the
    plan does not change. Trade-off: an epoch costs as much as before, although many samples may hardly count;
    `effective_sample_size` says how many do.
    """

    metric: str | MetricExpression
    """Name of the metric, for example `"rank_surprisal_ratio"`, a `Column` of the data set, or an expression such as
    `RankAverage`."""
    temperature: float
    """In the metric's units: a sample better by this much counts e times as much."""
    floor: float = 0.0
    """Smallest weight of any sample, in [0, 1)."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"WeightBySoftmax(temperature={self.temperature}): the temperature must be above 0.")
        if not 0 <= self.floor < 1:
            raise ValueError(
                f"WeightBySoftmax(floor={self.floor}): give a weight in [0, 1), because weights have mean 1."
            )

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return metric_names(self.metric)

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return column_names(self.metric)

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        goodness = pool.goodness(self.metric)[plan.indices].astype(np.float64)
        scored = np.flatnonzero(~np.isnan(goodness))
        if not len(scored):
            return plan
        with np.errstate(over="ignore"):
            softmax = np.exp((goodness[scored] - goodness[scored].max()) / self.temperature)
        weights = np.full(len(plan), self.floor)
        weights[scored] += (1 - self.floor) * len(plan) * softmax / softmax.sum()
        weights *= plan.weights
        # never exactly zero, so that a later policy can scale whatever it keeps back to mean 1
        weights = np.maximum(weights / weights.mean(), np.finfo(np.float32).tiny)
        return EpochPlan(indices=plan.indices, weights=weights)


def effective_sample_size(plan: EpochPlan) -> float:
    """How many samples a plan effectively has: Kish's (Σw)² / Σw², with w the total weight of each distinct sample.

    It is the number of samples if all weigh the same, near 1 if one dominates, and 0 for an empty plan.
    """
    totals = np.bincount(plan.indices, plan.weights)
    return float(totals.sum() ** 2 / (totals**2).sum()) if len(plan) else 0.0
