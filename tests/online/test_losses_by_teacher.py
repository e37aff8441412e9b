"""The training loss by teacher and domain in the trainer's log, from the scores that training observes anyway."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from distill_sampler import attach
from tests.online.test_loss_weights import trainer_of
from tests.online.test_observing import observing

LOSS = "curriculum/loss/teacher/"


def logged(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_the_log_tells_the_loss_of_each_teacher(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of(kind, tmp_path, tokenizer, learning_rate=0.0, logging_steps=2, num_train_epochs=2)
    curriculum = observing()
    attach(trainer, curriculum)
    trainer.train()
    dataset, lines = curriculum.dataset, logged(trainer)
    plan = np.concatenate([plan.indices for plan in curriculum.plans])
    assert len(lines) == 3  # six steps of two samples, two steps a line
    surprisal = curriculum.store.observed.columns["mean_surprisal"]
    surprisal = np.where(np.isnan(surprisal), curriculum.store.latest["mean_surprisal"], surprisal)
    for number, line in enumerate(lines):
        of_line = plan[4 * number : 4 * number + 4]
        teachers = {str(dataset[int(row)]["teacher"]) for row in of_line}
        assert {name.removeprefix(LOSS) for name in line if name.startswith(LOSS)} == teachers
        for teacher in teachers:
            own = np.array([row for row in of_line.tolist() if dataset[row]["teacher"] == teacher])
            expected = np.average(surprisal[own], weights=dataset.num_scored[own])
            assert line[LOSS + teacher] == pytest.approx(expected, rel=1e-4)


def test_without_observing_no_loss_by_teacher_is_told(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of("Trainer", tmp_path, tokenizer)
    attach(trainer, observing(observe=False))
    trainer.train()
    assert not any(name.startswith(LOSS) for line in logged(trainer) for name in line)


def test_the_loss_is_told_by_domain_too(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of("Trainer", tmp_path, tokenizer)
    curriculum = observing(domain="prompt_id")  # any column with few values
    attach(trainer, curriculum)
    trainer.train()
    told = {name for line in logged(trainer) for name in line if name.startswith("curriculum/loss/prompt_id/")}
    assert told == {"curriculum/loss/prompt_id/sum-0", "curriculum/loss/prompt_id/sum-1"}
