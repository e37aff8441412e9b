"""Competence-based curriculum learning: train on a growing share of the best samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.expressions import MetricExpression, column_names, metric_names
from distill_sampler.policies.keys import best_first_order, random_keys
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan


@documents_fields
@dataclass(frozen=True)
class CompetencePacing(Policy):
    """Train each epoch on the best share c of the scored samples, repeated to the plan's length.

    c = min(1, sqrt(epoch (1 - initial²) / epochs + initial²)), with epochs counted from 0 (Platanios et al. 2019,
    arXiv:1903.09848, who count steps and start with easy samples instead of the best ones). Each chosen sample appears
    ⌊1/c⌋ or ⌈1/c⌉ times; which ones get the extra copy is redrawn each epoch. The samples stay in the plan's order
    with copies side by side, so put an ordering policy after this one. Trade-off: early epochs repeat samples.
    """

    metric: str | MetricExpression
    """Name of the metric, for example `"global_naturalness"`, a `Column` of the data set, or an expression such as
    `RankAverage`."""
    initial: float
    """The share c in epoch 0, in (0, 1]; c0 in the paper."""
    epochs: int
    """The first epoch that trains on every scored sample; T in the paper."""

    def __post_init__(self) -> None:
        if not 0 < self.initial <= 1:
            raise ValueError(
                f"CompetencePacing(initial={self.initial}): give a share in (0, 1]; the paper starts at 0.01."
            )
        if self.epochs < 1:
            raise ValueError(f"CompetencePacing(epochs={self.epochs}): give at least 1 epoch.")

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return metric_names(self.metric)

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return column_names(self.metric)

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        goodness = pool.goodness(self.metric)[plan.indices]
        scored = np.flatnonzero(~np.isnan(goodness))
        order = scored[best_first_order(goodness[scored], pool.content_hash[plan.indices[scored]])]
        share = min(1.0, math.sqrt(pool.epoch * (1 - self.initial**2) / self.epochs + self.initial**2))
        chosen = order[: math.ceil(share * len(order) - 1e-9)]
        times = np.zeros(len(plan), np.int64)
        if len(chosen):
            repeats, remainder = divmod(len(plan), len(chosen))
            times[chosen] = repeats
            times[chosen[np.argsort(random_keys(plan, pool, rng)[chosen], kind="stable")[:remainder]]] += 1
        return plan.take(np.repeat(np.arange(len(plan)), times))
