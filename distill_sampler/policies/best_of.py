"""Best of N: for each prompt the responses that this student can learn from best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.expressions import MetricExpression, metric_names
from distill_sampler.policies.keys import best_first_order, first_of_each, group_codes
from distill_sampler.types import EpochPlan, Policy, Pool


@documents_fields
@dataclass(frozen=True)
class BestOf(Policy):
    """Keep the best `k` samples of each group; the order of the plan stays.

    With `RankSurprisalRatio` and `k=1` this is the trajectory selection of arXiv:2601.14249 (argmin over all
    candidates of a prompt); with `LocalNaturalness` that of arXiv:2510.03988. A sample without a finite score is never
    kept while its group has one with a score, and not otherwise either. Ties are broken by content. Trade-off: what
    the metric likes in all groups alike (one teacher, say) may fill the plan; see `MixTeachers`.
    """

    metric: str | MetricExpression
    """Name of the metric, for example `"rank_surprisal_ratio"`, or an expression such as `RankAverage`."""
    per: str
    """Column that tells which rows answer the same prompt, for example `"prompt_id"`."""
    k: int = 1
    """How many to keep of each group; a smaller group is kept whole."""
    min_score: float | None = None
    """Nothing with a lower score is kept, in the metric's own units (whichever way is better)."""
    max_score: float | None = None
    """Nothing with a higher score is kept, in the metric's own units. A group may be left with no sample at all."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"BestOf(k={self.k}): k must be at least 1.")
        if (self.min_score, self.max_score) != (None, None) and not isinstance(self.metric, str):
            raise ValueError(
                f"BestOf(min_score={self.min_score}, max_score={self.max_score}): {self.metric} has no unit of its "
                f"own; bounds need the name of one metric."
            )
        if self.min_score is not None and self.max_score is not None and not self.min_score <= self.max_score:
            raise ValueError(
                f"BestOf(min_score={self.min_score}, max_score={self.max_score}): no score is within these bounds; "
                f"give the lower one as min_score."
            )

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return metric_names(self.metric)

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return (self.per,)

    @property
    def group_by(self) -> str | None:
        return self.per

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        goodness = pool.goodness(self.metric)[plan.indices]
        groups = group_codes(plan, pool, self.per, "BestOf")
        if isinstance(self.metric, str) and not pool.dry_run:
            scores = pool.scores[self.metric][plan.indices]
            if self.min_score is not None:
                goodness = np.where(scores < self.min_score, np.nan, goodness)
            if self.max_score is not None:
                goodness = np.where(scores > self.max_score, np.nan, goodness)
        order = best_first_order(goodness, pool.content_hash[plan.indices], groups)
        best = order[first_of_each(groups[order], self.k)]
        return plan.take(np.sort(best[~np.isnan(goodness[best])]))
