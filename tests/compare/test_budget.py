"""Budgets are equal, and the matched control matches."""

import numpy as np
import pytest

from distill_sampler.compare.arms import Arm, Chooser, parse_arms, teacher_counts
from distill_sampler.compare.budget import Budget, fill, given, match
from distill_sampler.compare.runner import metrics_for
from distill_sampler.metrics import GlobalNaturalness, Lark, RankSurprisalRatio, ResponseLength
from distill_sampler.metrics import Random as RandomScore
from distill_sampler.protocols import Pool
from distill_sampler.types import EncodedColumn, EpochPlan

PROMPTS, TEACHERS = 40, 5


def pool(seed: int = 0) -> tuple[Pool, np.ndarray]:
    """Every teacher's answer to every prompt; teachers differ in length, and short answers have the lowest RSR."""
    rng = np.random.default_rng(seed)
    size = PROMPTS * TEACHERS
    teachers, prompts = np.tile(np.arange(TEACHERS), PROMPTS), np.repeat(np.arange(PROMPTS), TEACHERS)
    tokens = rng.integers(40, 160, size) + 25 * teachers
    scores = {
        "rank_surprisal_ratio": (tokens / 100 + rng.normal(0, 0.5, size)).astype(np.float32),
        "response_length": tokens.astype(np.float32),
        "global_naturalness": rng.normal(size=size).astype(np.float32),
        "random": rng.random(size).astype(np.float32),
        "lark_loss": rng.random(size).astype(np.float32) + 0.5,
        "lark_brier": rng.random(size).astype(np.float32) + 0.5,
        "lark": rng.random(size).astype(np.float32),
    }
    known = [RankSurprisalRatio(), ResponseLength(), GlobalNaturalness(), RandomScore(), Lark()]
    names = [str(place) for place in range(PROMPTS)]
    correct = EncodedColumn(codes=(rng.random(size) < 0.5 + teachers / 10).astype(np.int64), values=[False, True])
    return (
        Pool(
            epoch=0,
            metrics={metric.name: metric for metric in known},
            scores=scores,
            columns={
                "prompt_id": EncodedColumn(codes=prompts, values=names),
                "teacher": EncodedColumn(codes=teachers, values=[f"t{place}" for place in range(TEACHERS)]),
                "correct": correct,
            },
            lengths=tokens + 30,
            content_hash=rng.integers(0, 2**63, size).astype(np.uint64),
        ),
        tokens,
    )


def chooser(budget: Budget, seed: int = 0) -> Chooser:
    known, tokens = pool()
    subject = parse_arms(["rsr"], rounds=2)["rsr"]
    return Chooser(pool=known, candidates=np.arange(25, 200), tokens=tokens, budget=budget, seed=seed, subject=subject)


NAMES = ("random", "matched_random", "longest", "lowest_surprisal", "rsr", "anti_rsr", "lark", "best_single_teacher")


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_every_arm_has_the_same_tokens_within_a_percent_in_whole_steps(name: str, seed: int) -> None:
    choose = chooser(Budget(amount=6000, step=4), seed)
    plan = choose.plan(parse_arms([name], rounds=2)[name])
    assert abs(choose.tokens[plan.indices].sum() / 6000 - 1) <= 0.01
    assert len(plan) % 4 == 0
    assert plan.indices.min() >= 25  # training candidates alone


@pytest.mark.parametrize("name", NAMES)
def test_equal_samples_are_equal(name: str) -> None:
    plan = chooser(Budget(amount=36, unit="samples", step=4)).plan(parse_arms([name], rounds=2)[name])
    assert len(plan) == 36


@pytest.mark.parametrize("budget", [Budget(amount=6000, step=4), Budget(amount=60, unit="samples", step=4)])
def test_the_matched_arm_has_exactly_the_subjects_teachers_and_prompts(budget: Budget) -> None:
    arms = parse_arms(["rsr", "matched_random"], rounds=2)
    for seed in range(3):
        choose = chooser(budget, seed)
        subject, control = choose.plan(arms["rsr"]), choose.plan(arms["matched_random"])
        assert teacher_counts(subject, choose.pool) == teacher_counts(control, choose.pool)
        prompts = choose.pool.columns["prompt_id"].codes
        assert sorted(prompts[subject.indices]) == sorted(prompts[control.indices])
        assert len(set(control.indices.tolist()) & set(subject.indices.tolist())) < 0.9 * len(subject)


def test_plans_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    arms = parse_arms(list(NAMES), rounds=2)
    for arm in arms.values():
        first, again, other = (chooser(Budget(amount=6000, step=4), seed).plan(arm) for seed in (3, 3, 4))
        assert first == again
        assert first != other


def test_a_selection_is_repeated_evenly() -> None:
    tokens = np.full(10, 100)
    plan = fill(EpochPlan(indices=np.arange(10)), tokens, Budget(amount=2500), np.random.default_rng(0))
    assert sorted(np.bincount(plan.indices)) == [2] * 5 + [3] * 5


def test_weights_go_with_their_samples() -> None:
    weighted = EpochPlan(indices=np.arange(4), weights=np.array([0.5, 0.5, 1.5, 1.5]))
    plan = fill(weighted, np.full(4, 10), Budget(amount=400), np.random.default_rng(0))
    assert {(int(i), float(w)) for i, w in zip(plan.indices, plan.weights, strict=True)} == {
        (0, 0.5),
        (1, 0.5),
        (2, 1.5),
        (3, 1.5),
    }
    known, _ = pool()
    assert given(plan)(EpochPlan(indices=np.arange(4)), known, np.random.default_rng(0)) == plan


def test_a_budget_that_steps_cannot_meet_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--budget 450.*larger budget"):
        fill(EpochPlan(indices=np.arange(8)), np.full(8, 100), Budget(amount=450, step=2), np.random.default_rng(0))
    known, tokens = pool()
    some = EpochPlan(indices=np.arange(0, 200, 5))
    with pytest.raises(ValueError, match=r"--budget 100000"):
        match(
            some,
            np.arange(200),
            known,
            tokens,
            Budget(amount=100_000),
            np.random.default_rng(0),
            teacher="teacher",
            per="prompt_id",
        )


@pytest.mark.parametrize(
    ("texts", "cure"),
    [
        (["rsrr"], "Did you mean 'rsr'"),
        (["rsr", "rsr"], "two arms 'rsr'"),
        (["rsr=Shuffle()"], "Choose another name"),
        (["my arm=Shuffle()"], "NAME=POLICY"),
        (["mine=Nothing()"], "--policy"),
    ],
)
def test_arms_that_cannot_be_are_refused(texts: list[str], cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        parse_arms(texts, rounds=2)


def test_an_arm_of_ones_own_is_a_list_of_policies() -> None:
    (mine,) = parse_arms(["mine=KeepTop(rank_surprisal_ratio, fraction=0.5); Shuffle()"], rounds=2).values()
    assert (mine.name, len(mine.policies), mine.uses_metrics) == ("mine", 2, ("rank_surprisal_ratio",))
    with pytest.raises(ValueError, match="--metrics"):
        metrics_for([Arm(name="x", policies=mine.policies)], {})
