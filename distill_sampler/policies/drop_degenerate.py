"""Drop responses that repeat themselves, which naturalness scores prefer, or that nearly repeat another response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.expressions import MetricExpression, column_names, metric_names
from distill_sampler.policies.keys import best_first_order, first_of_each, group_codes
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import BoolArray, EpochPlan, FloatArray, IntArray


@documents_fields
@dataclass(frozen=True)
class DropDegenerate(Policy):
    """Drop responses that loop, and all but one of the near duplicates in each group, in the plan's order.

    A response counts as a loop if its `CompressionRatio` is below `min_ratio`. Two responses of a group are near
    duplicates if they share a band of the metric `MinHash`, or if a chain of such pairs connects them. Copies
    of one sample in the plan do not count as duplicates. A sample without a score of these metrics is kept. Put this
    policy before those that select. Trade-off: a correct answer with many similar steps, such as a long
    table, may look like a loop.
    """

    per: str | None = None
    """Column that tells which rows answer the same prompt. Then only responses to the same prompt count as duplicates,
    and `if_none` decides what happens to a prompt that has only loops. None: any two responses of the plan can be
    duplicates."""
    loops: str | None = "compression_ratio"
    """Name of the `CompressionRatio` metric. None: keep loops."""
    min_ratio: float = 0.08
    """Responses with a smaller ratio count as loops."""
    duplicates: str | None = "minhash"
    """Name of the `MinHash` metric. None: keep duplicates."""
    metric: str | MetricExpression | None = None
    """Of several near duplicates, the best by this metric, column or expression is kept. None: the one with the highest
    compression ratio is kept, or without `loops` the one with the smallest content hash."""
    if_none: Literal["keep_best", "drop"] = "keep_best"
    """For a prompt whose responses all loop: keep the one with the highest ratio, or drop the prompt. Needs `per`."""

    def __post_init__(self) -> None:
        if self.loops is None and self.duplicates is None:
            raise ValueError(
                "DropDegenerate: give loops= (the name of the CompressionRatio metric), duplicates= (the name of the "
                "MinHash metric), or both."
            )
        if not 0 < self.min_ratio < 1:
            raise ValueError(
                f"DropDegenerate(min_ratio={self.min_ratio}): give a ratio in (0, 1); loops are below 0.08."
            )
        if self.if_none not in ("keep_best", "drop"):
            raise ValueError(f"DropDegenerate(if_none={self.if_none!r}): choose 'keep_best' or 'drop'.")

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        own = [name for name in (self.loops, self.duplicates) if name is not None]
        return tuple(dict.fromkeys((*own, *(() if self.metric is None else metric_names(self.metric)))))

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*(() if self.per is None else (self.per,)), *column_names(self.metric))))

    @property
    def group_by(self) -> str | None:
        return self.per

    @property
    def explained_by(self) -> tuple[str, ...]:
        return (*(() if self.loops is None else (self.loops,)), *(() if self.per is None else (self.per,)))

    @property
    def length_depends_on_scores(self) -> bool:
        """False with `per`, because a later policy such as `BestOf` usually makes the length the number of prompts."""
        return self.per is None

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        if not len(plan) or pool.dry_run:
            return plan
        samples, place = np.unique(plan.indices, return_inverse=True)
        distinct = EpochPlan(indices=samples)
        groups = np.zeros(len(samples), np.int64)
        if self.per is not None:
            groups = group_codes(distinct, pool, self.per, "DropDegenerate")
        content = pool.content_hash[samples]
        keep = np.ones(len(samples), bool)
        ratio = np.full(len(samples), np.nan)
        if self.loops is not None:
            ratio = pool.scores[self.loops][samples]
            keep = ~(ratio < self.min_ratio)
            if self.per is not None and self.if_none == "keep_best":
                order = best_first_order(ratio, content, groups)
                best = order[first_of_each(groups[order])]
                kept = np.zeros(int(groups.max()) + 1, bool)
                kept[groups[keep]] = True
                keep[best[~kept[groups[best]]]] = True
        if self.duplicates is not None:
            goodness = ratio if self.metric is None else pool.goodness(self.metric)[samples]
            bands = [pool.scores[name][samples] for name in pool.metrics[self.duplicates].columns]
            left = np.flatnonzero(keep)
            clusters = _connected(groups[left], [band[left] for band in bands])
            order = best_first_order(goodness[left], content[left], clusters)
            keep[:] = False
            keep[left[order[first_of_each(clusters[order])]]] = True
        return plan.take(np.flatnonzero(keep[place]))


def _connected(groups: IntArray, bands: list[FloatArray]) -> IntArray:
    """`[n]` labels, equal for samples of one group that shared bands connect, directly or through other samples."""
    labels = np.arange(len(groups))
    keys = []
    for band in bands:
        known: BoolArray = ~np.isnan(band)
        rows = np.flatnonzero(known)
        order = rows[np.lexsort((band[rows], groups[rows]))]
        same = (band[order][1:] == band[order][:-1]) & (groups[order][1:] == groups[order][:-1])
        keys.append((order[:-1][same], order[1:][same]))
    left, right = (np.concatenate(side) for side in zip(*keys, strict=True))
    while True:  # the smallest label spreads along the pairs; labels only fall, so this ends
        smaller = np.minimum(labels[left], labels[right])
        before = labels.copy()
        np.minimum.at(labels, left, smaller)
        np.minimum.at(labels, right, smaller)
        labels = labels[labels]
        if np.array_equal(labels, before):
            return labels
