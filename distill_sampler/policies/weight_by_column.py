"""Weight the loss of each sample by a column of the data set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.expressions import numbers_of
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan


@documents_fields
@dataclass(frozen=True)
class WeightByColumn(Policy):
    """Multiply each sample's loss weight by its number in a column, and scale the weights of the plan to mean 1.

    The plan keeps its order and length. Only ratios of the weights matter, because the mean of a plan's weights is 1: a
    sample of weight 2 counts twice as much in the gradient as one of weight 1. A sample of weight 0 still takes time,
    so leave it out of the plan instead. Trade-off: a few large weights make the gradient noisier, as a smaller batch
    does; `effective_sample_size` in the trainer's log shows how many samples a plan effectively has.
    """

    column: str = "weight"
    """The column with the weights, numbers of 0 or more."""

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        if not len(plan):
            return plan
        numbers = numbers_of(pool.column(self.column), self.column)[plan.indices]
        wrong = np.flatnonzero(~(numbers >= 0))
        if len(wrong):
            what = "no value" if np.isnan(numbers[wrong[0]]) else f"the value {numbers[wrong[0]]:g}"
            raise ValueError(
                f"WeightByColumn(column='{self.column}'): {len(wrong)} of {len(plan)} samples have no weight of 0 or "
                f"more (first: sample {plan.indices[wrong[0]]}, which has {what}). Fill the column, or drop these rows."
            )
        if not numbers.any():
            raise ValueError(
                f"WeightByColumn(column='{self.column}'): all {len(plan)} samples of the plan have the weight 0, so "
                "there is nothing to train on. Give some of them a larger weight."
            )
        weights = plan.weights * numbers
        # never exactly zero, so that a later policy can scale whatever it keeps back to mean 1
        weights = np.maximum(weights / weights.mean(), np.finfo(np.float32).tiny)
        return EpochPlan(indices=plan.indices, weights=weights)
