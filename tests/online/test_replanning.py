"""Replanning: at fixed steps inside an epoch, with data loaders that read ahead, and after a restart."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from distill_sampler import (
    BestOf,
    Curriculum,
    DistillSampler,
    EpochPlan,
    KeepCorrect,
    Policy,
    Pool,
    RankSurprisalRatio,
    Rescore,
    ScoredDataset,
    Scorer,
    Shuffle,
    WeightBySoftmax,
    attach,
)
from distill_sampler.planning.sampler import replace_rest
from tests import tiny
from tests.test_attach import TRAINERS, trained

RSR = "rank_surprisal_ratio"


def run(
    kind: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    resume: Path | None = None,
    rescore: Rescore | None = None,
    policies: Any = None,
    observe: bool = False,
    **settings: Any,
) -> tuple[Any, Curriculum]:
    """Two epochs of 12 samples, six steps of two each, unless said otherwise."""
    trainer = TRAINERS[kind](
        folder,
        tokenizer,
        **{
            "model": tiny.model(attention_dropout=0.1),
            "num_train_epochs": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "learning_rate": 2e-2,
            **settings,
        },
    )
    curriculum = Curriculum(
        metrics=[RankSurprisalRatio()],
        policies=policies or [BestOf(RSR, per="prompt_id", k=2), Shuffle()],
        rescore=rescore or Rescore(every_steps=2, lag=2),
        observe=observe,
        scorer=Scorer(progress=False),
    )
    attach(trainer, curriculum)
    trainer.batches = []
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, curriculum


def last_plans(curriculum: Curriculum) -> list[int]:
    """The order of all epochs as their last plans have it."""
    last = {summary.epoch: plan for summary, plan in zip(curriculum.summaries, curriculum.plans, strict=True)}
    return [index for epoch in sorted(last) for index in last[epoch].indices.tolist()]


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dataloader_num_workers": 2, "rescore": Rescore(every_steps=2, lag=6), "num_train_epochs": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    ],
    ids=["as it comes", "2 workers", "accumulation"],
)
def test_the_order_trained_is_the_order_of_the_last_plan(
    kind: str, settings: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    if "dataloader_num_workers" in settings:  # a longer epoch, so that something is left behind the lag
        settings = {**settings, "per_device_train_batch_size": 1}
    trainer, curriculum = run(kind, tmp_path, tokenizer, **settings)
    assert trained(trainer) == last_plans(curriculum)
    per_epoch = [
        [s.step for s in curriculum.summaries if s.epoch == epoch] for epoch in range(len(trained(trainer)) // 12)
    ]
    expected = [[0, 2, 4]] if "dataloader_num_workers" in settings else [[0, 2], [6, 8]]
    assert per_epoch == expected
    assert len({plan.fingerprint for plan in curriculum.plans}) > len(per_epoch)  # it did change


def test_samples_that_were_handed_out_stay_and_count(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer, curriculum = run("SFTTrainer", tmp_path, tokenizer, save_strategy="no")
    prompts = np.array(trainer.train_dataset["prompt_id"])
    for before, after in ((0, 1), (2, 3)):
        first, second = curriculum.plans[before], curriculum.plans[after]
        assert first.indices[:8].tolist() == second.indices[:8].tolist()  # two steps trained, two of lag
        assert sorted(np.unique(prompts[second.indices], return_counts=True)[1].tolist()) == [2] * 6


@pytest.mark.parametrize("observe", [False, True], ids=["", "observing"])
@pytest.mark.parametrize("place", [1, 2, 3, 5, 6, 9])
def test_a_resume_at_any_step_continues_as_if_never_interrupted(
    place: int, observe: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    settings: dict[str, Any] = {"observe": observe, "rescore": Rescore(every_steps=2, lag=2, fraction=0.4)}
    whole, first = run("SFTTrainer", tmp_path / "whole", tokenizer, **settings)
    rest, second = run(
        "SFTTrainer", tmp_path / "rest", tokenizer, tmp_path / "whole" / f"checkpoint-{place}", **settings
    )
    assert trained(rest) == trained(whole)[2 * place :]
    assert first.samples() == second.samples()
    for left, right in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_weights_of_a_replanned_epoch_have_mean_one(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    policies = [WeightBySoftmax(RSR, temperature=2.0), Shuffle()]
    _, curriculum = run("SFTTrainer", tmp_path, tokenizer, policies=policies, save_strategy="no")
    for plan in curriculum.plans:
        assert plan.weights.mean() == pytest.approx(1, abs=1e-5)
        assert np.ptp(plan.weights) > 0.1


@given(data=st.data())
def test_each_group_has_what_the_new_plan_wants_less_what_was_handed_out(data: st.DataObject) -> None:
    """The definition: per group, the samples of the new plan minus those handed out, in the new plan's order."""
    size = data.draw(st.integers(1, 12), label="samples")
    length = data.draw(st.integers(1, 15), label="length")
    groups = np.array(data.draw(st.lists(st.integers(0, 4), min_size=size, max_size=size), label="groups"))
    plans = st.lists(st.integers(0, size - 1), min_size=length, max_size=length)
    begun, new = (EpochPlan(indices=np.array(data.draw(plans))) for _ in range(2))
    start = data.draw(st.integers(0, length))
    result = replace_rest(begun, new, start, groups)
    assert len(result) == length
    assert result.indices[:start].tolist() == begun.indices[:start].tolist()
    rest = result.indices[start:].tolist()
    iterator = iter(new.indices.tolist())
    assert all(index in iterator for index in rest)  # a subsequence
    handed = np.bincount(groups[begun.indices[:start]], minlength=5)
    wanted = np.bincount(groups[new.indices], minlength=5)
    allowed = np.maximum(wanted - handed, 0)
    got = np.bincount(groups[np.array(rest, int)], minlength=5)
    assert (got <= allowed).all()
    if allowed.sum() == len(rest):
        assert (got == allowed).all()
    if start == 0:
        assert result == new
    if new == begun and len(set(groups.tolist())) == size:
        assert sorted(result.indices.tolist()) == sorted(begun.indices.tolist())


def test_a_sample_that_was_handed_out_is_removed_before_others_of_its_group() -> None:
    begun, new = EpochPlan(indices=np.array([0, 2, 1])), EpochPlan(indices=np.array([0, 1, 2]))
    assert replace_rest(begun, new, 1, groups=np.array([0, 0, 1])).indices.tolist() == [0, 1, 2]


def test_replanning_what_a_loader_has_read_is_refused() -> None:
    sampler = DistillSampler(6)
    sampler.set_plan(EpochPlan(indices=np.arange(6)))
    iterator = iter(sampler)
    assert [next(iterator) for _ in range(4)] == [0, 1, 2, 3]
    sampler.set_rest(EpochPlan(indices=np.array([0, 1, 2, 3, 5, 4])), 4)
    assert list(iterator) == [5, 4]
    with pytest.raises(ValueError, match=r"has read 6 samples.*Rescore\(lag="):
        sampler.set_rest(EpochPlan(indices=np.array([0, 1, 2, 3, 4, 5])), 4)


def test_a_lag_shorter_than_the_read_ahead_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"reads up to 10 optimizer steps ahead.*Rescore\(lag=10\)"):
        run("SFTTrainer", tmp_path, tokenizer, rescore=Rescore(every_steps=5), dataloader_num_workers=4)


def test_explanations_use_the_last_plan_of_an_epoch(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    _, curriculum = run("SFTTrainer", tmp_path, tokenizer, save_strategy="no")
    for epoch in (0, 1):
        plan = curriculum.plans[2 * epoch + 1]
        for index in range(18):
            assert (f" was in epoch {epoch}" in curriculum.explain(index, epoch)) == (index in plan.indices)


# ---- Groups ----


@dataclass(frozen=True)
class FirstOfEach(Policy):
    """A policy of a user's own that calls its column what it likes."""

    metric: str
    family: str

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return (self.family,)

    @property
    def group_by(self) -> str:
        return self.family

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        return BestOf(self.metric, per=self.family, k=2)(plan, pool, rng)


def replanned(policies: list[Policy], **columns: list[Any]) -> Curriculum:
    """An epoch of 12 that is planned anew after two of 6 steps, by a student that thinks otherwise."""
    rows = tiny.tokenised(tiny.candidates(), tiny.tokenizer())
    for name, values in columns.items():
        rows = rows.add_column(name, values)  # type: ignore[call-arg]
    curriculum = Curriculum(
        metrics=[RankSurprisalRatio()],
        policies=[*policies, Shuffle()],
        rescore=Rescore(every_steps=2, lag=1),
        scorer=Scorer(progress=False),
    )
    curriculum.bind(ScoredDataset(rows, end_token_ids=[257]))
    curriculum.start_epoch(0, tiny.model())
    assert curriculum.replan(tiny.model(seed=9), step=2, into_epoch=2, start=6) is not None
    return curriculum


PROMPTS = [f"sum-{n // 3}" for n in range(18)]
RENAMED = [f"question {5 - n // 3}" for n in range(18)]


@pytest.mark.parametrize(
    "policies",
    [
        [FirstOfEach(RSR, family="prompt_id")],
        [BestOf(RSR, per="prompt_id", k=2), FirstOfEach(RSR, family="question")],
        [BestOf(RSR, per="question", k=2), KeepCorrect("right", metric=RSR, per="prompt_id")],
    ],
    ids=["a field of another name", "two columns of equal groups", "two policies, two columns"],
)
def test_a_replanned_epoch_trains_no_prompt_twice_whatever_the_policy_calls_its_column(policies: list[Policy]) -> None:
    curriculum = replanned(policies, question=RENAMED, right=[True] * 18)
    first, second = curriculum.plans
    assert first != second
    prompts = np.array(PROMPTS)[second.indices]
    assert sorted(np.unique(prompts, return_counts=True)[1].tolist()) == [2] * 6


def test_policies_that_disagree_about_groups_are_refused_where_the_rest_is_planned_anew() -> None:
    other = [f"half {n % 2}" for n in range(18)]
    policies: list[Policy] = [BestOf(RSR, per="prompt_id", k=2), BestOf(RSR, per="half", k=6)]
    with pytest.raises(ValueError, match=r"equal 'prompt_id', but BestOf within groups of equal 'half'.*every_steps"):
        replanned(policies, half=other)
