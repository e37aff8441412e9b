"""Packs: the samples of a plan laid end to end in rows of a fixed number of tokens, after the plan was made.

A window holds the next samples of the plan that are not packed yet. A pack takes the oldest sample of the window, again
and again, as long as that fits. When it does not fit, the pack takes the longest sample of the window that does, and
when none fits, the next pack begins, with the oldest. So packs keep the plan's order, and only what fills their ends is
trained early, by at most a window of samples. (With a window of 1 this is next fit.)

With variable-length attention, a full pack of one long sample takes longer than a full pack of many short ones, so
processes that train on both in one step wait for each other. Packs can therefore be balanced: within each stretch of
`balance` packs, they are sorted by the cost of their attention, so that neighbours, and thus the packs of one step,
cost about the same. As every second stretch is sorted the other way round, neighbours across two stretches do too.

Packs depend on lengths alone, so equal arguments give equal packs on every process. A long plan is divided into
stretches, which are packed independently and at the same time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.planning.token_batches import lay_out_padded
from distill_sampler.types import EpochPlan, IntArray, is_whole

MUCH_PADDING = 0.03
"""From which share of padding on, the table of a plan says how to lower it."""
_STRETCH_PACKS = 256
"""How many packs a stretch has at least. (The last pack of a stretch is not full.)"""
_STRETCH_SAMPLES = 4096
"""How many samples a stretch has at least."""
_SIDE_BY_SIDE = 512
"""How many stretches are packed at the same time. Their windows fit into the processor's cache."""


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Packing:
    """How plans are packed.

    Raises:
        ValueError: a number is not whole, or not positive.
    """

    capacity: int
    """How many tokens a pack has at most."""
    window: int = 64
    """From how many waiting samples a pack is filled. 1: strictly in the plan's order."""
    balance: int = 1
    """How many packs in a row are sorted by the cost of their attention. 1: packs stay in the plan's order."""
    num_packs: int | None = None
    """How many packs every epoch has. None: as many as the first plan fills."""
    padded: bool = False
    """Whether a pack is a batch whose samples are padded to the longest of them, instead of a row of samples laid end
    to end. Its padding counts as tokens."""

    @property
    def argument(self) -> str:
        """The argument of `attach` that asks for it."""
        return "batch_tokens" if self.padded else "pack_to"

    @property
    def described(self) -> dict[str, int | None]:
        """The fields as plain values."""
        return asdict(self)

    def __post_init__(self) -> None:
        for name, argument in (("capacity", self.argument), ("window", "pack_window"), ("balance", "pack_balance")):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise ValueError(f"{argument}={value!r}: give a positive whole number.")
            object.__setattr__(self, name, int(value))  # JSON takes no numbers of numpy
        if self.window > 2**15:
            raise ValueError(f"pack_window={self.window}: give a number of samples up to {2**15}.")


@dataclass(frozen=True, kw_only=True)
class PackCounts:
    """The numbers of an epoch's packs."""

    packs: int
    """How many packs there are."""
    capacity: int
    """How many tokens a pack has at most."""
    tokens: int
    """How many tokens the epoch trains on."""
    cut: int
    """How many tokens at the end of the plan are left out."""
    repeated: int
    """How many tokens are repeated from the plan's start to fill all packs."""
    moved: int
    """How many places a sample is moved at most."""
    padding: int | None = None
    """How many tokens of padding the epoch has; None: samples are laid end to end."""
    whole_window: bool = True
    """Whether the window holds the whole plan, so that a larger one would change nothing."""

    @property
    def fill(self) -> float:
        """Which part of the packs' capacity is used, padding included."""
        return (self.tokens + (self.padding or 0)) / (self.packs * self.capacity)

    def sentence(self) -> str:
        """The numbers in words."""
        what, padding = "packs", ""
        if self.padding is not None:
            what, padding = "batches", f" and {self.padding / self.tokens:.1%} padding"
        text = (
            f"{self.packs} {what} of up to {self.capacity} tokens, {self.fill:.1%} full: {self.tokens:,} tokens"
            f"{padding}. Samples are up to {self.moved} places from where they were planned."
        )
        if self.cut:
            text += f" The last {self.cut:,} tokens of the plan are left out."
        if self.repeated:
            text += f" {self.repeated:,} of the tokens are from the plan's start once more."
        if self.padding is not None and self.padding > MUCH_PADDING * self.tokens and not self.whole_window:
            text += " A larger pack_window= lowers the padding, and moves samples further."
        return text


def pack_plan(plan: EpochPlan, lengths: IntArray, packing: Packing) -> tuple[EpochPlan, PackCounts]:
    """The plan in packs, in the order in which they are trained on.

    An epoch has a constant number of packs. A plan that fills more is cut after the last one, and a plan that fills
    fewer repeats its first packs.

    Args:
        plan: the policies' plan.
        lengths: `[samples]` the length of each sample of the data set in tokens, at most `packing.capacity`.
        packing: how to pack.

    Raises:
        ValueError: the plan is empty.
    """
    if not len(plan):
        raise ValueError("The policies left no sample, so there is nothing to pack. Loosen a policy that selects.")
    own = lengths[plan.indices]
    order, bounds = balanced(own, *lay_out(own, packing), packing)
    filled = len(bounds) - 1
    num_packs = packing.num_packs or filled
    rounds, more = divmod(num_packs, filled)
    whole_rounds = bounds[:-1] + len(plan) * np.arange(rounds)[:, None]
    bounds = np.concatenate([whole_rounds.ravel(), len(plan) * rounds + bounds[: more + 1]])
    places = np.arange(bounds[-1])
    chosen = plan.take(order[places % len(plan)])
    trained = lengths[chosen.indices]
    tokens = int(trained.sum())
    padded = int((np.maximum.reduceat(trained, bounds[:-1]) * np.diff(bounds)).sum())
    counts = PackCounts(
        packs=num_packs,
        capacity=packing.capacity,
        tokens=tokens,
        cut=max(0, int(own.sum()) - tokens),
        repeated=max(0, tokens - int(own.sum())),
        moved=int(np.abs(order - np.arange(len(order))).max()),
        padding=padded - tokens if packing.padded else None,
        whole_window=packing.window >= len(plan),
    )
    return EpochPlan(indices=chosen.indices, weights=chosen.weights, packs=bounds), counts


def lay_out(lengths: IntArray, packing: Packing) -> tuple[IntArray, IntArray]:
    """`([n], [packs + 1])`: the places `0..n-1` in the order of the packs, and where each pack begins in this order.

    Within a pack, places ascend. `lengths [5, 4, 3, 2, 1]` in packs of 6 with a window of 2
    `-> [0, 1, 3, 2, 4], [0, 1, 3, 5]`.

    Args:
        lengths: `[n]` the length of the sample at each place in tokens, from 1 to the capacity.
        packing: how to pack.
    """
    assert len(lengths) == 0 or 1 <= lengths.min() <= lengths.max() <= packing.capacity
    if len(lengths) == 0:
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    if packing.padded:
        return lay_out_padded(lengths, packing.capacity, packing.window)
    if packing.window == 1:
        return np.arange(len(lengths)), _next_fit(lengths, packing.capacity)
    return _best_fit(lengths, packing.capacity, packing.window)


def balanced(lengths: IntArray, order: IntArray, bounds: IntArray, packing: Packing) -> tuple[IntArray, IntArray]:
    """What `lay_out` returned, with each `packing.balance` packs sorted by the cost of their attention.

    The cost of a pack is the sum of its squared lengths; of a padded batch, its size times the largest one.

    Args:
        lengths: `[n]` the length of the sample at each place in tokens.
        order: `[n]` the places in the order of the packs.
        bounds: `[packs + 1]` where each pack begins in this order.
        packing: how to pack.
    """
    if packing.balance == 1 or len(order) == 0:
        return order, bounds
    squares, sizes = lengths[order] ** 2, np.diff(bounds)
    costs = (
        np.maximum.reduceat(squares, bounds[:-1]) * sizes if packing.padded else np.add.reduceat(squares, bounds[:-1])
    )
    packs = np.arange(len(sizes))
    stretch = packs // packing.balance
    sorted_packs = np.lexsort((packs, np.where(stretch % 2, -costs, costs), stretch))
    starts, sizes = bounds[:-1][sorted_packs], sizes[sorted_packs]
    ends = np.cumsum(sizes)
    return order[np.arange(len(order)) + np.repeat(starts - ends + sizes, sizes)], np.concatenate([[0], ends])


def _next_fit(lengths: IntArray, capacity: int) -> IntArray:
    """Where packs begin if each one takes the next samples until one does not fit."""
    ends = np.cumsum(lengths).tolist()
    bounds = [0]
    while (start := bounds[-1]) < len(ends):
        used = ends[start - 1] if start else 0
        bounds.append(bisect_right(ends, used + capacity, start, min(len(ends), start + capacity)))
    return np.array(bounds)


def _best_fit(lengths: IntArray, capacity: int, window: int) -> tuple[IntArray, IntArray]:
    """See `lay_out`. In each turn, every stretch places one sample, so that numpy works on all stretches at once."""
    per_pack = capacity * len(lengths) // int(lengths.sum()) + 1
    bits = (min(len(lengths), max(_STRETCH_SAMPLES, _STRETCH_PACKS * per_pack)) - 1).bit_length()
    stretch = 1 << bits
    placed = [
        _fill(lengths[start : start + _SIDE_BY_SIDE * stretch], capacity, window, bits)
        for start in range(0, len(lengths), _SIDE_BY_SIDE * stretch)
    ]
    by_pack = np.concatenate(placed)  # [stretches, places]: a pack's number in the stretch << bits | place
    by_pack.sort(axis=1)
    first = np.arange(len(by_pack))[:, None] << bits
    order = ((by_pack & (stretch - 1)) + first).ravel()
    pack = ((by_pack >> bits) + first).ravel()
    if len(order) > len(lengths):  # the padding of the last stretch
        kept = order < len(lengths)
        order, pack = order[kept], pack[kept]
    return order, np.flatnonzero(np.concatenate([[True], pack[1:] != pack[:-1], [True]]))


def _fill(lengths: IntArray, capacity: int, window: int, bits: int) -> IntArray:
    """`[stretches, places]`: each place with its pack, as `pack << bits | place`.

    A waiting sample is a number, `length << bits | number of places after it in the stretch`. A longer sample has a
    larger number, and of equally long samples, the older one has. The sample that fits best has the smallest distance
    below `room << bits | all ones`. Larger numbers wrap around, to distances in the upper half.

    The last stretch is padded with samples of length 0, which always fit and change nothing.
    """
    stretch = 1 << bits
    window = min(window, stretch)
    kind: Any = np.uint32 if (capacity + 2) << bits < 2**31 else np.uint64
    shift, ages = kind(bits), kind(stretch - 1)
    upper_half = kind(1) << kind(8 * np.dtype(kind).itemsize - 1)
    whole_room = kind(capacity << bits) | ages
    num_stretches = -(-len(lengths) // stretch)
    numbers: Any = np.zeros(num_stretches * stretch, kind)
    numbers[: len(lengths)] = lengths
    behind = np.arange(stretch - 1, -1, -1, dtype=kind)
    numbers = np.ascontiguousarray((numbers.reshape(num_stretches, stretch) << shift | behind).T)
    # [window, stretches] the waiting samples, and [places, stretches] the slot of each; an empty slot holds `nobody`
    waiting = numbers[:window].copy()
    nobody = upper_half & ~ages
    slots = np.zeros((stretch, num_stretches), np.int16)
    slots[:window] = np.arange(window)[:, None]
    columns = np.arange(num_stretches)
    room: Any = np.zeros(num_stretches, kind)
    pack = np.full(num_stretches, -1)
    placed = np.empty((stretch, num_stretches), np.int64)
    distance = np.empty_like(waiting)
    for turn in range(stretch):
        age = (waiting & ages).max(0)
        chosen = waiting[slots[(ages - age).astype(np.int64), columns], columns]  # the oldest
        crowded = np.flatnonzero(chosen > room)
        if len(crowded):
            np.subtract(room[crowded], waiting[:, crowded], out=distance[:, : len(crowded)])
            nearest = distance[:, : len(crowded)].min(0)
            fits = nearest < upper_half
            chosen[crowded[fits]] = (room[crowded] - nearest)[fits]
            begins = crowded[~fits]
            room[begins] = whole_room
            pack[begins] += 1
        room -= chosen & ~ages
        place = (ages - (chosen & ages)).astype(np.int64)
        placed[turn] = pack << bits | place
        slot = slots[place, columns]
        if turn + window < stretch:
            waiting[slot, columns] = numbers[turn + window]
            slots[turn + window] = slot
        else:
            waiting[slot, columns] = nobody
    return placed.T


def require_same_packing(saved: Mapping[str, Any] | None, here: Packing | None) -> None:
    """Check that a saved state was packed in the same way.

    Args:
        saved: `Packing.described` of the state; None: it has no packs.
        here: the packing of the run that continues.

    Raises:
        ValueError: they differ.
    """
    if saved == (None if here is None else here.described):
        return
    if saved is None:
        raise ValueError(
            "The curriculum's state has no packs, but here plans are packed. Resume without pack_to= and "
            "batch_tokens=, or start a new run from the checkpoint's weights."
        )
    own = (
        "none"
        if here is None
        else f"{here.num_packs} of {here.capacity} tokens (pack_window={here.window}, pack_balance={here.balance})"
    )
    raise ValueError(
        f"The curriculum's state has epochs of {saved['num_packs']} packs of {saved['capacity']} tokens "
        f"(pack_window={saved['window']}, pack_balance={saved['balance']}), but here they have {own}. Resume with "
        f"{Packing(**saved).argument}={saved['capacity']}, pack_window={saved['window']}, "
        f"pack_balance={saved['balance']}, and "
        f"Curriculum(num_tokens={saved['num_packs'] * saved['capacity']}) if the policies have changed."
    )
