"""What holds for every policy of ours beyond `check_policy`. A new one in the folder needs an entry in `EXAMPLES`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from policy_pools import pools_and_plans, rng

import distill_sampler.policies
from distill_sampler.policies import (
    Anneal,
    BestOf,
    BestSingleTeacher,
    BestTeacher,
    Column,
    CompetencePacing,
    DropDegenerate,
    During,
    GroupByLength,
    Interleave,
    KeepByMargin,
    KeepCorrect,
    KeepTop,
    Lexicographic,
    MatchTeachers,
    MixDomains,
    MixTeachers,
    RankAverage,
    SampleBySoftmax,
    Shuffle,
    SortBy,
    Stage,
    Stages,
    WeightByColumn,
    WeightBySoftmax,
    WithinLength,
    apply_one_by_one,
    apply_policies,
)
from distill_sampler.protocols import Policy, Pool
from distill_sampler.testing import check_policy
from distill_sampler.types import EpochPlan

SHARES = {"reasoning": 3, "general": 1}
EXAMPLES: list[Policy] = [
    Anneal(SampleBySoftmax("up", temperature=2.0), "temperature", to=0.1, epochs=3),
    Anneal(KeepTop("down", num=2), "num", to=9, steps=20),
    During(KeepTop("up", num=3), begin=1, end=3),
    Stages([Stage([KeepTop("up", num=3), Shuffle()]), Stage([SortBy(Column("difficulty"))], from_epoch=2)]),
    BestOf("up", per="prompt_id"),
    BestOf("down", per="prompt_id", k=2, min_score=-1.0, max_score=2.5),
    BestOf(RankAverage("up", "down", weights=(2, 1)), per="prompt_id"),
    BestOf(Column("difficulty", higher_is_better=False), per="prompt_id", min_score=2),
    BestSingleTeacher(Column("difficulty"), per="prompt_id"),
    BestSingleTeacher("down"),
    BestTeacher("up", num_samples=2),
    BestTeacher("down", per_domain="domain"),
    CompetencePacing("up", initial=0.3, epochs=3),
    DropDegenerate(per="prompt_id", loops="up", duplicates="down"),
    DropDegenerate(loops=None, duplicates="up", metric=Column("difficulty")),
    GroupByLength(mega_batch=4),
    Interleave("teacher"),
    KeepByMargin("up", per="prompt_id", k=2),
    KeepCorrect("correct", metric="up", per="prompt_id"),
    KeepCorrect("correct", if_none="drop"),
    KeepTop("up", fraction=0.4),
    KeepTop(Lexicographic("down", "up"), num=3),
    KeepTop("up", max_tokens=20),
    KeepTop("down", fraction=0.5, max_tokens=30),
    KeepTop(Column("difficulty"), num=3),
    MatchTeachers(of=BestOf("up", per="prompt_id")),
    MatchTeachers(of=[BestOf("up", per="prompt_id", k=2), KeepTop("down", num=5)], per="prompt_id"),
    MixDomains(SHARES),
    MixDomains(SHARES, num=11),
    MixDomains(SHARES, by="tokens"),
    MixTeachers(max_share=0.5),
    SampleBySoftmax("up", temperature=1.0),
    SampleBySoftmax("down", temperature=2.0, num_samples=3, replacement=False),
    SampleBySoftmax("up", temperature=0.5, per="prompt_id"),
    SampleBySoftmax("down", temperature=0.5, num_samples=1, replacement=False, per="prompt_id"),
    Shuffle(),
    Shuffle(bucket=4),
    SortBy("up"),
    SortBy("down", best_first=False),
    SortBy("up", jitter=0.3),
    WeightByColumn("weight"),
    WeightBySoftmax("up", temperature=1.0),
    WeightBySoftmax("down", temperature=0.1, floor=0.2),
    WithinLength(min_tokens=3, max_tokens=7),
]
SELECTS_BY_METRIC = (BestOf, CompetencePacing, KeepByMargin, KeepTop, SampleBySoftmax)
WEIGHS = (KeepByMargin, WeightByColumn, WeightBySoftmax)
ONE_TEACHER = (BestSingleTeacher, BestTeacher)
LENGTH_BY_SCORES = (*ONE_TEACHER, DropDegenerate)
KEEPS_LENGTH = (CompetencePacing, GroupByLength, Interleave, Shuffle, SortBy, WeightByColumn, WeightBySoftmax)
KEEPS_ORDER = (
    *ONE_TEACHER,
    *WEIGHS,
    BestOf,
    CompetencePacing,
    DropDegenerate,
    KeepCorrect,
    KeepTop,
    MatchTeachers,
    MixDomains,
    MixTeachers,
    SampleBySoftmax,
    WithinLength,
)


def every_policy() -> list[type]:
    """In the order of their files: workers of a parallel run must collect the same tests."""
    found = []
    for module in pkgutil.iter_modules(distill_sampler.policies.__path__, "distill_sampler.policies."):
        for _, item in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            public = item.__module__ == module.name and not item.__name__.startswith("_")
            if public and hasattr(item, "group_by"):
                found.append(item)
    return found


def run(policy: Policy, plan: EpochPlan, pool: Pool, seed: int = 0) -> EpochPlan:
    """The policy's plan; draws again where it refuses these candidates in its own words."""
    try:
        return policy(plan, pool, rng(seed))
    except ValueError as refusal:
        if not str(refusal).startswith(type(policy).__name__):
            raise
        reject()


def law(test: Callable[..., None]) -> Callable[..., None]:
    """A law of every policy, on any pool and plan."""
    drawn = settings(max_examples=20, deadline=None)(given(candidates=pools_and_plans())(test))
    return pytest.mark.parametrize("policy", EXAMPLES, ids=repr)(drawn)


@pytest.mark.parametrize("policy", every_policy(), ids=lambda policy: policy.__name__)
def test_every_policy_is_explained_exported_and_has_an_example_here(policy: type) -> None:
    assert policy in map(type, EXAMPLES), f"add a {policy.__name__} to EXAMPLES"
    assert policy.__name__ in distill_sampler.policies.__all__
    assert is_dataclass(policy)
    assert policy.__dataclass_params__.frozen
    assert len(policy.__doc__ or "") > 100
    source = inspect.getsource(policy)
    for field in fields(policy):
        assert f"    {field.name}: " in source
        assert '"""' in source.split(f"    {field.name}: ")[1].splitlines()[1], f"say what {field.name} is"


@pytest.mark.parametrize("policy", EXAMPLES, ids=repr)
def test_a_policy_keeps_its_contract(policy: Policy) -> None:
    check_policy(
        policy,
        columns={
            "correct": (True, False, None),
            "domain": ("reasoning", "general"),
            "difficulty": (1, 2.5, 4, None),
            "weight": (0, 1, 0.5),
        },
        fixed_length=False if isinstance(policy, LENGTH_BY_SCORES) else None,
    )


@law
def test_what_is_kept_does_not_depend_on_the_order_of_the_plan(
    policy: Policy, candidates: tuple[Pool, EpochPlan]
) -> None:
    pool, plan = candidates
    plan = EpochPlan(indices=plan.indices)
    mixed = EpochPlan(indices=plan.indices[rng(1).permutation(len(plan))])
    assert sorted(run(policy, plan, pool).indices) == sorted(run(policy, mixed, pool).indices)


@law
def test_a_kept_sample_takes_its_weight_along(policy: Policy, candidates: tuple[Pool, EpochPlan]) -> None:
    pool, plan = candidates
    if isinstance(policy, WEIGHS):
        return
    weight_of = {index: 1.0 + index for index in set(plan.indices.tolist())}
    weights = np.array([weight_of[index] for index in plan.indices.tolist()])
    result = run(
        policy, EpochPlan(indices=plan.indices, weights=weights / weights.mean() if len(plan) else weights), pool
    )
    expected = np.array([weight_of[index] for index in result.indices.tolist()])
    np.testing.assert_allclose(result.weights, expected / expected.mean() if len(result) else expected, rtol=1e-5)


@law
def test_selecting_leaves_the_order(policy: Policy, candidates: tuple[Pool, EpochPlan]) -> None:
    pool, plan = candidates
    if isinstance(policy, KEEPS_ORDER):
        distinct = EpochPlan(indices=np.array(list(dict.fromkeys(plan.indices.tolist())), np.int64))
        place = {index: place for place, index in enumerate(distinct.indices.tolist())}
        places = [place[index] for index in run(policy, distinct, pool).indices.tolist()]
        assert places == sorted(places)


@law
def test_ordering_and_weighting_keep_the_length(policy: Policy, candidates: tuple[Pool, EpochPlan]) -> None:
    pool, plan = candidates
    if isinstance(policy, CompetencePacing) and not np.isfinite(pool.scores["up"][plan.indices]).any():
        return
    if isinstance(policy, KEEPS_LENGTH):
        result = run(policy, plan, pool)
        assert len(result) == len(plan)
        if not isinstance(policy, CompetencePacing):
            assert sorted(result.indices) == sorted(plan.indices)


@law
def test_unscored_is_never_selected_by_a_metric(policy: Policy, candidates: tuple[Pool, EpochPlan]) -> None:
    pool, plan = candidates
    if isinstance(policy, SELECTS_BY_METRIC):
        goodness = pool.goodness(policy.metric)
        assert not np.isnan(goodness[run(policy, plan, pool).indices]).any()


@law
def test_constant_scores_of_a_dry_run_are_enough(policy: Policy, candidates: tuple[Pool, EpochPlan]) -> None:
    pool, plan = candidates
    zeros = {name: np.zeros(len(pool.lengths)) for name in pool.scores}
    ones = {name: np.ones(len(pool.lengths)) for name in pool.scores}
    result = run(policy, plan, replace(pool, scores=ones, dry_run=True))
    if "BestTeacher" not in repr(policy):  # its group score here is 0 / 0
        assert len(run(policy, plan, replace(pool, scores=zeros, dry_run=True))) == len(result)
    # Where the scores decide nothing but who, the dry run has the length of the real one.
    all_scored = {name: np.where(np.isnan(numbers), 1.0, numbers) for name, numbers in pool.scores.items()}
    if not isinstance(policy, LENGTH_BY_SCORES) and not policy.length_depends_on_scores:
        assert len(result) == len(run(policy, plan, replace(pool, scores=all_scored)))


@settings(max_examples=60, deadline=None)
@given(candidates=pools_and_plans(), policies=st.lists(st.sampled_from(EXAMPLES), max_size=4), seed=st.integers(0, 9))
def test_a_list_of_policies_is_their_composition(
    candidates: tuple[Pool, EpochPlan], policies: list[Policy], seed: int
) -> None:
    pool, plan = candidates
    expected, steps = plan, []
    try:
        for position, policy in enumerate(policies):
            expected = policy(expected, pool, np.random.default_rng([seed, pool.epoch, position]))
            steps.append((policy, expected))
            if not len(expected):
                reject()
    except ValueError:
        reject()
    assert apply_policies(policies, plan, pool, seed) == expected
    assert list(apply_one_by_one(policies, plan, pool, seed)) == steps
