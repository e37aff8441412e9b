"""Competence-based curriculum learning: a growing share of the easiest samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.expressions import MetricExpression, metric_names
from distill_sampler.policies.keys import best_first_order, random_keys
from distill_sampler.types import EpochPlan, Policy, Pool


@documents_fields
@dataclass(frozen=True)
class CompetencePacing(Policy):
    """Train each epoch on the best share c of the scored samples, repeated evenly to the plan's length.

    c = min(1, sqrt(epoch (1 - initial²) / epochs + initial²)), epochs from 0 (Platanios et al. 2019, arXiv:1903.09848,
    with epochs for steps and the metric's better end for easy). The number of samples stays, as there: each chosen
    sample comes ⌊1/c⌋ or ⌈1/c⌉ times, whose turn it is drawn anew each epoch. The order of the plan stays and copies
    stand side by side, so an order comes after it. Trade-off: early epochs see the same samples several times.
    """

    metric: str | MetricExpression
    """Name of the metric, for example `"global_naturalness"`, or an expression such as `RankAverage`."""
    initial: float
    """c0, the share in epoch 0, in (0, 1]."""
    epochs: int
    """T, the first epoch that sees every scored sample."""

    def __post_init__(self) -> None:
        if not 0 < self.initial <= 1:
            raise ValueError(f"CompetencePacing(initial={self.initial}): a share in (0, 1]; the paper starts at 0.01.")
        if self.epochs < 1:
            raise ValueError(f"CompetencePacing(epochs={self.epochs}): it takes at least 1 epoch to see everything.")

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return metric_names(self.metric)

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        goodness = pool.goodness(self.metric)[plan.indices]
        scored = np.flatnonzero(~np.isnan(goodness))
        order = scored[best_first_order(goodness[scored], pool.content_hash[plan.indices[scored]])]
        share = min(1.0, math.sqrt(pool.epoch * (1 - self.initial**2) / self.epochs + self.initial**2))
        chosen = order[: math.ceil(share * len(order) - 1e-9)]
        times = np.zeros(len(plan), np.int64)
        if len(chosen):
            rounds, rest = divmod(len(plan), len(chosen))
            times[chosen] = rounds
            times[chosen[np.argsort(random_keys(plan, pool, rng)[chosen], kind="stable")[:rest]]] += 1
        return plan.take(np.repeat(np.arange(len(plan)), times))
