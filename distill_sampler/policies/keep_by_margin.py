"""LARK's selection, arXiv:2605.30651: the best samples per prompt, weighted by margin over the best one left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.expressions import MetricExpression, column_names, metric_names
from distill_sampler.policies.keys import best_first_order, first_of_each, group_codes, occurrence
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan


@documents_fields
@dataclass(frozen=True)
class KeepByMargin(Policy):
    """Keep the best `k` samples of each group, with loss weights in proportion to their margin, in the plan's order.

    The margin is the score minus that of sample k + 1 of the group, the best one left out. With `LarkGain` as the
    score, these are the weights of LARK's χ²-regularised selection (arXiv:2605.30651, k = 3 or 5). The weights of a
    group sum to its number of kept samples. A group with at most `k` samples is kept whole. Its margins are relative to
    its worst sample, which gets almost no weight, as in the authors' code. Equal scores give equal weights. Trade-off:
    the worst of the kept samples may have so little weight that a smaller `k` saves time at no loss.
    """

    metric: str | MetricExpression
    """Name of the metric, a `Column` of the data set, or an expression such as `LarkGain`."""
    per: str
    """Column that tells which rows answer the same prompt."""
    k: int = 3
    """How many samples to keep per group; B in the paper."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"KeepByMargin(k={self.k}): k must be at least 1.")

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return metric_names(self.metric)

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.per, *column_names(self.metric))))

    @property
    def group_by(self) -> str | None:
        return self.per

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        if not len(plan):
            return plan
        goodness = pool.goodness(self.metric)[plan.indices].astype(np.float64)
        groups = group_codes(plan, pool, self.per, "KeepByMargin")
        order = best_first_order(goodness, pool.content_hash[plan.indices], groups)
        order = order[~np.isnan(goodness[order])]
        kept = order[first_of_each(groups[order], self.k)]
        if not len(kept):
            return plan.take(kept)
        # the score of the best sample left out, or else slightly below the worst one kept, as in the authors' code
        threshold = np.full(int(groups.max()) + 1, np.inf)
        np.minimum.at(threshold, groups[kept], goodness[kept] - 1e-8)
        next_best = order[occurrence(groups[order]) == self.k]
        threshold[groups[next_best]] = goodness[next_best]
        margin = goodness[kept] - threshold[groups[kept]]
        total = np.bincount(groups[kept], margin)[groups[kept]]
        number = np.bincount(groups[kept])[groups[kept]]
        even = total <= 1e-12 * number  # all scores equal
        weights = np.where(even, 1.0, number * margin / np.where(even, 1.0, total))
        weights *= plan.weights[kept]
        # never exactly zero, so that a later policy can scale whatever it keeps back to mean 1
        weights = np.maximum(weights / weights.mean(), np.finfo(np.float32).tiny)
        in_order = np.argsort(kept, kind="stable")
        return EpochPlan(indices=plan.indices[kept[in_order]], weights=weights[in_order])
