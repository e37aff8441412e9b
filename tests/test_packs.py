"""Packing as arithmetic: every sample once, nothing overfull, the oldest first, an epoch of constantly many packs."""

import dataclasses
from collections import deque
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_sampler import EpochPlan
from distill_sampler.planning.packs import Packing, lay_out, pack_plan
from distill_sampler.types import IntArray

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=300).map(lambda lengths: np.array(lengths, np.int64))
PACKINGS = st.builds(Packing, capacity=st.integers(40, 90), window=st.sampled_from([1, 2, 3, 8, 64, 1000]))


def packs_of(lengths: IntArray, packing: Packing) -> list[list[int]]:
    order, bounds = lay_out(lengths, packing)
    return [order[start:stop].tolist() for start, stop in pairwise(bounds)]


def one_by_one(lengths: IntArray, packing: Packing) -> list[list[int]]:
    """What `lay_out` does, as one would say it."""
    behind = deque(range(len(lengths)))
    waiting = [behind.popleft() for _ in range(min(packing.window, len(lengths)))]
    packs: list[list[int]] = []
    room = 0
    while waiting:
        fitting = [place for place in waiting if lengths[place] <= room]
        if fitting and packs:
            oldest = min(waiting)
            place = oldest if oldest in fitting else min(fitting, key=lambda place: (-lengths[place], place))
        else:
            place, room = min(waiting), packing.capacity
            packs.append([])
        packs[-1].append(place)
        room -= lengths[place]
        waiting.remove(place)
        if behind:
            waiting.append(behind.popleft())
    return [sorted(pack) for pack in packs]


@settings(deadline=None)
@given(lengths=LENGTHS, packing=PACKINGS)
def test_packs_are_filled_with_the_oldest_of_the_window_and_once_it_does_not_fit_with_the_longest_that_does(
    lengths: IntArray, packing: Packing
) -> None:
    assert packs_of(lengths, packing) == one_by_one(lengths, packing)


@settings(deadline=None)
@given(lengths=LENGTHS, packing=PACKINGS)
def test_every_sample_is_in_one_pack_and_no_pack_is_overfull(lengths: IntArray, packing: Packing) -> None:
    packs = packs_of(lengths, packing)
    assert sorted(place for pack in packs for place in pack) == list(range(len(lengths)))
    assert all(lengths[pack].sum() <= packing.capacity for pack in packs)


@given(lengths=LENGTHS, capacity=st.integers(40, 90))
def test_a_window_of_one_keeps_the_order(lengths: IntArray, capacity: int) -> None:
    order, bounds = lay_out(lengths, Packing(capacity=capacity, window=1))
    assert order.tolist() == list(range(len(lengths)))
    sums = np.add.reduceat(lengths, bounds[:-1])
    assert (sums[:-1] + lengths[bounds[1:-1]] > capacity).all()  # what follows did not fit


@pytest.mark.parametrize("capacity", [2_000, 2_000_000], ids=["32 bits", "64 bits"])
def test_a_long_plan_is_packed_in_stretches_each_as_if_alone(capacity: int) -> None:
    lengths = np.random.default_rng(0).integers(capacity // 50, capacity // 2, 20_000)
    packing = Packing(capacity=capacity, window=64)
    packs = packs_of(lengths, packing)
    assert packs == [
        [start + place for place in pack]
        for start in range(0, len(lengths), 4096)
        for pack in packs_of(lengths[start : start + 4096], packing)
    ]
    assert max(abs(place - now) for now, place in enumerate(place for pack in packs for place in pack)) < 64
    assert lengths.sum() / (len(packs) * capacity) > 0.98


def test_no_sample_at_all_makes_no_pack() -> None:
    assert packs_of(np.zeros(0, np.int64), Packing(capacity=10)) == []
    with pytest.raises(ValueError, match="left no sample"):
        pack_plan(EpochPlan(indices=np.zeros(0, np.int64)), np.ones(3, np.int64), Packing(capacity=10))


@settings(deadline=None, max_examples=40)
@given(lengths=LENGTHS, packing=PACKINGS, num_packs=st.integers(1, 60), data=st.data())
def test_an_epoch_has_constantly_many_packs_cut_behind_the_last_or_gone_on_from_the_first(
    lengths: IntArray, packing: Packing, num_packs: int, data: st.DataObject
) -> None:
    indices = np.array(data.draw(st.permutations(range(len(lengths)))))
    weights = np.linspace(0.5, 1.5, len(lengths)) if len(lengths) > 1 else np.ones(1)
    plan = EpochPlan(indices=indices, weights=weights)
    packed, counts = pack_plan(plan, lengths, dataclasses.replace(packing, num_packs=num_packs))
    assert packed.packs is not None
    assert packed.num_rows == counts.packs == num_packs
    sums = np.add.reduceat(lengths[packed.indices], packed.packs[:-1])
    assert sums.max() <= packing.capacity
    assert counts.tokens == sums.sum() == lengths.sum() - counts.cut + counts.repeated
    copies = np.bincount(packed.indices, minlength=len(lengths))
    assert copies.max() - copies.min() <= 1
    assert 0 in (counts.cut, counts.repeated)
    weight_of = dict(zip(indices.tolist(), weights, strict=True))
    ratio = packed.weights / np.array([weight_of[index] for index in packed.indices.tolist()])
    assert ratio == pytest.approx(ratio[0], rel=1e-5)
    assert packed.weights.mean() == pytest.approx(1, abs=1e-3)


@settings(deadline=None)
@given(lengths=LENGTHS, packing=PACKINGS, padded=st.booleans(), balance=st.sampled_from([2, 3, 8, 1000]))
def test_balanced_packs_are_the_same_packs_sorted_by_cost_within_each_stretch(
    lengths: IntArray, packing: Packing, padded: bool, balance: int
) -> None:
    def cost(pack: list[int]) -> int:
        return len(pack) * int(lengths[pack].max()) ** 2 if padded else int((lengths[pack] ** 2).sum())

    packing = dataclasses.replace(packing, padded=padded)
    plain = packs_of(lengths, packing)
    packed, counts = pack_plan(
        EpochPlan(indices=np.arange(len(lengths))), lengths, dataclasses.replace(packing, balance=balance)
    )
    assert packed.packs is not None
    packs = [packed.indices[start:stop].tolist() for start, stop in pairwise(packed.packs)]
    for number, start in enumerate(range(0, len(plain), balance)):
        expected = sorted(plain[start : start + balance], key=cost, reverse=number % 2 == 1)
        assert packs[start : start + balance] == expected
    assert counts.moved == max(abs(place - now) for now, place in enumerate(packed.indices.tolist()))


def test_the_table_says_how_to_lower_much_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    plan = EpochPlan(indices=np.arange(500))
    for window, named in ((8, True), (500, False)):
        _, counts = pack_plan(plan, lengths, Packing(capacity=400, window=window, padded=True))
        assert counts.padding is not None
        assert ("pack_window=" in counts.sentence()) == named


def test_packs_are_part_of_a_plans_identity() -> None:
    plain = EpochPlan(indices=np.arange(4))
    packed, other = (EpochPlan(indices=np.arange(4), packs=np.array(packs)) for packs in ([0, 2, 4], [0, 1, 4]))
    assert packed == EpochPlan(indices=np.arange(4), packs=np.array([0, 2, 4]))
    assert len({plan.fingerprint for plan in (plain, packed, other)}) == 3
    assert plain != packed
    assert packed != other
    assert (plain.num_rows, packed.num_rows) == (4, 2)


def test_what_packs_cannot_be_is_refused_with_the_argument() -> None:
    for argument, given_ in (
        ("pack_to", {"capacity": 0}),
        ("pack_window", {"capacity": 9, "window": 0}),
        ("pack_balance", {"capacity": 9, "balance": 0}),
    ):
        with pytest.raises(ValueError, match=argument):
            Packing(**given_)


@settings(deadline=None)
@given(lengths=LENGTHS, budget=st.integers(40, 300), window=st.sampled_from([1, 4, 64, 1000]))
def test_padded_batches_hold_every_sample_once_within_their_tokens(lengths: IntArray, budget: int, window: int) -> None:
    packing = Packing(capacity=budget, window=window, padded=True)
    batches = packs_of(lengths, packing)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    assert all(len(batch) * lengths[batch].max() <= budget for batch in batches)
    assert [min(batch) for batch in batches] == sorted(min(batch) for batch in batches)
    assert all(batch == sorted(batch) for batch in batches)
    assert max(max(batch) - min(batch) for batch in batches) < 2 * window + budget
    _, counts = pack_plan(EpochPlan(indices=np.arange(len(lengths))), lengths, packing)
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    assert counts.padding == padded - lengths.sum()


def test_padding_stays_under_three_percent() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(800), 0.8, 10_000), 8, 8192).astype(np.int64)
    plan = EpochPlan(indices=np.arange(len(lengths)))
    _, counts = pack_plan(plan, lengths, Packing(capacity=16_384, window=1024, padded=True))
    assert counts.padding is not None
    assert counts.padding < 0.03 * counts.tokens
    assert "padding" in counts.sentence()
