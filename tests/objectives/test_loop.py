"""Objectives in a loop with accelerate give a trainer's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from distill_sampler import CurriculumLoop, HiddenHints, ScoredDataset, SoftTargets, attach
from distill_sampler.objectives.hidden_hints import MODULE
from tests import tiny
from tests.objectives.test_soft_targets import curriculum, teacher, weights_of
from tests.online.test_loss_weights import RATE, trainer_of


def objectives() -> list[Any]:
    guide = teacher()
    return [SoftTargets(guide), HiddenHints(guide, layers={0: 0})]


def looped(tokenizer: PreTrainedTokenizerBase, objective: Any) -> tuple[CurriculumLoop, Any, Any, Any]:
    rows = tiny.tokenised(tiny.candidates(2), tokenizer)
    accelerator = Accelerator(cpu=True)
    loop = CurriculumLoop(
        curriculum(weighted=True), ScoredDataset(rows, end_token_ids=[257]), accelerator, objective=objective
    )
    model = tiny.model()
    loop.prepare(model)
    loader = DataLoader(
        rows.select_columns(["input_ids", "labels"]),  # type: ignore[arg-type]
        batch_size=2,
        sampler=loop.sampler,
        collate_fn=DataCollatorForSeq2Seq(tokenizer),
    )
    return loop, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE), loader)


def test_a_loop_trains_what_a_trainer_trains(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    loop, model, optimizer, loader = looped(tokenizer, objectives())
    for _ in loop.epochs(1):
        for batch in loop.batches(model, loader):
            loop.accelerator.backward(loop.loss(model(**batch).loss))
            optimizer.step()
            optimizer.zero_grad()
    assert hasattr(model, MODULE)
    loop.finish()
    assert not hasattr(model, MODULE)
    trainer = trainer_of("Trainer", tmp_path, tokenizer)
    attach(trainer, curriculum(weighted=True), objective=objectives())
    trainer.train()
    ours: dict[str, Tensor] = dict(model.named_parameters())
    for name, value in weights_of(trainer).items():
        torch.testing.assert_close(ours[name].detach(), value, rtol=1e-5, atol=1e-7)


def test_a_batch_trained_without_its_objectives_stops_the_loop(tokenizer: PreTrainedTokenizerBase) -> None:
    loop, model, _, loader = looped(tokenizer, SoftTargets(teacher()))
    for _ in loop.epochs(1):
        batches = loop.batches(model, loader)
        next(batches)
        with pytest.raises(ValueError, match=r"objective=.*loop\.loss\(model"):
            next(batches)
        break


def test_a_loop_that_is_not_prepared_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = tiny.tokenised(tiny.candidates(2), tokenizer)
    loop = CurriculumLoop(
        curriculum(), ScoredDataset(rows, end_token_ids=[257]), Accelerator(cpu=True), objective=SoftTargets(teacher())
    )
    for _ in loop.epochs(1):
        with pytest.raises(ValueError, match=r"loop\.prepare\(model\)"):
            next(loop.batches(tiny.model(), []))
        break


def test_a_loops_teacher_that_shares_weights_is_refused_before_the_student_is_frozen(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    student, other = tiny.model(), teacher()
    other.lm_head.bias = student.model.norm.weight  # one weight is enough
    rows = tiny.tokenised(tiny.candidates(2), tokenizer)
    loop = CurriculumLoop(
        curriculum(), ScoredDataset(rows, end_token_ids=[257]), Accelerator(cpu=True), objective=SoftTargets(other)
    )
    with pytest.raises(ValueError, match=r"teacher=.*shares weights.*second time"):
        loop.prepare(student)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_soft_targets_train_adapters_and_nothing_else(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """With alpha = 1, the adapter descends the divergence that a step reports."""
    trainer = trainer_of(
        "SFTTrainer",
        tmp_path,
        tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], r=4),
        num_train_epochs=4,
        learning_rate=0.5,
    )
    frozen = {name: value.clone() for name, value in trainer.model.named_parameters() if not value.requires_grad}
    attach(trainer, curriculum(), objective=SoftTargets(teacher(), alpha=1.0))
    trainer.train()
    found = [line["soft_targets"] for line in trainer.state.log_history if "soft_targets" in line]
    assert sum(found[-3:]) < sum(found[:3])
    assert all(torch.equal(value, dict(trainer.model.named_parameters())[name]) for name, value in frozen.items())
