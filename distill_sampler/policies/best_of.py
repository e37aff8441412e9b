"""Best of N: for each prompt, keep the responses that this student can learn most from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.expressions import Column, MetricExpression, column_names, metric_names, raw_scores
from distill_sampler.policies.keys import best_first_order, first_of_each, group_codes
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EncodedColumn, EpochPlan


@documents_fields
@dataclass(frozen=True)
class BestOf(Policy):
    """Keep the best `k` samples of each group, in the plan's order.

    With `RankSurprisalRatio` and `k=1` this is the trajectory selection of arXiv:2601.14249 (argmin over all
    candidates of a prompt); with `LocalNaturalness`, that of arXiv:2510.03988. A sample without a finite score is never
    kept. Ties are broken by content hash. Trade-off: if the metric favours one teacher in every group, that teacher may
    fill the plan; see `MixTeachers`.
    """

    metric: str | MetricExpression
    """Name of the metric, for example `"rank_surprisal_ratio"`, a `Column` of the data set, or an expression such as
    `RankAverage`."""
    per: str
    """Column that identifies the prompt, for example `"prompt_id"`. Rows with the same value are one group."""
    k: int = 1
    """How many samples to keep per group. A smaller group is kept whole."""
    min_score: float | None = None
    """Drop samples with a lower score, whichever direction is better. In the metric's own units."""
    max_score: float | None = None
    """Drop samples with a higher score, likewise. The bounds may leave a group empty."""
    prefer_whole: bool = True
    """Keep a response that truncation cut off only where its group has too few whole ones."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"BestOf(k={self.k}): k must be at least 1.")
        if (self.min_score, self.max_score) != (None, None) and not isinstance(self.metric, (str, Column)):
            raise ValueError(
                f"BestOf(min_score={self.min_score}, max_score={self.max_score}): bounds are in a metric's "
                f"units, and {self.metric} has none. Give the name of one metric or a Column, or leave the bounds out."
            )
        if self.min_score is not None and self.max_score is not None and not self.min_score <= self.max_score:
            raise ValueError(
                f"BestOf(min_score={self.min_score}, max_score={self.max_score}): no score is within these bounds. "
                f"Give the lower one as min_score."
            )

    @property
    def length_depends_on_scores(self) -> bool:
        return (self.min_score, self.max_score) != (None, None) and isinstance(self.metric, str)

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
        goodness = pool.goodness(self.metric)[plan.indices]
        groups = group_codes(plan, pool, self.per, "BestOf")
        if isinstance(self.metric, Column) or (isinstance(self.metric, str) and not pool.dry_run):
            scores = raw_scores(self.metric, pool)[plan.indices]
            if self.min_score is not None:
                goodness = np.where(scores < self.min_score, np.nan, goodness)
            if self.max_score is not None:
                goodness = np.where(scores > self.max_score, np.nan, goodness)
        cut = pool.cut[plan.indices] if self.prefer_whole and pool.cut is not None else None
        order = best_first_order(goodness, pool.content_hash[plan.indices], groups, last=cut)
        best = order[first_of_each(groups[order], self.k)]
        return plan.take(np.sort(best[~np.isnan(goodness[best])]))


def refuse_single_responses(policies: Iterable[Policy], columns: Mapping[str, EncodedColumn]) -> None:
    """Raise an error if a `BestOf` is to choose among the responses to a prompt, and every prompt has only one.

    Args:
        policies: without stages (`unfolded`).
        columns: the columns that they read, as far as the data have them.

    Raises:
        ValueError: no two samples have the same value of the column `per`.
    """
    for policy in policies:
        while not isinstance(policy, BestOf) and isinstance(getattr(policy, "policy", None), Policy):
            policy = policy.policy  # type: ignore[attr-defined]  # of a stage
        if not isinstance(policy, BestOf) or (policy.min_score, policy.max_score) != (None, None):
            continue
        column = columns.get(policy.per)  # None is refused where the column is read
        if column is not None and 1 < len(column.codes) == len(column.values):
            raise ValueError(
                f"BestOf(per='{policy.per}'): each of the {len(column.codes):,} samples has a {policy.per} of its own, "
                "so there is nothing to choose among. If several responses answer the same prompt, name the column "
                "that they share. With one response to each prompt, KeepTop(metric, fraction=0.5) keeps the best of "
                "the whole pool, CompetencePacing(metric, initial=0.3, epochs=3) starts with the best and adds the "
                "others, and SortBy(metric) orders them."
            )
