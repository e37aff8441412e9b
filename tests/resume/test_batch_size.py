"""A run that is resumed with other batches trains the rest of the plan. Nothing is lost."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from distill_sampler import BestOf, Curriculum, DistillSampler, EpochPlan, Rescore, Shuffle, attach
from tests import tiny
from tests.resume.test_checkpoints import steps_may_change, verified
from tests.test_attach import RSR, curriculum, plain_trainer, trained

pytestmark = steps_may_change
SAVING = {"save_strategy": "steps", "save_steps": 1}
BATCHES: list[dict[str, Any]] = [
    {"per_device_train_batch_size": 1},
    {"per_device_train_batch_size": 3},
    {"per_device_train_batch_size": 4},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2},
    {"per_device_train_batch_size": 5},
    {"per_device_train_batch_size": 12},
]
"""The run that they continue had steps of two samples."""


def two_per_prompt(**changes: Any) -> Curriculum:
    """Epochs of twelve samples."""
    return curriculum(policies=[BestOf(RSR, per="prompt_id", k=2), Shuffle()], **changes)


def run(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    resume: Path | None = None,
    attached: Curriculum | None = None,
    **settings: Any,
) -> tuple[Any, Curriculum]:
    attached = attached or two_per_prompt()
    trainer = plain_trainer(
        folder,
        tokenizer,
        **{**SAVING, "lr_scheduler_type": "linear", "model": tiny.model(attention_dropout=0.1), **settings},
    )
    trainer.batches = []
    attach(trainer, attached, sample_log=True)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, attached


@pytest.fixture(scope="module")
def two_at_a_time(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> tuple[Path, Any]:
    """Two epochs of six steps of two samples, and the plan of the first."""
    output = tmp_path_factory.mktemp("two")
    _, attached = run(output, tokenizer)
    return output, attached.plans[0]


def per_step(settings: dict[str, Any]) -> int:
    return int(settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1))


def rest_of(plan: EpochPlan, position: int, step: int) -> list[int]:
    """What an epoch trains from a position on: each sample once, and from the start what the last step still takes."""
    rest = plan.indices[position:].tolist()
    return rest + np.resize(plan.indices, -len(rest) % step).tolist()


@pytest.mark.parametrize("settings", BATCHES, ids=str)
@pytest.mark.parametrize("stop", [1, 5, 6])
def test_a_resume_with_other_batches_trains_the_rest_of_the_plan(
    stop: int,
    settings: dict[str, Any],
    two_at_a_time: tuple[Path, EpochPlan],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output, first = two_at_a_time
    step = per_step(settings)
    with caplog.at_level(logging.WARNING, "distill_sampler"):
        trainer, attached = run(tmp_path, tokenizer, output / f"checkpoint-{stop}", **settings)
    planned, second = attached.plans  # the first from the old folder's record
    assert planned == first
    expected = rest_of(first, 2 * stop, step) + rest_of(second, 0, step)
    assert trained(trainer) == expected
    assert attached.times_trained().tolist() == np.bincount([*first.indices[: 2 * stop], *expected], None, 18).tolist()
    # the trainer's count goes on, and ends where training does
    assert trainer.state.global_step == trainer.state.max_steps == stop + len(expected) // step
    # the schedule keeps its share of the run, and ends at nothing
    of_epoch = -(-12 // step)
    rates = [
        line["learning_rate"] for line in trainer.state.log_history if line.get("step", 0) > stop and "loss" in line
    ]
    whole = [1e-2 * (1 - taken / (2 * of_epoch)) for taken in range(2 * of_epoch)]
    assert rates == pytest.approx(whole[-len(rates) :])
    assert f"optimizer step had 2 samples until this checkpoint and has {step}" in caplog.text
    assert f"step {2 * of_epoch - len(rates)} of {2 * of_epoch}" in caplog.text


@pytest.mark.slow
def test_what_was_resumed_with_other_batches_is_resumed_again(
    two_at_a_time: tuple[Path, EpochPlan], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """At position 2, with steps of five, whose boundaries are at 2, 7 and 12 then; and back to steps of two."""
    output, first = two_at_a_time
    whole, attached = run(tmp_path / "five", tokenizer, output / "checkpoint-1", per_device_train_batch_size=5)
    order = trained(whole)
    planned, second = attached.plans  # the first from the old folder's record
    assert planned == first
    for steps, (plan, position) in {1: (first, 7), 2: (second, 0), 3: (second, 5)}.items():
        checkpoint = tmp_path / "five" / f"checkpoint-{1 + steps}"
        again, _ = run(tmp_path / f"again-{steps}", tokenizer, checkpoint, per_device_train_batch_size=5)
        assert trained(again) == order[5 * steps :]
        assert again.state.max_steps == whole.state.max_steps
        for left, right in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(left, right)
        back, _ = run(tmp_path / f"back-{steps}", tokenizer, checkpoint)
        rest = rest_of(plan, position, 2)
        assert trained(back)[: len(rest)] == rest
        assert len(trained(back)) == len(rest) + (12 if plan is first else 0)


@pytest.mark.parametrize("observe", [False, True])
def test_the_rest_is_replanned_and_verified_at_its_place(
    observe: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """One folder, as after a node was lost: steps of four, then of three, planning anew all along."""
    rescore = Rescore(every_steps=1, lag=2, fraction=0.5)
    changing = {"rescore": rescore, "observe": observe}
    first, _ = run(tmp_path, tokenizer, attached=two_per_prompt(**changing), per_device_train_batch_size=4)
    trainer, attached = run(
        tmp_path,
        tokenizer,
        tmp_path / "checkpoint-1",
        two_per_prompt(**changing),
        per_device_train_batch_size=3,
        save_total_limit=None,
    )
    rest = trained(trainer)
    assert len(rest) == 9 + 12
    assert rest[9:] == attached.sampler.plan.indices.tolist()  # type: ignore[union-attr]
    prompts = [trainer.train_dataset["prompt_id"][index] for index in [*trained(first)[:4], *rest[:8]]]
    assert sorted(np.unique(prompts, return_counts=True)[1].tolist()) == [2] * 6
    for step in (2, 3, 6):
        assert verified(tmp_path / f"checkpoint-{step}")[0] == 0, verified(tmp_path / f"checkpoint-{step}")


def test_a_rest_without_a_whole_step_is_left_out_where_steps_are_cut(
    two_at_a_time: tuple[Path, EpochPlan], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    cut = {"per_device_train_batch_size": 5, "dataloader_drop_last": True}
    for stop, of_first in ((3, 5), (4, 0)):
        folder = tmp_path / str(stop)
        trainer, attached = run(folder, tokenizer, two_at_a_time[0] / f"checkpoint-{stop}", **cut)
        first, second = two_at_a_time[1].indices.tolist(), attached.plans[-1].indices.tolist()
        assert trained(trainer) == first[2 * stop :][:of_first] + second[:10]


def test_a_number_of_steps_in_other_steps_is_refused(
    two_at_a_time: tuple[Path, EpochPlan], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = {"per_device_train_batch_size": 4, "max_steps": 9}
    with pytest.raises(ValueError, match=r"max_steps=9 counts optimizer steps.*2 samples.*has 4 now.*num_train_epochs"):
        run(tmp_path, tokenizer, two_at_a_time[0] / "checkpoint-2", **settings)


@given(data=st.data())
def test_a_shifted_iteration_has_what_is_left(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 30), label="length")
    position = data.draw(st.integers(0, length), label="position")
    step = data.draw(st.integers(1, 40), label="samples per step")
    sampler = DistillSampler(length)
    sampler.in_whole_steps(step)
    sampler.set_plan(EpochPlan(indices=np.arange(length)))
    skipped = sampler.resume_at(position)
    iterated = list(sampler)
    assert skipped % step == 0
    assert len(iterated) == len(sampler)
    rest = iterated[skipped:]
    assert rest[: length - position] == list(range(position, length))
    assert len(rest) - (length - position) < step
    sampler.set_plan(EpochPlan(indices=np.arange(length)))
    assert list(sampler)[:length] == list(range(length))  # the next epoch is whole
