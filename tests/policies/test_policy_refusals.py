"""What users get wrong: one sentence each, naming the policy, its argument and the cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from policy_pools import everything, make_pool

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

BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: BestOf("up", per="p", k=0), r"BestOf\(k=0\): k must be at least 1"),
    (lambda: BestOf("up", per="p", min_score=2, max_score=1), r"BestOf\(min_score=2, max_score=1\): .* lower one"),
    (lambda: BestOf(RankAverage("up"), per="p", min_score=2), r"BestOf\(min_score=2, .*bounds need the name"),
    (lambda: BestTeacher("up", num_samples=0), r"BestTeacher\(num_samples=0\): read at least 1"),
    (lambda: BestTeacher(RankAverage("up")), r"BestTeacher\(metric=RankAverage\('up'\)\): .* name one metric"),  # type: ignore[arg-type]
    (lambda: CompetencePacing("up", initial=0, epochs=3), r"CompetencePacing\(initial=0\): a share in \(0, 1\]"),
    (lambda: CompetencePacing("up", initial=0.1, epochs=0), r"CompetencePacing\(epochs=0\): it takes at least 1"),
    (lambda: GroupByLength(0), r"GroupByLength\(mega_batch=0\): a stretch holds at least 1"),
    (lambda: KeepCorrect("c", per="p"), r"KeepCorrect\(if_none='keep_best'\) needs metric= .* or choose"),
    (lambda: KeepCorrect("c", metric="up"), r"KeepCorrect\(if_none='keep_best'\) needs per="),
    (lambda: KeepCorrect("c", if_none="error"), r"KeepCorrect\(if_none='error'\) needs per="),
    (lambda: KeepCorrect("c", if_none="drop", metric="up"), r"KeepCorrect\(metric='up'\) is read only .* leave it out"),
    (lambda: KeepCorrect("c", if_none="keep", per="p"), r"KeepCorrect\(if_none='keep'\): choose"),  # type: ignore[arg-type]
    (lambda: KeepTop("up"), r"KeepTop: give exactly one of fraction= .* and num="),
    (lambda: KeepTop("up", fraction=0), r"KeepTop\(fraction=0\): the fraction must lie in \(0, 1\]"),
    (lambda: KeepTop("up", fraction=50), r"KeepTop\(fraction=50\): .* a half is 0.5"),
    (lambda: KeepTop("up", fraction=float("nan")), r"KeepTop\(fraction=nan\)"),
    (lambda: KeepTop("up", num=0), r"KeepTop\(num=0\): num must be at least 1"),
    (lambda: Lexicographic(), r"Lexicographic\(\): name at least one"),
    (lambda: MixDomains({}), r"MixDomains\({}\): give each domain a share"),
    (lambda: MixDomains({"x": -1}), r"MixDomains\({'x': -1}\): give each domain a share, 0 or more"),
    (lambda: MixDomains({"x": 0}), r"MixDomains\({'x': 0}\): .* not all of them 0"),
    (lambda: MixDomains({"x": 1}, by="words"), r"MixDomains\(by='words'\): choose"),  # type: ignore[arg-type]
    (lambda: MixDomains({"x": 1}, num=0), r"MixDomains\(num=0\)"),
    (lambda: MixTeachers(max_share=0), r"MixTeachers\(max_share=0\): .* \(0, 1\]"),
    (lambda: RankAverage(), r"RankAverage\(\): name at least one"),
    (lambda: RankAverage("a", "b", weights=[1]), r"RankAverage\(weights=\[1\]\): give one weight for each of the 2"),
    (lambda: SampleBySoftmax("up", 0), r"SampleBySoftmax\(temperature=0\): the temperature must be above 0; .*KeepTop"),
    (lambda: SampleBySoftmax("up", 1, num_samples=0), r"SampleBySoftmax\(num_samples=0\): draw at least 1"),
    (lambda: SampleBySoftmax("up", 1, replacement=False), r"SampleBySoftmax\(num_samples=None, .* give num_samples="),
    (lambda: Shuffle(bucket=0), r"Shuffle\(bucket=0\): .* None shuffles all"),
    (lambda: SortBy("up", jitter=-1), r"SortBy\(jitter=-1\): a share of the epoch, 0 or more"),
    (lambda: WeightBySoftmax("up", -1), r"WeightBySoftmax\(temperature=-1\): the temperature must be above 0"),
    (lambda: WeightBySoftmax("up", 1, floor=1), r"WeightBySoftmax\(floor=1\): a weight in \[0, 1\)"),
    (lambda: WithinLength(), r"WithinLength: give min_tokens=, max_tokens= or both"),
    (lambda: WithinLength(min_tokens=9, max_tokens=3), r"WithinLength\(min_tokens=9, max_tokens=3\): no length"),
]


@pytest.mark.parametrize(("make", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_bad_arguments_are_refused_in_a_sentence(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_misspelt_metric_is_named_with_its_policy() -> None:
    pool = make_pool([1.0, 2.0])
    with pytest.raises(ValueError, match=r"^KeepTop\(metric='upp', .*There is no metric 'upp'.*Did you mean 'up'"):
        apply_policies([KeepTop("upp", num=1)], everything(pool), pool, seed=0)
    with pytest.raises(ValueError, match=r"^SortBy\(metric=RankAverage\('up', 'x'\).*There is no metric 'x'"):
        apply_policies([SortBy(RankAverage("up", "x"))], everything(pool), pool, seed=0)


def test_a_misspelt_column_is_named_with_its_policy() -> None:
    pool = make_pool([1.0, 2.0], prompt_id=["a", "b"])
    with pytest.raises(ValueError, match=r"^BestOf\(.*There is no column 'prompt'.*Did you mean 'prompt_id'"):
        apply_policies([BestOf("up", per="prompt")], everything(pool), pool, seed=0)


def test_a_plan_that_becomes_empty_is_refused_by_the_policys_name() -> None:
    pool = make_pool([1.0, 2.0], prompt_id=["a", "b"])
    with pytest.raises(ValueError, match=r"^WithinLength\(min_tokens=50, .*\) keeps none of the 2 samples .* loosen"):
        apply_policies([Shuffle(), WithinLength(min_tokens=50)], everything(pool), pool, seed=0)
    with pytest.raises(ValueError, match=r"^BestOf\(.* min_score=5.*\) keeps none of the 2 samples .* loosen"):
        apply_policies([BestOf("up", per="prompt_id", min_score=5)], everything(pool), pool, seed=0)


def test_a_plan_without_any_score_is_refused_as_such() -> None:
    pool = make_pool([float("nan")] * 2)
    with pytest.raises(ValueError, match=r"^KeepTop\(.*none of them has a score by 'up'; score them before"):
        apply_policies([KeepTop("up", num=1)], everything(pool), pool, seed=0)


def test_an_empty_plan_passes_through() -> None:
    pool = make_pool([1.0])
    empty = EpochPlan(indices=np.zeros(0, np.int64))
    assert apply_policies([KeepTop("up", num=1), Shuffle()], empty, pool, seed=0) == empty
    assert apply_policies([], everything(pool), pool, seed=0) == everything(pool)


def test_each_policy_has_randomness_of_its_own() -> None:
    pool = make_pool(range(50))
    alone = apply_policies([Shuffle()], everything(pool), pool, seed=3)
    assert apply_policies([SortBy("up"), Shuffle()], everything(pool), pool, seed=3) != alone
    assert apply_policies([Shuffle()], everything(pool), pool, seed=4) != alone
    assert apply_policies([Shuffle()], everything(pool), make_pool(range(50), epoch=1), seed=3) != alone
