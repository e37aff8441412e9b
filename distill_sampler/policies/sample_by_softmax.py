"""Draw samples with a probability that grows with their score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.hashing import splitmix64
from distill_sampler.policies.expressions import MetricExpression, column_names, metric_names
from distill_sampler.policies.keys import (
    HALF,
    best_first_order,
    first_of_each,
    group_codes,
    random_keys,
    sort_by,
    to_unit_interval,
)
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan, FloatArray, HashArray, IntArray

_MOST_DRAWS = 10**8
"""More draws than that are a slip, and would take more memory than there is."""


@documents_fields
@dataclass(frozen=True)
class SampleBySoftmax(Policy):
    """Draw samples with probability proportional to exp(goodness / temperature), again each epoch.

    `goodness` is the score, negated if lower is better. A temperature near 0 approaches `BestOf` or `KeepTop`, a high
    one a uniform draw. Without replacement, samples are drawn one after the other, by Gumbel top-k (Kool et al.,
    arXiv:1903.06059). The drawn samples stay in the plan's order with copies side by side, so put an ordering policy
    after this one. Samples without a score are never drawn. Loss weights do not change: drawing a sample often already
    emphasises it. Trade-off: more variety than a hard cut, but some samples score worse.
    """

    metric: str | MetricExpression
    """Name of the metric, for example `"rank_surprisal_ratio"`, a `Column` of the data set, or an expression such as
    `RankAverage`."""
    temperature: float
    """In the metric's units: a sample better by this much is e times as likely."""
    num_samples: int | None = None
    """How many samples to draw from the plan, or with `per` from each group. None: as many as it has.

    Without replacement, a group with fewer samples gives all of them.
    """
    replacement: bool = True
    """Whether a sample can be drawn more than once. False needs `num_samples`, or every sample would be drawn once."""
    per: str | None = None
    """Column that identifies the prompt, to draw within each prompt's group. None: draw from the whole plan."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"SampleBySoftmax(temperature={self.temperature}): the temperature must be above 0. To keep only "
                f"the best, use BestOf or KeepTop."
            )
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"SampleBySoftmax(num_samples={self.num_samples}): draw at least 1 sample.")
        if self.num_samples is None and not self.replacement:
            raise ValueError(
                "SampleBySoftmax(num_samples=None, replacement=False) would draw every sample once; give num_samples=."
            )

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return metric_names(self.metric)

    @property
    def uses_columns(self) -> tuple[str, ...]:
        columns = column_names(self.metric)
        return columns if self.per is None else (self.per, *columns)

    @property
    def group_by(self) -> str | None:
        return self.per

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        if not len(plan):
            return plan
        goodness = pool.goodness(self.metric)[plan.indices].astype(np.float64)
        content = pool.content_hash[plan.indices]
        groups = np.zeros(len(plan), np.int64)
        if self.per is not None:
            groups = group_codes(plan, pool, self.per, "SampleBySoftmax")
        scored = np.flatnonzero(~np.isnan(goodness))
        if not self.replacement:
            assert self.num_samples is not None
            noise = -np.log(-np.log(to_unit_interval(random_keys(plan, pool, rng)[scored])))
            # only the order matters, so scale the one of the two that stays finite
            cold = self.temperature <= 1
            perturbed = (
                goodness[scored] + self.temperature * noise if cold else goodness[scored] / self.temperature + noise
            )
            order = scored[best_first_order(perturbed, content[scored], groups[scored])]
            return plan.take(np.sort(order[first_of_each(groups[order], self.num_samples)]))
        if not len(scored):
            return plan.take(scored)
        by_content = sort_by(groups[scored].astype(np.uint64) << HALF | content[scored] >> HALF, (content[scored], 0))
        order = scored[by_content]
        first = np.flatnonzero(first_of_each(groups[order]))
        if self.num_samples is None:
            num = np.bincount(groups)[groups[order[first]]]
        else:
            num = np.full(len(first), self.num_samples)
            if len(first) * self.num_samples > _MOST_DRAWS:
                raise ValueError(
                    f"SampleBySoftmax(num_samples={self.num_samples}, per={self.per!r}): that is "
                    f"{len(first) * self.num_samples:,} draws in {len(first):,} groups. With per=, num_samples counts "
                    "the draws from each group; give a smaller number, or leave per= out to draw from the whole plan."
                )
        drawn = draw_with_replacement(goodness[order], self.temperature, first, num, content[order], rng)
        return plan.take(np.sort(order[drawn]))


def draw_with_replacement(
    goodness: FloatArray,
    temperature: float,
    first: IntArray,
    num: IntArray,
    content: HashArray,
    rng: np.random.Generator,
) -> IntArray:
    """`[num.sum()]` positions drawn with replacement: `num[g]` of them from the g-th group, which begins at `first[g]`.

    Inverts the cumulative distribution of each group. The random numbers depend on the content of the group's first
    sample, not on row numbers.
    """
    lengths = np.diff(np.r_[first, len(goodness)])
    best = np.repeat(np.maximum.reduceat(goodness, first), lengths)
    with np.errstate(over="ignore"):
        cumulative = np.cumsum(np.exp((goodness - best) / temperature))
    cumulative -= np.repeat(np.r_[0.0, cumulative[first[1:] - 1]], lengths)
    cumulative /= np.repeat(cumulative[first + lengths - 1], lengths)
    cumulative += np.repeat(np.arange(len(first)), lengths)  # group g covers [g, g + 1]
    group = np.repeat(np.arange(len(first)), num)
    draw_number = np.arange(len(group)) - np.repeat(np.cumsum(num) - num, num)
    salt = rng.integers(0, 2**64, dtype=np.uint64)
    uniform = to_unit_interval(splitmix64(splitmix64(content[first] ^ salt)[group] + draw_number.astype(np.uint64)))
    drawn: IntArray = np.searchsorted(cumulative, np.sort(group + uniform), side="right")
    last: IntArray = (first + lengths - 1)[group]
    return np.minimum(drawn, last, dtype=np.int64)  # group + uniform may round up to the next group
