"""Keep the best samples of the whole plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.expressions import MetricExpression, column_names, metric_names
from distill_sampler.policies.keys import best_first_order
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan


@documents_fields
@dataclass(frozen=True)
class KeepTop(Policy):
    """Keep the best samples of the whole plan, in the plan's order: a fraction of it, a number, or a budget of tokens.

    The fraction is of all samples of the plan, but those without a finite score are never kept. Ties are broken by
    content hash. This is the data pruning of Paul et al. (arXiv:2107.07075) with any score; with `TeacherSentences` or
    `TeacherStudentGap` over several responses of one teacher it is divergence-aware sampling, the top share under a
    budget (the sequel of arXiv:2512.20908). Trade-off: prompts whose responses all score badly disappear; `BestOf`
    keeps every prompt.
    """

    metric: str | MetricExpression
    """Name of the metric, for example `"rank_surprisal_ratio"`, a `Column` of the data set, or an expression such as
    `RankAverage`."""
    fraction: float | None = None
    """Share to keep, in (0, 1], rounded up to whole samples."""
    num: int | None = None
    """Number of samples to keep. Give this or `fraction`, or neither with `max_tokens`."""
    max_tokens: int | None = None
    """Keep no more tokens than this, prompts included: from the best on, up to the first sample that no longer fits.
    How many samples that is depends on their scores, so `Curriculum(num_samples=)` must say how long an epoch is."""

    def __post_init__(self) -> None:
        nothing = self.fraction is None and self.num is None and self.max_tokens is None
        if nothing or (self.fraction is not None and self.num is not None):
            raise ValueError(
                "KeepTop: give exactly one of fraction= (a share of the plan) and num= (a number), with max_tokens= (a "
                "budget) or without, or max_tokens= alone."
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"KeepTop(fraction={self.fraction}): the fraction must lie in (0, 1]; a half is 0.5.")
        if self.num is not None and self.num < 1:
            raise ValueError(f"KeepTop(num={self.num}): num must be at least 1.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"KeepTop(max_tokens={self.max_tokens}): give a positive number of tokens.")

    @property
    def length_depends_on_scores(self) -> bool:
        return self.max_tokens is not None and bool(self.uses_metrics)

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return metric_names(self.metric)

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return column_names(self.metric)

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        keep = len(plan) if self.num is None else self.num
        if self.fraction is not None:
            keep = math.ceil(self.fraction * len(plan) - 1e-9)  # 0.1 * 70 is 7.000000000000001
        goodness = pool.goodness(self.metric)[plan.indices]
        best = best_first_order(goodness, pool.content_hash[plan.indices])[:keep]
        if self.max_tokens is not None:
            best = best[np.cumsum(pool.lengths[plan.indices][best]) <= self.max_tokens]
        return plan.take(np.sort(best[~np.isnan(goodness[best])]))
