"""Replaying a plan through `torch.utils.data.Sampler`, at constant length."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from distill_sampler.types import EpochPlan


class DistillSampler(Sampler[int]):
    """Yields the indices of the current plan, in its order.

    It knows nothing of ranks and epochs: it yields the *global* order on every process (accelerate's
    `BatchSamplerShard` deals the batches out), and it does not depend on `set_epoch`, which does not reach every
    sampler on a resume. Its length never changes, because trainers count their steps once, before the first epoch.

    Args:
        num_samples: length of every epoch.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.plan: EpochPlan | None = None

    def set_plan(self, plan: EpochPlan) -> None:
        """What the next iteration yields. A plan already being iterated is not touched."""
        assert len(plan) == self.num_samples, "plans are fitted to the constant length before they get here"
        self.plan = plan

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        if self.plan is None:
            raise ValueError(
                "There is no plan to iterate over yet: call curriculum.start_epoch(epoch, model) before each epoch's "
                "loop over the data loader (attach does this in the trainer)."
            )
        return iter(self.plan.indices.tolist())


def fit_length(plan: EpochPlan, num_samples: int) -> EpochPlan:
    """The plan at the length that the trainer counts on, by one rule that repeats no sample more than needed.

    Too long: the end is cut off. Too short: it is repeated from its start, `[a, b, c] -> [a, b, c, a, b]` for 5, so
    that no sample appears twice more than another.
    """
    if len(plan) == num_samples:
        return plan
    return plan.take(np.arange(num_samples) % len(plan))
