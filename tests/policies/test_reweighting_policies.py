"""SampleBySoftmax, WeightBySoftmax and the effective sample size."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_pools import everything, make_pool, pools_and_plans, rng

from distill_sampler.policies import SampleBySoftmax, WeightBySoftmax, effective_sample_size
from distill_sampler.protocols import Pool
from distill_sampler.types import EncodedColumn, EpochPlan, FloatArray

NAN = float("nan")
quick = settings(max_examples=100, deadline=None)
SCORES = np.array([0.0, 0.3, -1.0, 2.0, 1.5, NAN])
EPS = 1e-9


def softmax(goodness: FloatArray, temperature: float) -> FloatArray:
    weights = np.nan_to_num(np.exp(goodness / temperature))
    return weights / weights.sum()


def chi_square(counts: FloatArray, probabilities: FloatArray) -> float:
    """The chi-square statistic of these counts as a standard normal deviate (Wilson and Hilferty, 1931)."""
    assert counts[probabilities == 0].sum() == 0
    counts, probabilities = counts[probabilities > 0], probabilities[probabilities > 0]
    expected = counts.sum() * probabilities
    spread = 2 / (9 * (len(counts) - 1))
    return float(
        ((((counts - expected) ** 2 / expected).mean() / (1 - 1 / len(counts))) ** (1 / 3) - 1 + spread) / spread**0.5
    )


def many_groups(num_groups: int, scores: FloatArray) -> Pool:
    """Groups that all hold the same scores."""
    pool = make_pool([0.0])
    num = num_groups * len(scores)
    return replace(
        pool,
        scores={"up": np.tile(scores, num_groups), "down": -np.tile(scores, num_groups)},
        columns={
            "prompt_id": EncodedColumn(codes=np.repeat(np.arange(num_groups), len(scores)), values=range(num_groups))
        },
        lengths=np.ones(num, np.int64),
        content_hash=rng(7).integers(2**64, size=num, dtype=np.uint64),
    )


@pytest.mark.parametrize("metric", ["up", "down"])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_draw_frequencies_match_the_probabilities(metric: str, temperature: float) -> None:
    pool = make_pool(SCORES, down=-SCORES)
    drawn = SampleBySoftmax(metric, temperature, num_samples=10**5)(everything(pool), pool, rng())
    assert chi_square(np.bincount(drawn.indices, minlength=6), softmax(SCORES, temperature)) < 4


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("metric", ["up", "down"])
def test_draw_frequencies_match_the_probabilities_in_each_group(metric: str, replacement: bool) -> None:
    pool = many_groups(10**5, SCORES)
    policy = SampleBySoftmax(metric, 0.7, num_samples=1, replacement=replacement, per="prompt_id")
    drawn = policy(everything(pool), pool, rng())
    assert (drawn.indices // 6).tolist() == list(range(10**5))
    assert chi_square(np.bincount(drawn.indices % 6, minlength=6), softmax(SCORES, 0.7)) < 4


def test_without_replacement_the_draws_are_successive() -> None:
    pool = many_groups(10**5, SCORES)
    policy = SampleBySoftmax("up", 1.0, num_samples=2, replacement=False, per="prompt_id")
    pairs = (policy(everything(pool), pool, rng()).indices % 6).reshape(-1, 2)
    p = softmax(SCORES, 1.0)[:5]
    expected = {(i, j): p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]) for j in range(5) for i in range(j)}
    counts = Counter(map(tuple, pairs.tolist()))
    assert chi_square(np.array([counts[pair] for pair in expected]), np.array([*expected.values()])) < 4


def test_draws_in_one_group_are_independent() -> None:
    pool = many_groups(10**5, np.array([0.0, 0.0]))
    drawn = SampleBySoftmax("up", 1.0, num_samples=2, per="prompt_id")(everything(pool), pool, rng()).indices % 2
    counts = np.bincount(drawn.reshape(-1, 2).sum(1))
    assert chi_square(counts, np.array([0.25, 0.5, 0.25])) < 4


def test_a_repeated_sample_is_drawn_in_proportion() -> None:
    pool = make_pool([0.0, 0.0])
    plan = EpochPlan(indices=np.array([1, 0, 1, 1]))
    counts = np.bincount(SampleBySoftmax("up", 1.0, num_samples=10**5)(plan, pool, rng()).indices)
    assert chi_square(counts, np.array([0.25, 0.75])) < 4
    alone = SampleBySoftmax("up", 1.0, num_samples=1, replacement=False)
    counts = np.bincount([alone(plan, pool, rng(seed)).indices[0] for seed in range(4000)])
    assert chi_square(counts, np.array([0.25, 0.75])) < 4


@quick
@given(candidates=pools_and_plans(min_size=1), replacement=st.booleans(), metric=st.sampled_from(["up", "down"]))
def test_at_temperature_zero_softmax_is_the_argmax(
    candidates: tuple[Pool, EpochPlan], replacement: bool, metric: str
) -> None:
    pool, plan = candidates
    goodness = pool.goodness(metric)[plan.indices]
    scored = goodness[~np.isnan(goodness)]
    for temperature in (1e-300, 5e-324):
        policy = SampleBySoftmax(metric, temperature, num_samples=1, replacement=replacement)
        drawn = policy(plan, pool, rng()).indices
        assert set(pool.goodness(metric)[drawn]) == ({scored.max()} if len(scored) else set())
        weights = WeightBySoftmax(metric, temperature)(EpochPlan(indices=plan.indices), pool, rng()).weights
        if len(scored):
            best = goodness == scored.max()
            np.testing.assert_allclose(weights, best * len(plan) / best.sum(), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("temperature", [1e12, math.inf])
@pytest.mark.parametrize("replacement", [True, False])
def test_at_infinite_temperature_softmax_is_the_uniform_draw(temperature: float, replacement: bool) -> None:
    pool = many_groups(10**5, SCORES)
    policy = SampleBySoftmax("up", temperature, num_samples=1, replacement=replacement, per="prompt_id")
    counts = np.bincount(policy(everything(pool), pool, rng()).indices % 6, minlength=6)
    assert chi_square(counts, np.array([0.2] * 5 + [0.0])) < 4
    scored = EpochPlan(indices=np.arange(5))
    assert WeightBySoftmax("up", temperature)(scored, pool, rng()) == scored


def test_softmax_draws_as_many_as_it_is_asked_for() -> None:
    pool = make_pool([1, 2, NAN, 4, NAN], prompt_id=list("aaabb"))
    plan = everything(pool)

    def num(**arguments: object) -> int:
        return len(SampleBySoftmax("up", 1.0, **arguments)(plan, pool, rng()))  # type: ignore[arg-type]

    assert num() == 5
    assert num(num_samples=100) == 100
    assert num(num_samples=2, replacement=False) == 2
    assert num(num_samples=100, replacement=False) == 3
    assert num(per="prompt_id") == 5
    assert num(per="prompt_id", num_samples=7) == 14
    assert num(per="prompt_id", num_samples=2, replacement=False) == 3


@pytest.mark.slow
def test_there_may_be_more_candidates_than_torch_multinomial_takes() -> None:
    num = 2**24 + 5
    pool = many_groups(num, np.array([0.0]))
    drawn = SampleBySoftmax("up", 1.0, num_samples=num)(everything(pool), pool, rng())
    assert len(drawn) == num
    assert drawn.indices.max() > 2**24
    assert abs(len(np.unique(drawn.indices)) / num - (1 - 1 / math.e)) < 1e-3


@quick
@given(candidates=pools_and_plans(min_size=1), temperature=st.floats(0.1, 10), floor=st.floats(0, 0.9))
def test_weights_are_floor_and_softmax_times_what_they_were(
    candidates: tuple[Pool, EpochPlan], temperature: float, floor: float
) -> None:
    pool, plan = candidates
    result = WeightBySoftmax("down", temperature, floor)(plan, pool, rng())
    goodness = pool.goodness("down")[plan.indices]
    if np.isnan(goodness).all():
        assert result == plan
        return
    expected = (floor + (1 - floor) * len(plan) * softmax(goodness, temperature)) * plan.weights
    assert result.indices.tolist() == plan.indices.tolist()
    np.testing.assert_allclose(result.weights, expected / expected.mean(), rtol=1e-4, atol=1e-30)


def test_no_weight_is_below_the_floor_and_the_unscored_have_it() -> None:
    pool = make_pool(SCORES)
    weights = WeightBySoftmax("up", temperature=0.1, floor=0.25)(everything(pool), pool, rng()).weights
    assert weights.min() == weights[5] == 0.25
    assert weights[5] < weights[4] < weights[3]


def test_a_plan_survives_losing_all_its_heavy_samples() -> None:
    pool = make_pool([0.0, 0.0, 1.0])
    weighted = WeightBySoftmax("up", temperature=1e-9)(everything(pool), pool, rng())
    assert weighted.take(np.array([0, 1])) == EpochPlan(indices=np.array([0, 1]))


def test_effective_sample_size_is_kishs() -> None:
    assert effective_sample_size(EpochPlan(indices=np.arange(7))) == 7
    assert effective_sample_size(EpochPlan(indices=np.arange(4), weights=np.array([4 - 3 * EPS, EPS, EPS, EPS]))) == (
        pytest.approx(1)
    )
    uneven = EpochPlan(indices=np.arange(3), weights=np.array([0.5, 1.0, 1.5]))
    assert effective_sample_size(uneven) == pytest.approx(9 / 3.5)
    assert effective_sample_size(EpochPlan(indices=np.zeros(0, np.int64))) == 0


def test_effective_sample_size_counts_a_repeated_sample_once() -> None:
    assert effective_sample_size(EpochPlan(indices=np.array([3, 3, 9, 9]))) == 2
    assert effective_sample_size(EpochPlan(indices=np.array([3, 3, 9]))) == pytest.approx(9 / 5)
