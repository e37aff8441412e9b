"""BestOf, KeepTop, KeepCorrect, BestTeacher and WithinLength against plain loops."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_pools import encode, everything, make_pool, pools_and_plans, rng

from distill_sampler.policies import BestOf, BestTeacher, KeepCorrect, KeepTop, WithinLength
from distill_sampler.protocols import Pool
from distill_sampler.types import EpochPlan

NAN = float("nan")
quick = settings(max_examples=100, deadline=None)


def groups_of(plan: EpochPlan, pool: Pool, column: str) -> dict[int, list[int]]:
    """For each value of the column the places in the plan, in order."""
    groups = defaultdict(list)
    for place, index in enumerate(plan.indices.tolist()):
        groups[int(pool.columns[column].codes[index])].append(place)
    return groups


def best_places(plan: EpochPlan, pool: Pool, metric: str, places: list[int]) -> list[int]:
    """The scored ones of these places in the plan, best first, ties by content, then by place."""
    goodness = pool.goodness(metric)
    scored = [place for place in places if not math.isnan(goodness[plan.indices[place]])]
    return sorted(scored, key=lambda p: (-goodness[plan.indices[p]], int(pool.content_hash[plan.indices[p]]), p))


@quick
@given(candidates=pools_and_plans(), metric=st.sampled_from(["up", "down"]), k=st.integers(1, 4))
def test_best_of_equals_sorting_each_group(candidates: tuple[Pool, EpochPlan], metric: str, k: int) -> None:
    pool, plan = candidates
    groups = groups_of(plan, pool, "prompt_id").values()
    expected = sorted(place for places in groups for place in best_places(plan, pool, metric, places)[:k])
    assert BestOf(metric, per="prompt_id", k=k)(plan, pool, rng()) == plan.take(np.array(expected, np.int64))


@quick
@given(candidates=pools_and_plans(), k=st.integers(1, 4))
def test_best_of_picks_min_k_n_per_group(candidates: tuple[Pool, EpochPlan], k: int) -> None:
    pool, plan = candidates
    codes = pool.columns["prompt_id"].codes
    kept = Counter(codes[BestOf("up", per="prompt_id", k=k)(plan, pool, rng()).indices].tolist())
    scored = Counter(codes[[i for i in plan.indices.tolist() if not np.isnan(pool.scores["up"][i])]].tolist())
    assert kept == {group: min(k, num) for group, num in scored.items()}


def test_best_of_guards_are_in_the_metrics_own_units() -> None:
    pool = make_pool([1.0, 2.0, 3.0, 4.0, NAN, 9.0], prompt_id=list("aaabbb"))
    plan = everything(pool)
    assert BestOf("down", per="prompt_id", min_score=2.0)(plan, pool, rng()).indices.tolist() == [1, 3]
    assert BestOf("up", per="prompt_id", max_score=4.0)(plan, pool, rng()).indices.tolist() == [2, 3]
    assert BestOf("up", per="prompt_id", max_score=3.5)(plan, pool, rng()).indices.tolist() == [2]


def test_best_of_guards_let_everything_pass_in_a_dry_run() -> None:
    pool = replace(make_pool([0.0, 0.0, 0.0], prompt_id=list("aab")), dry_run=True)
    assert len(BestOf("up", per="prompt_id", min_score=5.0)(everything(pool), pool, rng())) == 2


def test_best_of_sees_differences_that_float32_does_not() -> None:
    for better in (0, 1):
        pool = make_pool([1.0 + 1e-12 * (better == i) for i in range(2)], prompt_id=["a", "a"])
        assert BestOf("up", per="prompt_id")(everything(pool), pool, rng()).indices.tolist() == [better]


@quick
@given(candidates=pools_and_plans(), fraction=st.floats(0.01, 1))
def test_keep_top_equals_sorting(candidates: tuple[Pool, EpochPlan], fraction: float) -> None:
    pool, plan = candidates
    expected = best_places(plan, pool, "down", list(range(len(plan))))[: math.ceil(fraction * len(plan) - 1e-9)]
    result = KeepTop("down", fraction=fraction)(plan, pool, rng())
    assert result == plan.take(np.array(sorted(expected), np.int64))


@quick
@given(candidates=pools_and_plans(), one=st.floats(0.01, 1), other=st.floats(0.01, 1))
def test_keep_top_is_monotone_in_the_fraction(candidates: tuple[Pool, EpochPlan], one: float, other: float) -> None:
    pool, plan = candidates
    small, large = (KeepTop("up", fraction=fraction)(plan, pool, rng()) for fraction in sorted([one, other]))
    assert Counter(small.indices.tolist()) <= Counter(large.indices.tolist())


def test_keep_top_of_a_tenth_of_seventy_is_seven() -> None:
    pool = make_pool(range(70))
    assert KeepTop("up", fraction=0.1)(everything(pool), pool, rng()).indices.tolist() == list(range(63, 70))


@quick
@given(candidates=pools_and_plans(), max_tokens=st.integers(1, 60))
def test_keep_top_of_a_budget_is_the_best_up_to_the_first_that_no_longer_fits(
    candidates: tuple[Pool, EpochPlan], max_tokens: int
) -> None:
    pool, plan = candidates
    kept: list[int] = []
    for place in best_places(plan, pool, "down", list(range(len(plan)))):
        if sum(int(pool.lengths[plan.indices[each]]) for each in [*kept, place]) > max_tokens:
            break
        kept.append(place)
    result = KeepTop("down", max_tokens=max_tokens)(plan, pool, rng())
    assert result == plan.take(np.array(sorted(kept), np.int64))
    assert len(KeepTop("down", num=1, max_tokens=max_tokens)(plan, pool, rng())) == min(len(kept), 1)


@quick
@given(candidates=pools_and_plans())
def test_keep_correct_never_empties_a_prompt(candidates: tuple[Pool, EpochPlan]) -> None:
    pool, plan = candidates
    column = pool.columns["correct"]
    expected = []
    for places in groups_of(plan, pool, "prompt_id").values():
        correct = [place for place in places if column.values[column.codes[plan.indices[place]]] is True]
        by_content = sorted(places, key=lambda place: (int(pool.content_hash[plan.indices[place]]), place))
        expected += correct or (best_places(plan, pool, "down", places) or by_content)[:1]
    result = KeepCorrect("correct", metric="down", per="prompt_id")(plan, pool, rng())
    assert result == plan.take(np.array(sorted(expected), np.int64))


def test_keep_correct_drops_or_refuses_prompts_without_a_correct_response() -> None:
    pool = make_pool([1, 2, 3], prompt_id=["a", "a", "b"], correct=[1.0, 0.0, NAN])
    assert KeepCorrect("correct", if_none="drop")(everything(pool), pool, rng()).indices.tolist() == [0]
    with pytest.raises(
        ValueError, match=r"KeepCorrect\(if_none='error'\): 1 prompts .* prompt_id='b'.* if_none='keep_best'"
    ):
        KeepCorrect("correct", if_none="error", per="prompt_id")(everything(pool), pool, rng())


def test_keep_correct_keeps_correct_samples_without_a_score() -> None:
    pool = make_pool([NAN, 2], prompt_id=["a", "a"], correct=[True, False])
    policy = KeepCorrect("correct", metric="up", per="prompt_id")
    assert policy(everything(pool), pool, rng()).indices.tolist() == [0]


@pytest.mark.parametrize("value", ["True", "yes", 0.5, 2])
def test_keep_correct_refuses_values_other_than_true_and_false(value: object) -> None:
    pool = make_pool([1.0, 2.0], correct=[True, value])
    with pytest.raises(ValueError, match=r"KeepCorrect\(column='correct'\): .* must hold true or false"):
        KeepCorrect("correct", if_none="drop")(everything(pool), pool, rng())


def test_best_teacher_ranks_by_the_groups_score_not_by_the_mean() -> None:
    # Lower is better. Ratio of sums: A 11 / 100.5, B 6 / 6, so A. Mean of ratios: A (0.1 + 2) / 2, B 1, so B.
    pool = make_pool([10, 1, 3, 3], teacher=list("AABB"))
    parts = np.array([100.0, 0.5, 3.0, 3.0])
    pool = replace(pool, scores={**pool.scores, "down_part": parts, "up_part": parts})
    assert BestTeacher("down")(everything(pool), pool, rng()).indices.tolist() == [0, 1]
    assert BestTeacher("up")(everything(pool), pool, rng()).indices.tolist() == [2, 3]


def test_best_teacher_has_a_winner_in_each_domain() -> None:
    pool = make_pool([1, 9, 9, 1], teacher=list("ABAB"), domain=list("xxyy"))
    assert BestTeacher("up", per_domain="domain")(everything(pool), pool, rng()).indices.tolist() == [1, 2]


def test_best_teacher_keeps_the_winners_unscored_samples() -> None:
    pool = make_pool([1, 9, NAN, NAN], teacher=list("ABAB"))
    assert BestTeacher("up")(everything(pool), pool, rng()).indices.tolist() == [1, 3]


@pytest.mark.parametrize("teachers", ["BA", "AB"])
def test_best_teacher_breaks_ties_by_name_not_by_row(teachers: str) -> None:
    pool = make_pool([1, 1], teacher=list(teachers))
    assert BestTeacher("up")(everything(pool), pool, rng()).indices.tolist() == [teachers.index("A")]


def test_best_teacher_reads_at_most_num_samples_of_each() -> None:
    # A is worse on average but has a few excellent traces: with samples of one it must win sometimes, not always.
    pool = make_pool([0, 0, 0, 100] * 50 + [30] * 200, teacher=["A"] * 200 + ["B"] * 200)
    contents = [replace(pool, content_hash=rng(seed).permutation(pool.content_hash)) for seed in range(100)]
    wins = Counter(
        one.columns["teacher"].codes[BestTeacher("up", num_samples=1)(everything(one), one, rng()).indices[0]]
        for one in contents
    )
    assert 10 < wins[0] < 45  # a quarter of A's traces win
    everyone = {BestTeacher("up")(everything(one), one, rng()).indices[0] for one in contents[:10]}
    assert everyone == {200}


def test_a_cut_response_is_chosen_only_where_no_whole_one_has_a_score() -> None:
    pool = make_pool([9, 5, 7, 3, 8, NAN], prompt_id=list("ppqqrr"))
    pool = replace(pool, cut=np.array([True, False, True, True, True, False]))
    assert BestOf("up", per="prompt_id")(everything(pool), pool, rng()).indices.tolist() == [1, 2, 4]
    assert BestOf("up", per="prompt_id", k=2)(everything(pool), pool, rng()).indices.tolist() == [0, 1, 2, 3, 4]
    either = BestOf("up", per="prompt_id", prefer_whole=False)
    assert either(everything(pool), pool, rng()).indices.tolist() == [0, 2, 4]


def test_best_teacher_draws_the_same_samples_in_every_epoch() -> None:
    pool = make_pool(rng(3).normal(size=60).tolist(), teacher=list("ABC") * 20)
    policy = BestTeacher("up", num_samples=2)
    winners = {tuple(policy(everything(pool), replace(pool, epoch=n), rng(n)).indices) for n in range(8)}
    assert len(winners) == 1
    read = policy.samples_to_score(everything(pool), pool)
    assert np.bincount(pool.columns["teacher"].codes[read]).tolist() == [2, 2, 2]
    unread = np.setdiff1d(np.arange(60), read)
    scores = {name: np.where(np.isin(np.arange(60), unread), NAN, values) for name, values in pool.scores.items()}
    assert tuple(policy(everything(pool), replace(pool, scores=scores), rng()).indices) in winners


def test_best_teacher_compares_on_the_same_prompts() -> None:
    """A answered the easy half only; on the prompts that both answered, B is better."""
    prompts = [f"p{n}" for n in range(20)] * 2
    teachers = ["A"] * 20 + ["B"] * 20
    up = [90.0] * 10 + [10.0] * 10 + [20.0] * 20
    kept = [*range(10), *range(10, 20), *range(30, 40)]  # B answered the last ten only
    pool = make_pool([up[n] for n in kept], teacher=[teachers[n] for n in kept], prompt_id=[prompts[n] for n in kept])
    policy = BestTeacher("up", num_samples=10, per="prompt_id")
    read = policy.samples_to_score(everything(pool), pool)
    assert len({prompts[kept[n]] for n in read}) == 10
    assert pool.columns["teacher"].codes[policy(everything(pool), pool, rng()).indices[0]] == 1
    apart = BestTeacher("up", num_samples=20)
    assert pool.columns["teacher"].codes[apart(everything(pool), pool, rng()).indices[0]] == 0


@quick
@given(candidates=pools_and_plans())
def test_within_length_includes_its_bounds(candidates: tuple[Pool, EpochPlan]) -> None:
    pool, plan = candidates
    kept = [i for i in plan.indices.tolist() if 3 <= pool.lengths[i] <= 7]
    assert WithinLength(min_tokens=3, max_tokens=7)(plan, pool, rng()).indices.tolist() == kept
    short = [i for i in plan.indices.tolist() if pool.lengths[i] <= 4]
    assert WithinLength(max_tokens=4)(plan, pool, rng()).indices.tolist() == short


def test_samples_without_a_group_are_refused() -> None:
    pool = make_pool([1.0, 2.0, 3.0], prompt_id=["a", None, "b"])
    with pytest.raises(ValueError, match=r"BestOf\(per='prompt_id'\): 1 of 3 samples have no value .*(?i:fill)"):
        BestOf("up", per="prompt_id")(everything(pool), pool, rng())
    assert len(BestOf("up", per="prompt_id")(EpochPlan(indices=np.array([0, 2])), pool, rng())) == 2


def test_encode_is_by_first_appearance() -> None:
    assert encode(["b", "a", "b"]).codes.tolist() == [0, 1, 0]
