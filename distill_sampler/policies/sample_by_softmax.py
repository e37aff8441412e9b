"""Draw samples with a probability that grows with their score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.hashing import splitmix64
from distill_sampler.policies.expressions import MetricExpression, metric_names
from distill_sampler.policies.keys import (
    HALF,
    best_first_order,
    first_of_each,
    group_codes,
    random_keys,
    sort_by,
    to_unit_interval,
)
from distill_sampler.types import EpochPlan, FloatArray, HashArray, IntArray, Policy, Pool


@documents_fields
@dataclass(frozen=True)
class SampleBySoftmax(Policy):
    """Draw samples with probability proportional to exp(goodness / temperature), anew each epoch.

    `goodness` is the score, or its negative where lower is better. Between `BestOf`/`KeepTop` (temperature → 0) and a
    uniform draw (→ ∞). Without replacement the draws are successive, by Gumbel top-k (Kool et al., arXiv:1903.06059).
    The order of the plan stays and copies stand side by side, so an order comes after it. Samples without a score are
    never drawn; a group without any score is left out. Probabilities are not loss weights: drawing often already is
    the emphasis. Trade-off against a hard cut: variety, for some samples that score worse.
    """

    metric: str | MetricExpression
    """Name of the metric, for example `"rank_surprisal_ratio"`, or an expression such as `RankAverage`."""
    temperature: float
    """In the metric's units: a sample better by this much is e times as likely."""
    num_samples: int | None = None
    """How many to draw (from each group, with `per`), of any size; None: as many as there are in the plan (the group).

    Without replacement a group that has fewer gives all it has.
    """
    replacement: bool = True
    """Whether a sample can be drawn again. False needs `num_samples`: drawing everything once changes nothing."""
    per: str | None = None
    """Column that tells which rows answer the same prompt, to draw within each; None: from the whole plan."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"SampleBySoftmax(temperature={self.temperature}): the temperature must be above 0; for the best "
                f"alone use BestOf or KeepTop."
            )
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"SampleBySoftmax(num_samples={self.num_samples}): draw at least 1 sample.")
        if self.num_samples is None and not self.replacement:
            raise ValueError(
                "SampleBySoftmax(num_samples=None, replacement=False) would draw everything once; give num_samples=."
            )

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return metric_names(self.metric)

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return () if self.per is None else (self.per,)

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
            # Only the order counts, so scale whichever of the two stays finite.
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
    """`[num.sum()]` positions drawn with replacement: `num[g]` of them from the g-th run, which begins at `first[g]`.

    By the inverse of each run's cumulative distribution; the uniforms belong to the content of the run's first sample.
    """
    lengths = np.diff(np.r_[first, len(goodness)])
    best = np.repeat(np.maximum.reduceat(goodness, first), lengths)
    with np.errstate(over="ignore"):
        cumulative = np.cumsum(np.exp((goodness - best) / temperature))
    cumulative -= np.repeat(np.r_[0.0, cumulative[first[1:] - 1]], lengths)
    cumulative /= np.repeat(cumulative[first + lengths - 1], lengths)
    cumulative += np.repeat(np.arange(len(first)), lengths)  # run g covers [g, g + 1]
    run = np.repeat(np.arange(len(first)), num)
    turn = np.arange(len(run)) - np.repeat(np.cumsum(num) - num, num)
    salt = rng.integers(0, 2**64, dtype=np.uint64)
    uniform = to_unit_interval(splitmix64(splitmix64(content[first] ^ salt)[run] + turn.astype(np.uint64)))
    drawn: IntArray = np.searchsorted(cumulative, np.sort(run + uniform), side="right")
    last: IntArray = (first + lengths - 1)[run]
    return np.minimum(drawn, last, dtype=np.int64)  # run + uniform may round up to the next run
