"""MatchTeachers, BestSingleTeacher and the weights of KeepByMargin and WeightByColumn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from policy_pools import everything, make_pool, pools_and_plans, rng

from distill_sampler.policies import (
    BestOf,
    BestSingleTeacher,
    Column,
    KeepByMargin,
    KeepTop,
    MatchTeachers,
    SampleBySoftmax,
    WeightByColumn,
    effective_sample_size,
)
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan

NAN = float("nan")
quick = settings(max_examples=60, deadline=None)


def counts(plan: EpochPlan, pool: Pool, column: str) -> Counter[object]:
    encoded = pool.columns[column]
    return Counter(encoded.values[code] for code in encoded.codes[plan.indices])


def many_prompts(num: int = 300) -> Pool:
    """Prompts with three teachers each, of which one always scores best."""
    source = np.random.default_rng(1)
    scores = source.normal(size=3 * num) + np.tile([2.0, 0.5, 0.0], num)
    return make_pool(scores.tolist(), prompt_id=np.repeat(np.arange(num), 3).tolist(), teacher=list("TUV") * num)


@quick
@given(candidates=pools_and_plans(min_size=1))
@pytest.mark.parametrize(
    "of",
    [
        BestOf("up", per="prompt_id"),
        BestOf("down", per="prompt_id", k=2),
        KeepTop("up", num=4),
        SampleBySoftmax("up", temperature=0.5, num_samples=9),
    ],
    ids=repr,
)
@pytest.mark.parametrize("per", [None, "prompt_id"])
def test_a_match_has_exactly_the_teacher_counts_of_the_selection(
    of: Policy, per: str | None, candidates: tuple[Pool, EpochPlan]
) -> None:
    pool, plan = candidates
    selected = of(plan, pool, np.random.default_rng(rng().integers(2**63)))
    match = MatchTeachers(of=of, per=per)(plan, pool, rng())
    assert counts(match, pool, "teacher") == counts(selected, pool, "teacher")
    if per is not None:
        assert counts(match, pool, per) == counts(selected, pool, per)
    if len(set(plan.indices.tolist())) == len(plan) and not isinstance(of, SampleBySoftmax):
        assert max(Counter(match.indices.tolist()).values(), default=1) == 1, "nothing is repeated without need"


@pytest.mark.parametrize("per", [None, "prompt_id"])
def test_a_match_is_random_and_another_each_time(per: str | None) -> None:
    pool = many_prompts()
    selected = BestOf("up", per="prompt_id")(everything(pool), pool, rng())
    match = MatchTeachers(of=BestOf("up", per="prompt_id"), per=per)
    first, second = (match(everything(pool), pool, rng(seed)) for seed in (1, 2))
    shares = np.array(sorted(counts(selected, pool, "teacher").values())) / len(selected)
    by_chance = (shares**2).sum()  # of two independent plans: each teacher has as many samples as there are prompts
    for left, right in ((first, selected), (first, second)):
        common = len(np.intersect1d(left.indices, right.indices)) / len(left)
        assert abs(common - by_chance) < 0.1, (common, by_chance)


def test_a_match_ignores_the_score_within_the_mixture() -> None:
    pool = many_prompts()
    match = MatchTeachers(of=KeepTop("up", fraction=0.3))(everything(pool), pool, rng())
    selected = KeepTop("up", fraction=0.3)(everything(pool), pool, rng())
    teachers = pool.columns["teacher"].codes
    for code in range(3):
        own = teachers == code
        mean = pool.scores["up"][own].mean()
        assert abs(pool.scores["up"][match.indices[own[match.indices]]].mean() - mean) < 0.35
        assert pool.scores["up"][selected.indices[own[selected.indices]]].mean() > mean + 0.3


@pytest.mark.parametrize("of", [[], "best", BestOf, [BestOf]])
def test_a_match_of_no_policy_is_refused(of: object) -> None:
    with pytest.raises(ValueError, match=r"of=.* as a list of policies"):
        MatchTeachers(of=of)  # type: ignore[arg-type]


def test_the_best_single_teacher_has_the_best_mean() -> None:
    pool = make_pool(
        [1.0, 5.0, 1.0, 2.0, NAN], [3.0] * 5, prompt_id=["p", "p", "q", "r", "r"], teacher=["T", "U", "U", "T", "V"]
    )
    pool = replace(pool, columns=pool.columns | make_pool([0.0] * 5, correct=[True, False, False, True, None]).columns)
    plan = everything(pool)
    assert BestSingleTeacher("up")(plan, pool, rng()).indices.tolist() == [1, 2]  # means 1.5, 3, none
    assert BestSingleTeacher(Column("correct"))(plan, pool, rng()).indices.tolist() == [0, 3]
    assert BestSingleTeacher("down")(plan, pool, rng()).indices.tolist() == [0, 3]  # a tie: by name
    assert BestSingleTeacher(named="V")(plan, pool, rng()).indices.tolist() == [4]


def test_with_per_teachers_are_compared_on_the_prompts_that_all_answered() -> None:
    pool = make_pool([1.0, 2.0, 9.0], prompt_id=["p", "p", "q"], teacher=["T", "U", "T"])
    assert BestSingleTeacher("up")(everything(pool), pool, rng()).indices.tolist() == [0, 2]
    assert BestSingleTeacher("up", per="prompt_id")(everything(pool), pool, rng()).indices.tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        ({}, "exactly one of metric="),
        ({"metric": "up", "named": "T"}, "exactly one of metric="),
        ({"named": "T", "per": "prompt_id"}, "leave it out"),
    ],
)
def test_a_best_single_teacher_needs_one_way_to_be_found(arguments: dict[str, str], cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        BestSingleTeacher(**arguments)


def test_a_teacher_that_is_not_there_is_named() -> None:
    pool = make_pool([1.0], teacher=["DeepSeek-R1"])
    with pytest.raises(ValueError, match=r"no teacher 'DeepSeek-R2'.*Did you mean 'DeepSeek-R1'"):
        BestSingleTeacher(named="DeepSeek-R2")(everything(pool), pool, rng())


@quick
@given(candidates=pools_and_plans(min_size=1))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_margins_are_the_closed_form_of_lark(k: int, candidates: tuple[Pool, EpochPlan]) -> None:
    pool, plan = candidates
    plan = EpochPlan(indices=np.unique(plan.indices))
    assume(np.isfinite(pool.scores["up"][plan.indices]).any())
    pool = replace(pool, scores=pool.scores | {"up": pool.scores["up"].round(6)})  # no differences of the last bits
    result = KeepByMargin("up", per="prompt_id", k=k)(plan, pool, rng())
    expected: dict[int, float] = {}
    groups = pool.columns["prompt_id"].codes
    for group in set(groups[plan.indices].tolist()):
        rows = [i for i in plan.indices.tolist() if groups[i] == group and np.isfinite(pool.scores["up"][i])]
        rows.sort(key=lambda i: (-pool.scores["up"][i], int(pool.content_hash[i])))
        top = rows[:k]
        energies = pool.scores["up"][top].astype(float)
        threshold = pool.scores["up"][rows[k]] if len(rows) > k else energies.min(initial=np.inf) - 1e-8
        total = energies.mean() - threshold if top else 0
        for i, energy in zip(top, energies, strict=True):
            q = (energy - threshold) / (len(top) * total) if total > 1e-12 else 1 / len(top)
            expected[i] = len(top) * q  # a group's weights add up to its size
    assert result.indices.tolist() == sorted(expected)
    np.testing.assert_allclose(result.weights, [expected[i] for i in sorted(expected)], rtol=1e-4, atol=1e-6)


def test_a_column_multiplies_the_weights_of_the_plan() -> None:
    pool = make_pool([0.0] * 4, weight=[1, 3, 0, 0.5])
    plan = EpochPlan(indices=np.array([3, 1, 2, 0]), weights=np.array([2.0, 1.0, 0.5, 0.5]))
    result = WeightByColumn()(plan, pool, rng())
    assert result.indices.tolist() == [3, 1, 2, 0]
    np.testing.assert_allclose(result.weights, np.array([1.0, 3.0, 0.0, 0.5]) / 1.125, rtol=1e-6, atol=1e-30)
    assert effective_sample_size(result) < 4


@pytest.mark.parametrize(
    ("weights", "cure"),
    [([1, -1], "have no weight of 0 or more"), ([1, None], "Fill the column"), ([0, 0], "Give some of them a larger")],
)
def test_weights_that_cannot_be_used_are_refused(weights: list[float | None], cure: str) -> None:
    pool = make_pool([0.0] * 2, weight=weights)
    with pytest.raises(ValueError, match=cure):
        WeightByColumn()(everything(pool), pool, rng())
