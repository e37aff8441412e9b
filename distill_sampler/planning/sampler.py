"""A torch sampler that yields the current plan, at constant length."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from distill_sampler.types import EpochPlan, IntArray


class _Current:
    """Holds the plan that an iteration yields, so that `set_rest` can replace it while the iteration runs."""

    def __init__(self, plan: EpochPlan) -> None:
        self.plan = plan


class DistillSampler(Sampler[int | tuple[int, ...]]):
    """Yields the indices of the current plan, in its order; for a plan in packs, the indices of each pack as a tuple.

    It yields the *global* order on every process; accelerate's `BatchSamplerShard` distributes the batches. It does not
    rely on `set_epoch`, which does not reach every sampler on a resume. Its length never changes, because trainers
    count their steps once, before the first epoch.

    If a plan is not a whole number of optimizer steps, its first rows complete it, once the host has said how many rows
    a step has (`in_whole_steps`). Otherwise the host would complete it, in one way for one process and in another for
    several.

    The sampler counts in rows: a row is a pack or, without packs, a sample. A plan counts in places, one for each
    sample.

    Args:
        num_rows: how many rows every plan has.
        packs: whether rows are packs.
    """

    def __init__(self, num_rows: int, *, packs: bool = False) -> None:
        self.num_rows = num_rows
        self.noun = "packs" if packs else "samples"
        """What a row is called in messages."""
        self.per_step = 1
        """How many rows all processes together train on in one optimizer step; 1: the host has not said."""
        self.shift = 0
        """The row of the plan that the current epoch begins with: not 0 after `resume_at` with other steps."""
        self._cut = False
        self.plan: EpochPlan | None = None
        self.handed_out = 0
        """How many rows of the plan a data loader has taken, including those it read ahead."""

    def places(self, rows: int) -> int:
        """How many places of the plan its first `rows` rows have. After its last row come its first ones again."""
        if self.plan is None or self.plan.packs is None:
            return rows
        rounds, more = divmod(rows, self.num_rows)
        return rounds * len(self.plan) + int(self.plan.packs[more])

    def rows(self, places: int) -> int:
        """How many rows the first `places` places of the plan make up; see `places`."""
        if self.plan is None or self.plan.packs is None:
            return places
        rounds, more = divmod(places, len(self.plan))
        return rounds * self.num_rows + int(np.searchsorted(self.plan.packs, more))

    def in_whole_steps(self, per_step: int, *, cut: bool = False) -> None:
        """Make every epoch a whole number of optimizer steps: `[a, b, c, d, e] -> [a, b, c, d, e, a]` for steps of 2.

        Args:
            per_step: how many rows all processes together train on in one optimizer step.
            cut: leave out an incomplete last step (`[a, b, c, d]`) instead of completing it.

        Raises:
            ValueError: nothing would be left.
        """
        if cut and self.num_rows < per_step:
            raise ValueError(
                f"An epoch of {self.num_rows} {self.noun} has no whole optimizer step of {per_step}, and "
                "drop_last=True leaves out the rest. Leave drop_last (dataloader_drop_last) at False, or make the "
                "batches smaller."
            )
        self.per_step = per_step
        self._cut = cut

    def whole_steps_note(self) -> str:
        """A sentence on what `in_whole_steps` changes; empty if it changes nothing."""
        extra = len(self) - self.num_rows
        if extra < 0:
            return f"drop_last=True leaves out the last {-extra} of {self.num_rows} {self.noun} of each epoch's plan."
        if extra > 0:
            return (
                f"the plan of {self.num_rows} {self.noun} is completed by {extra} from its start, to whole optimizer "
                f"steps of {self.per_step}."
            )
        return ""

    def set_plan(self, plan: EpochPlan) -> None:
        """Set the plan that the next iteration yields. A running iteration does not change."""
        assert plan.num_rows == self.num_rows, "a plan has the constant length of an epoch"
        self.plan = plan
        self.handed_out = 0
        self.shift = 0
        self._current = _Current(plan)

    def resume_at(self, position: int) -> int:
        """Continue the plan at this position once the host has skipped a whole number of steps.

        Hosts count an epoch in steps of one size. If the steps that were trained had another size, the position may
        lie between two of today's. The next iteration is shifted to meet it. What is left of the plan fills the
        epoch's last steps, and the very last one is completed as in every epoch. For a plan of 12 and steps of 4, at
        position 6: skip 4, then `[6, 7, 8, 9], [10, 11, 0, 1]`.

        Args:
            position: how many rows of the plan were trained on.

        Returns:
            How many rows the host must skip: a whole number of steps.
        """
        skipped = len(self) - self._whole(max(0, self.num_rows - position))
        self.shift = position - skipped
        return skipped

    def set_rest(self, plan: EpochPlan, start: int) -> None:
        """Replace the plan from place `start` on, in a running iteration too.

        Raises:
            ValueError: the data loader has read past `start`, so training would differ from the plan.
        """
        assert self.plan is not None
        assert plan.num_rows == self.num_rows
        assert np.array_equal(plan.indices[:start], self.plan.indices[:start]), "samples before start stay as planned"
        if self.handed_out > self.rows(start):
            raise ValueError(
                f"The data loader has read {self.handed_out} {self.noun} of the epoch's plan, but the plan was to "
                f"change from position {self.rows(start)} on. Raise Rescore(lag=), or make the data loader read less "
                "far ahead (dataloader_num_workers, dataloader_prefetch_factor)."
            )
        self.plan = plan
        self._current.plan = plan

    def __len__(self) -> int:
        return self._whole(self.num_rows)

    def _whole(self, rows: int) -> int:
        """So many rows in whole steps."""
        steps = rows // self.per_step if self._cut else -(-rows // self.per_step)
        return steps * self.per_step

    def __iter__(self) -> Iterator[int | tuple[int, ...]]:
        if self.plan is None:
            raise ValueError(
                "There is no plan yet: call curriculum.start_epoch(epoch, model) before you iterate over the data "
                "loader in each epoch (attach does this in the trainer)."
            )
        return self._iterate(self._current, self.shift)

    def _iterate(self, current: _Current, shift: int) -> Iterator[int | tuple[int, ...]]:
        for position in range(shift, shift + len(self)):
            if current is self._current:
                self.handed_out = max(self.handed_out, position + 1)
            plan, row = current.plan, position % self.num_rows
            if plan.packs is None:
                yield int(plan.indices[row])
            else:
                yield tuple(plan.indices[plan.packs[row] : plan.packs[row + 1]].tolist())


def fit_length(plan: EpochPlan, num_samples: int) -> EpochPlan:
    """The plan at the length that the trainer expects.

    A longer plan is cut at its end. A shorter one is repeated from its start, `[a, b, c] -> [a, b, c, a, b]` for 5, so
    the numbers of copies differ by at most one.
    """
    if len(plan) == num_samples:
        return plan
    return plan.take(np.arange(num_samples) % len(plan))


def replace_rest(
    current: EpochPlan,
    new: EpochPlan,
    start: int,
    groups: IntArray,
    pack: Callable[[EpochPlan, int], EpochPlan] | None = None,
) -> EpochPlan:
    """The plan of an epoch that starts with one plan and continues with another.

    The new plan describes the whole epoch, and the samples that were handed out count towards it. For each of them, one
    sample of the same group is removed from the new plan, if there is one: first the same sample, then the last ones.
    What remains follows in the new plan's order, cut at its end to the epoch's length, or in packs. So a prompt whose
    best response has changed is not trained on twice, and no prompt is forgotten.

    Args:
        current: the plan so far.
        new: the new plan of the whole epoch, of the same length if it is not packed.
        start: places of `current` that stay: whole packs.
        groups: `[samples]` equal numbers for samples of the same group, such as the responses to a prompt; `arange` if
            there are no groups.
        pack: where plans are packed: what remains, in so many packs.
    """
    handed_out = current.indices[:start]
    num_groups = int(groups.max(initial=0)) + 1
    to_remove = np.bincount(groups[handed_out], minlength=num_groups)
    # within a group, remove the samples that were handed out first, then from the end of the plan
    trained = np.isin(new.indices, handed_out)
    positions = np.arange(len(new))
    group = groups[new.indices]
    order = np.lexsort((-positions, ~trained, group))
    first = np.searchsorted(group[order], group[order])
    removed = np.zeros(len(new), bool)
    removed[order] = np.arange(len(new)) - first < to_remove[group[order]]
    rest = np.flatnonzero(~removed)
    packs = None
    if pack is None:
        indices, weights = (values[rest[: len(new) - start]] for values in (new.indices, new.weights))
    else:
        assert current.packs is not None
        before = int(np.searchsorted(current.packs, start))
        packed = pack(new.take(rest) if len(rest) else new, current.num_rows - before)
        assert packed.packs is not None
        indices, weights = packed.indices, packed.weights
        packs = np.r_[current.packs[:before], start + packed.packs]
    weights = weights.astype(np.float64)
    remaining_weight = start + len(indices) - current.weights[:start].sum(dtype=np.float64)
    if len(indices) and weights.sum() > 0:
        weights *= remaining_weight / weights.sum()
    return EpochPlan(
        indices=np.r_[handed_out, indices],
        weights=np.r_[current.weights[:start], weights.astype(np.float32)],
        packs=packs,
    )
