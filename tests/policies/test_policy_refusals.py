"""Mistakes of users: each error names the policy, its argument and the cure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from policy_pools import everything, make_pool, rng

from distill_sampler.policies import (
    BestOf,
    BestTeacher,
    CompetencePacing,
    GroupByLength,
    KeepCorrect,
    KeepTop,
    Lexicographic,
    MixDomains,
    MixTeachers,
    RankAverage,
    SampleBySoftmax,
    Shuffle,
    SortBy,
    WeightBySoftmax,
    WithinLength,
    apply_policies,
)
from distill_sampler.types import EpochPlan

BAD: list[tuple[Callable[[], Any], str, str]] = [
    (lambda: BestOf("up", per="p", k=0), "BestOf(k=0)", "at least 1"),
    (lambda: BestOf("up", per="p", min_score=2, max_score=1), "BestOf(min_score=2, max_score=1)", "lower one"),
    (lambda: BestOf(RankAverage("up"), per="p", min_score=2), "BestOf(min_score=2", "the name of one metric"),
    (lambda: BestTeacher("up", num_samples=0), "BestTeacher(num_samples=0)", "at least 1"),
    (lambda: BestTeacher(RankAverage("up")), "BestTeacher(metric=RankAverage('up'))", "the name of one metric"),  # type: ignore[arg-type]
    (lambda: CompetencePacing("up", initial=0, epochs=3), "CompetencePacing(initial=0)", "(0, 1]"),
    (lambda: CompetencePacing("up", initial=0.1, epochs=0), "CompetencePacing(epochs=0)", "at least 1"),
    (lambda: GroupByLength(0), "GroupByLength(mega_batch=0)", "at least 1"),
    (lambda: KeepCorrect("c", per="p"), "KeepCorrect(if_none='keep_best') needs metric=", "if_none='drop'"),
    (lambda: KeepCorrect("c", metric="up"), "KeepCorrect(if_none='keep_best')", "needs per="),
    (lambda: KeepCorrect("c", if_none="error"), "KeepCorrect(if_none='error')", "needs per="),
    (lambda: KeepCorrect("c", if_none="drop", metric="up"), "KeepCorrect(metric='up')", "leave it out"),
    (
        lambda: KeepCorrect("c", if_none="keep", per="p"),
        "KeepCorrect(if_none='keep')",
        "'keep_best', 'drop' or 'error'",
    ),  # type: ignore[arg-type]
    (lambda: KeepTop("up"), "KeepTop", "exactly one of fraction="),
    (lambda: KeepTop("up", fraction=0), "KeepTop(fraction=0)", "(0, 1]"),
    (lambda: KeepTop("up", fraction=50), "KeepTop(fraction=50)", "a half is 0.5"),
    (lambda: KeepTop("up", fraction=float("nan")), "KeepTop(fraction=nan)", "(0, 1]"),
    (lambda: KeepTop("up", fraction=0.5, num=3), "KeepTop", "exactly one of fraction="),
    (lambda: KeepTop("up", max_tokens=0), "KeepTop(max_tokens=0)", "positive"),
    (lambda: KeepTop("up", num=0), "KeepTop(num=0)", "at least 1"),
    (lambda: Lexicographic(), "Lexicographic()", "at least one"),
    (lambda: MixDomains({}), "MixDomains({})", "each domain a share"),
    (lambda: MixDomains({"x": -1}), "MixDomains({'x': -1})", "0 or more"),
    (lambda: MixDomains({"x": 0}), "MixDomains({'x': 0})", "not all of them 0"),
    (lambda: MixDomains({"x": 1}, by="words"), "MixDomains(by='words')", "'samples' or 'tokens'"),  # type: ignore[arg-type]
    (lambda: MixDomains({"x": 1}, num=0), "MixDomains(num=0)", "at least 1"),
    (lambda: MixTeachers(max_share=0), "MixTeachers(max_share=0)", "(0, 1]"),
    (lambda: RankAverage(), "RankAverage()", "at least one"),
    (lambda: RankAverage("a", "b", weights=[1]), "RankAverage(weights=[1])", "one weight for each of the 2"),
    (lambda: SampleBySoftmax("up", 0), "SampleBySoftmax(temperature=0)", "above 0"),
    (lambda: SampleBySoftmax("up", 1, num_samples=0), "SampleBySoftmax(num_samples=0)", "at least 1"),
    (lambda: SampleBySoftmax("up", 1, replacement=False), "SampleBySoftmax(num_samples=None", "give num_samples="),
    (lambda: Shuffle(bucket=0), "Shuffle(bucket=0)", "at least 1 sample, or None"),
    (lambda: SortBy("up", jitter=-1), "SortBy(jitter=-1)", "0 or more"),
    (lambda: WeightBySoftmax("up", -1), "WeightBySoftmax(temperature=-1)", "above 0"),
    (lambda: WeightBySoftmax("up", 1, floor=1), "WeightBySoftmax(floor=1)", "[0, 1)"),
    (lambda: WithinLength(), "WithinLength", "min_tokens=, max_tokens= or both"),
    (lambda: WithinLength(min_tokens=9, max_tokens=3), "WithinLength(min_tokens=9, max_tokens=3)", "smaller number"),
]


@pytest.mark.parametrize(("make", "argument", "cure"), BAD, ids=[argument for _, argument, _ in BAD])
def test_a_bad_argument_is_named_with_its_cure(make: Callable[[], Any], argument: str, cure: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(argument)}.*{re.escape(cure)}"):
        make()


def test_a_misspelt_metric_is_reported_with_its_policy_and_the_closest_name() -> None:
    pool = make_pool([1.0, 2.0])
    with pytest.raises(ValueError, match=r"^KeepTop\(metric='upp', .*There is no metric 'upp'.*Did you mean 'up'"):
        apply_policies([KeepTop("upp", num=1)], everything(pool), pool, seed=0)
    with pytest.raises(ValueError, match=r"^SortBy\(metric=RankAverage\('up', 'x'\).*There is no metric 'x'"):
        apply_policies([SortBy(RankAverage("up", "x"))], everything(pool), pool, seed=0)


def test_a_misspelt_column_is_reported_with_its_policy_and_the_closest_name() -> None:
    pool = make_pool([1.0, 2.0], prompt_id=["a", "b"])
    with pytest.raises(ValueError, match=r"^BestOf\(.*There is no column 'prompt'.*Did you mean 'prompt_id'"):
        apply_policies([BestOf("up", per="prompt")], everything(pool), pool, seed=0)


def test_a_policy_that_leaves_no_sample_is_named() -> None:
    pool = make_pool([1.0, 2.0], prompt_id=["a", "b"])
    with pytest.raises(ValueError, match=r"^WithinLength\(min_tokens=50, .*\) keeps none of the 2 samples .* loosen"):
        apply_policies([Shuffle(), WithinLength(min_tokens=50)], everything(pool), pool, seed=0)
    with pytest.raises(ValueError, match=r"^BestOf\(.* min_score=5.*\) keeps none of the 2 samples .* loosen"):
        apply_policies([BestOf("up", per="prompt_id", min_score=5)], everything(pool), pool, seed=0)


def test_a_policy_whose_samples_have_no_score_names_the_metric() -> None:
    pool = make_pool([float("nan")] * 2)
    with pytest.raises(ValueError, match=r"^KeepTop\(.*'up'; score them before"):
        apply_policies([KeepTop("up", num=1)], everything(pool), pool, seed=0)


def test_an_empty_plan_stays_empty_and_no_policies_change_nothing() -> None:
    pool = make_pool([1.0])
    empty = EpochPlan(indices=np.zeros(0, np.int64))
    assert apply_policies([KeepTop("up", num=1), Shuffle()], empty, pool, seed=0) == empty
    assert apply_policies([], everything(pool), pool, seed=0) == everything(pool)


def test_each_policy_has_its_own_randomness() -> None:
    pool = make_pool(range(50))
    alone = apply_policies([Shuffle()], everything(pool), pool, seed=3)
    assert apply_policies([SortBy("up"), Shuffle()], everything(pool), pool, seed=3) != alone
    assert apply_policies([Shuffle()], everything(pool), pool, seed=4) != alone
    assert apply_policies([Shuffle()], everything(pool), make_pool(range(50), epoch=1), seed=3) != alone


def test_an_absurd_number_of_draws_is_refused_before_memory_runs_out() -> None:
    pool = make_pool([1.0] * 400, prompt_id=[f"p{n}" for n in range(400)])
    policy = SampleBySoftmax("up", temperature=1.0, num_samples=2_500_000, per="prompt_id")
    with pytest.raises(ValueError, match=r"num_samples=2500000, per='prompt_id'.*draws from each group"):
        policy(everything(pool), pool, rng())
