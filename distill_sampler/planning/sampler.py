"""Replaying a plan through `torch.utils.data.Sampler`, at constant length."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from distill_sampler.types import EpochPlan, IntArray


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
        self.handed_out = 0
        """Places of the plan that a data loader has been given, read-ahead included."""

    def set_plan(self, plan: EpochPlan) -> None:
        """What the next iteration yields. A plan already being iterated is not touched."""
        assert len(plan) == self.num_samples, "plans are fitted to the constant length before they get here"
        self.plan = plan
        self.handed_out = 0
        self._order: IntArray = plan.indices.copy()  # shared with the iteration under way, so that its rest can change

    def set_rest(self, plan: EpochPlan, start: int) -> None:
        """Go on with another plan from place `start`, in the iteration under way too.

        Raises:
            ValueError: the data loader was given that place already; training would not be what is planned.
        """
        assert self.plan is not None
        assert len(plan) == self.num_samples
        assert np.array_equal(plan.indices[:start], self.plan.indices[:start]), "what was handed out stays"
        if self.handed_out > start:
            raise ValueError(
                f"The data loader has read {self.handed_out} samples of the epoch's plan, but the plan was to "
                f"change from sample {start} on. Raise Rescore(lag=), or let the loader read less far ahead "
                "(dataloader_num_workers, dataloader_prefetch_factor)."
            )
        self.plan = plan
        self._order[start:] = plan.indices[start:]

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        if self.plan is None:
            raise ValueError(
                "There is no plan to iterate over yet: call curriculum.start_epoch(epoch, model) before each epoch's "
                "loop over the data loader (attach does this in the trainer)."
            )
        return self._walk(self._order)

    def _walk(self, order: IntArray) -> Iterator[int]:
        for place in range(len(order)):
            if order is self._order:
                self.handed_out = max(self.handed_out, place + 1)
            yield int(order[place])


def fit_length(plan: EpochPlan, num_samples: int) -> EpochPlan:
    """The plan at the length that the trainer counts on, by one rule that repeats no sample more than needed.

    Too long: the end is cut off. Too short: it is repeated from its start, `[a, b, c] -> [a, b, c, a, b]` for 5, so
    that no sample appears twice more than another.
    """
    if len(plan) == num_samples:
        return plan
    return plan.take(np.arange(num_samples) % len(plan))


def replace_rest(begun: EpochPlan, plan: EpochPlan, start: int, groups: IntArray) -> EpochPlan:
    """The plan of an epoch that was begun by one plan and goes on with another.

    The new plan says what the whole epoch should be; what was begun counts towards it. For each place handed out, one
    of the same group is taken off the new plan, if it has one: the same sample before others, then the last. The
    rest follows in the new plan's order, cut at its end to the epoch's length. So a prompt whose best response is
    another one now is not trained on twice, and no prompt is forgotten.

    Args:
        begun: the plan so far.
        plan: the new plan of the whole epoch, of the same length.
        start: places of `begun` that stay.
        groups: `[samples]` which samples stand for each other, such as the responses to a prompt; each for itself:
            `arange`.
    """
    handed_out = begun.indices[:start]
    num_groups = int(groups.max(initial=0)) + 1
    owed = np.bincount(groups[handed_out], minlength=num_groups)
    # within a group: what was handed out first, then from the end
    trained = np.isin(plan.indices, handed_out)
    places = np.arange(len(plan))
    group = groups[plan.indices]
    order = np.lexsort((-places, ~trained, group))
    first = np.searchsorted(group[order], group[order])
    off = np.zeros(len(plan), bool)
    off[order] = np.arange(len(plan)) - first < owed[group[order]]
    rest = np.flatnonzero(~off)[: len(plan) - start]
    weights = plan.weights[rest].astype(np.float64)
    owed_weight = len(plan) - begun.weights[:start].sum(dtype=np.float64)
    if len(rest) and weights.sum() > 0:
        weights *= owed_weight / weights.sum()
    return EpochPlan(
        indices=np.r_[handed_out, plan.indices[rest]], weights=np.r_[begun.weights[:start], weights.astype(np.float32)]
    )
