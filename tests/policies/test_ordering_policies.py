"""SortBy, Shuffle, CompetencePacing, Interleave and GroupByLength."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_pools import everything, make_pool, pools_and_plans, rng

from distill_sampler.policies import CompetencePacing, GroupByLength, Interleave, Shuffle, SortBy
from distill_sampler.protocols import Pool
from distill_sampler.types import EpochPlan

NAN = float("nan")
quick = settings(max_examples=100, deadline=None)


def chunks(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


@quick
@given(candidates=pools_and_plans(), metric=st.sampled_from(["up", "down"]), best_first=st.booleans())
def test_sort_by_equals_sorting_with_the_unscored_last(
    candidates: tuple[Pool, EpochPlan], metric: str, best_first: bool
) -> None:
    pool, plan = candidates
    goodness = pool.goodness(metric) * (1 if best_first else -1)

    def place(position: int) -> tuple[bool, float, int, int]:
        index = plan.indices[position]
        unscored = math.isnan(goodness[index])
        return unscored, 0.0 if unscored else -goodness[index], int(pool.content_hash[index]), position

    expected = sorted(range(len(plan)), key=place)
    assert SortBy(metric, best_first=best_first)(plan, pool, rng()) == plan.take(np.array(expected, np.int64))


@quick
@given(num=st.integers(1, 200), jitter=st.floats(0, 2), seed=st.integers(0, 100))
def test_jitter_moves_no_sample_further_than_its_share(num: int, jitter: float, seed: int) -> None:
    pool = make_pool([*range(num, 0, -1), NAN, NAN])
    order = SortBy("up", jitter=jitter)(everything(pool), pool, rng(seed)).indices
    assert np.abs(order[:num] - np.arange(num)).max() <= jitter * num + 1
    assert sorted(order[num:]) == [num, num + 1]


def test_jitter_is_drawn_anew_by_the_generator() -> None:
    pool = make_pool(range(100))
    orders = {tuple(SortBy("up", jitter=0.2)(everything(pool), pool, rng(seed)).indices.tolist()) for seed in range(5)}
    assert len(orders) == 5


def test_shuffle_gives_every_order_alike() -> None:
    pool = make_pool(range(4))
    counts = Counter(tuple(Shuffle()(everything(pool), pool, rng(seed)).indices.tolist()) for seed in range(6000))
    statistic = sum((count - 250) ** 2 / 250 for count in counts.values())
    assert len(counts) == 24
    assert statistic < 23 + 5 * math.sqrt(2 * 23)


def test_shuffle_gives_repeats_every_place_alike() -> None:
    pool = make_pool(range(2))
    plan = EpochPlan(indices=np.array([0, 0, 0, 1]))
    places = Counter(Shuffle()(plan, pool, rng(seed)).indices.tolist().index(1) for seed in range(2000))
    assert all(abs(places[place] - 500) < 100 for place in range(4))


@quick
@given(num=st.integers(0, 60), bucket=st.integers(1, 70), seed=st.integers(0, 100))
def test_shuffle_within_buckets_keeps_each_bucket_in_place(num: int, bucket: int, seed: int) -> None:
    pool = make_pool(range(num))
    result = Shuffle(bucket=bucket)(everything(pool), pool, rng(seed)).indices.tolist()
    assert [sorted(part) for part in chunks(result, bucket)] == chunks(list(range(num)), bucket)


def test_shuffle_within_buckets_shuffles() -> None:
    pool = make_pool(range(600))
    results = [Shuffle(bucket=3)(everything(pool), pool, rng(seed)).indices[:3].tolist() for seed in range(100)]
    assert len(set(map(tuple, results))) == 6


@pytest.mark.parametrize("epoch", range(6))
def test_competence_pacing_takes_the_papers_share_repeated_evenly(epoch: int) -> None:
    pool = make_pool([*range(100), NAN, NAN], epoch=epoch)
    counts = Counter(CompetencePacing("down", initial=0.2, epochs=4)(everything(pool), pool, rng()).indices.tolist())
    share = min(1, math.sqrt(epoch * (1 - 0.2**2) / 4 + 0.2**2))
    assert sorted(counts) == list(range(math.ceil(share * 100 - 1e-9)))  # the lowest scores are the best
    assert counts.total() == 102
    assert max(counts.values()) - min(counts.values()) <= 1


def test_competence_pacing_draws_who_is_repeated_anew() -> None:
    pool = make_pool(range(10))
    policy = CompetencePacing("up", initial=0.7, epochs=5)
    repeated = {
        index
        for seed in range(50)
        for index, count in Counter(policy(everything(pool), pool, rng(seed)).indices.tolist()).items()
        if count == 2
    }
    assert repeated == set(range(3, 10))


@quick
@given(candidates=pools_and_plans(min_size=1))
def test_interleave_gives_every_stretch_its_share(candidates: tuple[Pool, EpochPlan]) -> None:
    pool, plan = candidates
    codes = pool.columns["teacher"].codes
    result = codes[Interleave("teacher")(plan, pool, rng()).indices]
    for code in range(3):
        share = np.mean(result == code)
        so_far = np.cumsum(result == code)
        assert np.abs(so_far - share * np.arange(1, len(plan) + 1)).max() <= 1 + 1.5 * share


@quick
@given(candidates=pools_and_plans())
def test_interleave_keeps_the_order_within_a_value(candidates: tuple[Pool, EpochPlan]) -> None:
    pool, plan = candidates
    codes = pool.columns["teacher"].codes
    result = Interleave("teacher")(plan, pool, rng()).indices
    for code in range(3):
        assert result[codes[result] == code].tolist() == plan.indices[codes[plan.indices] == code].tolist()


def test_interleave_alternates_equal_values() -> None:
    pool = make_pool(range(6), teacher=list("AAABBB"))
    result = "".join("AB"[i // 3] for i in Interleave("teacher")(everything(pool), pool, rng()).indices)
    assert result in ("ABABAB", "BABABA")


@quick
@given(candidates=pools_and_plans(), mega_batch=st.integers(1, 12))
def test_group_by_length_sorts_each_stretch(candidates: tuple[Pool, EpochPlan], mega_batch: int) -> None:
    pool, plan = candidates
    result = GroupByLength(mega_batch)(plan, pool, rng()).indices.tolist()
    expected = [
        index
        for part in chunks(plan.indices.tolist(), mega_batch)
        for index in sorted(part, key=lambda index: (-pool.lengths[index], int(pool.content_hash[index])))
    ]
    assert result == expected


def test_equal_rows_of_a_data_set_are_no_trouble() -> None:
    pool = make_pool([1.0] * 5, teacher=["A"] * 5, lengths=[3] * 5)
    pool = replace(pool, content_hash=np.full(5, 7, np.uint64))
    for policy in (Shuffle(), SortBy("up"), GroupByLength(2), Interleave("teacher")):
        assert sorted(policy(everything(pool), pool, rng()).indices) == [0, 1, 2, 3, 4]
