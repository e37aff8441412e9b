"""RankAverage and Lexicographic."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from policy_pools import everything, make_pool, pools_and_plans, rng

from distill_sampler.policies import BestOf, KeepTop, Lexicographic, MetricExpression, RankAverage, SortBy
from distill_sampler.protocols import Pool
from distill_sampler.types import EpochPlan

NAN = float("nan")
quick = settings(max_examples=100, deadline=None)


def scored_by_both(pool: Pool) -> list[int]:
    return [i for i in range(len(pool.lengths)) if not math.isnan(pool.scores["up"][i] + pool.scores["down"][i])]


@quick
@given(candidates=pools_and_plans())
def test_rank_average_is_the_mean_of_mid_ranks(candidates: tuple[Pool, EpochPlan]) -> None:
    pool, _ = candidates
    rows = scored_by_both(pool)
    expected = np.full(len(pool.lengths), NAN)
    for i in rows:
        shares = []
        for metric in ("up", "down"):
            goodness = pool.goodness(metric)
            below = sum(goodness[j] < goodness[i] for j in rows)
            equal = sum(goodness[j] == goodness[i] for j in rows)
            shares.append((below + equal / 2) / len(rows))
        expected[i] = (3 * shares[0] + shares[1]) / 4
    np.testing.assert_allclose(pool.goodness(RankAverage("up", "down", weights=(3, 1))), expected)


@quick
@given(candidates=pools_and_plans())
def test_lexicographic_orders_as_tuples_do(candidates: tuple[Pool, EpochPlan]) -> None:
    pool, _ = candidates
    combined = pool.goodness(Lexicographic("up", "down"))
    rows = scored_by_both(pool)
    assert np.flatnonzero(~np.isnan(combined)).tolist() == rows
    pairs = [(pool.goodness("up")[i], pool.goodness("down")[i]) for i in rows]
    for i, pair in zip(rows, pairs, strict=True):
        for j, other in zip(rows, pairs, strict=True):
            assert (combined[i] < combined[j]) == (pair < other)


def test_expressions_go_wherever_a_metrics_name_goes() -> None:
    pool = make_pool([1, 1, 3], down=[7, 5, 9], prompt_id=list("aaa"))
    both = Lexicographic("up", "down")
    assert BestOf(both, per="prompt_id")(everything(pool), pool, rng()).indices.tolist() == [2]
    assert SortBy(both)(everything(pool), pool, rng()).indices.tolist() == [2, 1, 0]
    assert KeepTop(RankAverage(both, "down"), num=1)(everything(pool), pool, rng()).indices.tolist() == [1]


def test_an_expression_scores_nothing_where_no_sample_has_all_scores() -> None:
    pool = make_pool([NAN, 1.0], [1.0, NAN])
    for expression in (RankAverage("up", "down"), Lexicographic("up", "down")):
        assert np.isnan(pool.goodness(expression)).all()


def test_an_expression_tells_which_metrics_it_uses_each_once() -> None:
    expression: MetricExpression = RankAverage("a", Lexicographic("b", "a"), "c")
    assert expression.uses_metrics == ("a", "b", "c")
    assert SortBy(expression).uses_metrics == ("a", "b", "c")
    assert repr(expression) == "RankAverage('a', Lexicographic('b', 'a'), 'c')"


def test_expressions_are_compared_by_content() -> None:
    assert RankAverage("a", "b", weights=[1, 2]) == RankAverage("a", "b", weights=(1.0, 2.0))
    assert RankAverage("a", "b") != RankAverage("b", "a")
    assert hash(Lexicographic("a", "b")) == hash(Lexicographic("a", "b"))


def test_a_misspelt_metric_in_an_expression_is_named() -> None:
    pool = make_pool([1.0])
    with pytest.raises(ValueError, match=r"There is no metric 'dwn'; .* Did you mean 'down'"):
        SortBy(RankAverage("up", "dwn"))(everything(pool), pool, rng())
