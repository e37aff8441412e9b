"""A numeric column of the data set wherever a policy takes a metric: same plan, same explanation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from policy_pools import everything, make_pool, pools_and_plans, rng

from distill_sampler.planning.why import ExplainedPlan, PolicyFacts
from distill_sampler.policies import (
    BestOf,
    Column,
    CompetencePacing,
    KeepCorrect,
    KeepTop,
    Lexicographic,
    RankAverage,
    SampleBySoftmax,
    SortBy,
    WeightBySoftmax,
)
from distill_sampler.protocols import Policy, Pool
from distill_sampler.specs import parse_policies
from distill_sampler.types import EncodedColumn, EpochPlan

DIFFICULTY = Column("difficulty", higher_is_better=False)
EASY = [
    (SortBy("down"), SortBy(DIFFICULTY)),
    (KeepTop("down", fraction=0.5), KeepTop(DIFFICULTY, fraction=0.5)),
    (BestOf("down", per="prompt_id", max_score=2.5), BestOf(DIFFICULTY, per="prompt_id", max_score=2.5)),
    (SampleBySoftmax("down", temperature=1.0), SampleBySoftmax(DIFFICULTY, temperature=1.0)),
    (WeightBySoftmax("down", temperature=1.0), WeightBySoftmax(DIFFICULTY, temperature=1.0)),
    (CompetencePacing("down", initial=0.5, epochs=2), CompetencePacing(DIFFICULTY, initial=0.5, epochs=2)),
    (
        KeepCorrect("correct", metric="down", per="prompt_id"),
        KeepCorrect("correct", metric=DIFFICULTY, per="prompt_id"),
    ),
    (KeepTop(RankAverage("down", "up"), num=3), KeepTop(RankAverage(DIFFICULTY, "up"), num=3)),
    (SortBy(Lexicographic("down", "up")), SortBy(Lexicographic(DIFFICULTY, "up"))),
]


@settings(max_examples=30, deadline=None)
@given(candidates=pools_and_plans())
@pytest.mark.parametrize(("by_metric", "by_column"), EASY, ids=lambda policy: type(policy).__name__)
def test_a_column_plans_as_a_metric_with_the_same_numbers_does(
    by_metric: Policy, by_column: Policy, candidates: tuple[Pool, EpochPlan]
) -> None:
    pool, plan = candidates
    numbers = np.array([np.nan if v is None else v for v in pool.columns["difficulty"].values])
    same = replace(pool, scores=pool.scores | {"down": numbers[pool.columns["difficulty"].codes]})
    assert by_column(plan, pool, rng()) == by_metric(plan, same, rng())


def test_a_column_is_read_and_no_metric() -> None:
    policy = BestOf(RankAverage(DIFFICULTY, "up"), per="prompt_id")
    assert policy.uses_columns == ("prompt_id", "difficulty")
    assert policy.uses_metrics == ("up",)
    assert not BestOf(DIFFICULTY, per="prompt_id", min_score=1).length_depends_on_scores, "columns are known before"


def test_true_and_false_are_numbers_and_infinity_is_none() -> None:
    pool = make_pool([0.0] * 4, reward=[True, False, None, float("inf")])
    np.testing.assert_array_equal(pool.goodness(Column("reward")), [1, 0, np.nan, np.nan])


def test_text_is_refused_by_the_columns_name() -> None:
    pool = make_pool([0.0, 1.0], level=["easy", "hard"])
    with pytest.raises(ValueError, match=r"Column\('level'\) holds 'easy'.*Convert the column to numbers"):
        SortBy(Column("level"))(everything(pool), pool, rng())


def test_people_can_type_a_column() -> None:
    assert parse_policies(["SortBy(Column(difficulty, higher_is_better=False))"]) == [SortBy(DIFFICULTY)]
    assert parse_policies(["KeepTop(RankAverage(rsr, Column(reward)), num=5)"]) == [
        KeepTop(RankAverage("rank_surprisal_ratio", Column("reward")), num=5)
    ]
    with pytest.raises(ValueError, match="Column goes inside a policy"):
        parse_policies(["Column(difficulty)"])


def test_a_choice_by_a_column_is_explained_like_one_by_a_metric() -> None:
    pool = make_pool([0.0] * 3, prompt_id=["p", "p", "q"], difficulty=[3, 1, 2])
    explained = ExplainedPlan.from_policies([BestOf(DIFFICULTY, per="prompt_id")], np.arange(3), pool, 0)
    assert explained.reason(0) == (
        "left out by BestOf: its difficulty 3 is number 2 of 2 with prompt_id = p; the best, sample 1, has 1"
    )
    assert explained.reason(1) == "kept by BestOf: its difficulty 1 is number 1 of 2 with prompt_id = p"


def test_an_expression_of_one_metric_is_not_explained_by_ranks_of_that_metric() -> None:
    pool = make_pool([1.0, 2.0], difficulty=[9, 1])
    explained = ExplainedPlan.from_policies([KeepTop(RankAverage("up", DIFFICULTY), num=1)], np.arange(2), pool, 0)
    assert explained.reason(0) == "left out by KeepTop: up 1, difficulty = 9"


def test_the_facts_of_a_policy_survive_a_file() -> None:
    facts = PolicyFacts.of(BestOf(DIFFICULTY, per="prompt_id"))
    assert PolicyFacts.from_json(facts.to_json()) == facts
    of_an_older_file = {"text": "BestOf('up')", "metrics": ["up"], "columns": [], "group_by": None}
    assert PolicyFacts.from_json(of_an_older_file).ranks_by == "up"


def test_many_distinct_numbers_are_read_at_once() -> None:
    column = EncodedColumn(codes=np.arange(3), values=np.array([0.5, np.nan, 2]))
    pool = replace(make_pool([0.0] * 3), columns={"reward": column})
    np.testing.assert_array_equal(pool.goodness(Column("reward")), [0.5, np.nan, 2])
