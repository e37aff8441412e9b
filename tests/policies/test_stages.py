"""Stages and Anneal: what applies when, exact on a resume, refused where epochs would change their length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from policy_pools import everything, make_pool, rng
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_sampler import Curriculum, Random, ScoredDataset
from distill_sampler.planning.why import ExplainedPlan, PolicyFacts
from distill_sampler.policies import (
    Anneal,
    BestOf,
    CompetencePacing,
    During,
    KeepTop,
    MixDomains,
    SampleBySoftmax,
    Shuffle,
    SortBy,
    Stage,
    Stages,
    WeightBySoftmax,
)
from distill_sampler.protocols import Policy
from distill_sampler.specs import parse_policies
from tests import tiny

BEST = BestOf("random", per="prompt_id")


def bound(dataset: ScoredDataset, policies: Sequence[Policy], **settings: Any) -> Curriculum:
    curriculum = Curriculum(metrics=[Random()], policies=policies, **settings)
    curriculum.bind(dataset, applies_weights=True)
    return curriculum


def plans(curriculum: Curriculum, model: PreTrainedModel, *epochs: int) -> list[list[int]]:
    return [curriculum.start_epoch(e, model, step=e * 3, num_epochs=4).indices.tolist() for e in epochs]


@pytest.fixture(scope="module")
def by_temperature(tokenizer: PreTrainedTokenizerBase) -> ScoredDataset:
    """Every prompt with a response drawn at 0.6 and one drawn at 1.0."""
    rows = tiny.candidates().filter(lambda row: row["teacher"] != "cy")
    rows = rows.map(lambda row: {"temperature": 0.6 if row["teacher"] == "ada" else 1.0})
    return ScoredDataset(tiny.tokenised(rows, tokenizer), end_token_ids=[257])


def test_two_temperatures_in_two_stages(by_temperature: ScoredDataset, model: PreTrainedModel) -> None:
    schedule = Stages(
        [
            Stage([MixDomains({0.6: 1, 1.0: 0}, column="temperature")]),
            Stage([MixDomains({0.6: 0, 1.0: 1}, column="temperature")], from_epoch=2),
        ]
    )
    curriculum = bound(by_temperature, [schedule, Shuffle()])
    for epoch, chosen in enumerate(plans(curriculum, model, 0, 1, 2, 3)):
        temperatures = {by_temperature[row]["temperature"] for row in chosen}
        assert temperatures == ({0.6} if epoch < 2 else {1.0})
        assert len(chosen) == 6


def test_a_resume_in_any_epoch_goes_on_as_if_there_was_none(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    policies = [
        Stages(
            [
                Stage([SampleBySoftmax("random", temperature=0.1, num_samples=9)]),
                Stage([SampleBySoftmax("random", temperature=9.0, num_samples=9), Shuffle()], from_epoch=1),
                Stage([SortBy("random"), CompetencePacing("random", initial=0.5, epochs=4)], from_epoch=3),
            ]
        ),
        Anneal(SampleBySoftmax("random", temperature=5.0, num_samples=9), "temperature", to=0.01),
    ]
    uninterrupted = plans(bound(dataset, policies), model, 0, 1, 2, 3)
    assert len({tuple(sorted(plan)) for plan in uninterrupted}) > 2
    for epoch in range(3):
        before = bound(dataset, policies)
        plans(before, model, *range(epoch + 1))
        after = bound(dataset, policies)
        after.load_state_dict(before.state_dict())
        assert plans(after, model, *range(epoch, 4)) == uninterrupted[epoch:]


def test_stages_may_begin_at_optimizer_steps() -> None:
    pool = make_pool([1.0, 2.0, 3.0])
    schedule = Stages([Stage([]), Stage([SortBy("up")], from_step=10), Stage([SortBy("down")], from_step=20)])
    for step, expected in ((0, [0, 1, 2]), (9, [0, 1, 2]), (10, [2, 1, 0]), (19, [2, 1, 0]), (20, [0, 1, 2])):
        assert schedule(everything(pool), replace(pool, step=step), rng()).indices.tolist() == expected


@pytest.mark.parametrize(
    "policies",
    [
        [Stages([Stage([KeepTop("random", num=5)]), Stage([KeepTop("random", num=7)], from_epoch=1)])],
        [Anneal(KeepTop("random", fraction=0.3), "fraction", to=0.9)],
        [During(KeepTop("random", num=3), end=2)],
    ],
    ids=repr,
)
def test_an_epoch_of_another_length_is_refused_before_training(
    policies: list[Policy], dataset: ScoredDataset, model: PreTrainedModel
) -> None:
    with pytest.raises(ValueError, match=r"Curriculum\(num_samples="):
        bound(dataset, policies)
    assert [len(plan) for plan in plans(bound(dataset, policies, num_samples=6), model, 0, 1, 2)] == [6, 6, 6]


def test_weights_of_a_later_stage_are_known_from_the_start(dataset: ScoredDataset) -> None:
    weights = Stage([WeightBySoftmax("random", temperature=0.1)], from_epoch=5)
    assert bound(dataset, [Stages([Stage([Shuffle()]), weights])]).planner.gives_weights
    assert not bound(
        dataset, [Stages([Stage([Shuffle()]), Stage([SortBy("random")], from_epoch=5)])]
    ).planner.gives_weights


def test_a_choice_is_explained_by_the_policy_of_its_stage(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    stages = Stages(
        [
            Stage([SampleBySoftmax("random", temperature=1, num_samples=6, replacement=False)]),
            Stage([BEST], from_epoch=1),
        ]
    )
    curriculum = bound(dataset, [stages, Shuffle()])
    for epoch, (plan, name) in enumerate(
        zip(plans(curriculum, model, 0, 1), ("SampleBySoftmax", "BestOf"), strict=True)
    ):
        left_out = next(row for row in range(len(dataset)) if row not in plan)
        assert f"left out by {name}: its random" in curriculum.explain(left_out, epoch)
        assert f"kept by {name}: its random" in curriculum.explain(plan[0], epoch)


def test_the_facts_of_a_stage_say_when_it_applies() -> None:
    facts = PolicyFacts.of(During(BEST, begin=1, end=3))
    assert facts.text == "BestOf('random', per='prompt_id') from epoch 1 until epoch 3"
    assert facts.kind == "BestOf"
    assert PolicyFacts.from_json(facts.to_json()) == facts
    assert [facts.applies(epoch, 99) for epoch in range(4)] == [False, True, True, False]
    moving = PolicyFacts.of(Anneal(SampleBySoftmax("random", temperature=2.0), "temperature", to=0.5))
    assert moving.text == "SampleBySoftmax('random', temperature=2.0) with temperature moving to 0.5"


def test_a_plan_without_deciding_policies_names_those_that_applied() -> None:
    pool = make_pool([1.0, 2.0], domain=["a", "a"])
    policies = [Stages([Stage([Shuffle()]), Stage([MixDomains({"a": 1})], from_epoch=1)])]
    assert ExplainedPlan.from_policies(policies, np.arange(2), pool, 0).reason(0) == "kept by Shuffle"


@pytest.mark.parametrize(
    ("shape", "values"),
    [("linear", [2.0, 1.5, 1.0, 0.5]), ("cosine", [2.0, 1.625, 0.875, 0.5]), ("exponential", [2.0, 1.26, 0.794, 0.5])],
)
def test_an_argument_moves_from_its_value_to_the_last_over_the_run(shape: Any, values: list[float]) -> None:
    moving = Anneal(SampleBySoftmax("up", temperature=2.0), "temperature", to=0.5, shape=shape)
    pool = make_pool([1.0, 5.0, 2.0])
    for epoch, value in enumerate(values):
        assert moving.at(epoch / 3).temperature == pytest.approx(value, abs=1e-3)  # type: ignore[attr-defined]
        now = replace(pool, epoch=epoch, num_epochs=4)
        expected = replace(SampleBySoftmax("up", temperature=1.0), temperature=moving.at(epoch / 3).temperature)  # type: ignore[attr-defined]
        assert moving(everything(pool), now, rng()) == expected(everything(pool), now, rng())


def test_an_argument_may_move_by_steps_or_to_an_epoch_and_stays_whole() -> None:
    pool = make_pool([3.0, 1.0, 2.0, 4.0])
    by_steps = Anneal(KeepTop("up", num=1), "num", to=4, steps=10)
    sizes = [len(by_steps(everything(pool), replace(pool, step=step), rng())) for step in (0, 4, 10, 99)]
    assert sizes == [1, 2, 4, 4]
    to_epoch = Anneal(KeepTop("up", num=1), "num", to=3, epochs=2)
    sizes = [len(to_epoch(everything(pool), replace(pool, epoch=epoch, num_epochs=9), rng())) for epoch in range(4)]
    assert sizes == [1, 2, 3, 3]


def test_a_run_of_unknown_length_is_refused() -> None:
    pool = replace(make_pool([1.0]), epoch=1)
    with pytest.raises(ValueError, match=r"Give epochs= .* or steps="):
        Anneal(SortBy("up"), "jitter", to=0.5)(everything(pool), pool, rng())


@pytest.mark.parametrize(
    ("made", "cure"),
    [
        (lambda: Anneal(Shuffle(), "bucket", to=4), "give the policy its first value"),
        (lambda: Anneal(SortBy("up"), "metric", to=4), "Choose one of: metric, best_first, jitter"),
        (lambda: Anneal(SampleBySoftmax("up", temperature=1.0), "temperature", to=0), "temperature must be above 0"),
        (lambda: Anneal(SortBy("up"), "jitter", to=1, shape="exponential"), "Choose 'linear' or 'cosine'"),
        (lambda: Anneal(SortBy("up"), "jitter", to=1, epochs=1, steps=1), "not both"),
        (lambda: Anneal(SortBy("up"), "jitter", to=1, steps=0), "give 1 or more"),
        (lambda: Anneal("SortBy", "jitter", to=1), "give a policy"),
        (lambda: During(Shuffle(), begin=2, end=2), "0 <= begin < end"),
        (lambda: Stage("Shuffle"), "give a list of policies"),
        (lambda: Stage([Shuffle], from_epoch=1), "give a list of policies"),
        (lambda: Stage([], from_epoch=1, from_step=1), "not both"),
        (lambda: Stages([]), "give a list"),
        (lambda: Stages([Stage([], from_epoch=1)]), "Let the first one begin with the run"),
        (lambda: Stages([Stage([]), Stage([])]), "a larger from_epoch="),
        (lambda: Stages([Stage([]), Stage([], from_epoch=1), Stage([], from_step=9)]), "or each a larger from_step="),
        (lambda: Stages([Stage([Stages([Stage([])])])]), "into one list"),
    ],
)
def test_what_makes_no_schedule_is_refused(made: Any, cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        made()


def test_people_can_type_a_schedule() -> None:
    typed = "Stages([Stage([Shuffle()]), Stage([SortBy(up, jitter=0.1)], from_epoch=2)])"
    assert parse_policies([typed]) == [Stages([Stage([Shuffle()]), Stage([SortBy("up", jitter=0.1)], from_epoch=2)])]
    typed = "Anneal(SampleBySoftmax(up, temperature=2.0), temperature, to=0.5, shape=cosine)"
    expected = Anneal(SampleBySoftmax("up", temperature=2.0), "temperature", to=0.5, shape="cosine")
    assert parse_policies([typed]) == [expected]
