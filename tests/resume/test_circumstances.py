"""What happens around a run: disks that fill up, folders that become read-only, clocks that jump, searches, copies."""

import copy
import json
import logging
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import HPSearchBackend, IntervalStrategy

from distill_sampler import ScoredDataset, attach
from distill_sampler.artifacts import parts
from distill_sampler.artifacts import state as states
from distill_sampler.integrations.callback import CurriculumCallback
from distill_sampler.integrations.checkpoints import STATE_ENTRY
from distill_sampler.integrations.sample_log import SampleLog, read_log
from tests import tiny
from tests.resume.test_checkpoints import verified
from tests.test_attach import RecordedTrainer, curriculum, plain_trainer, trained

SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- Values ----


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 2**80])
def test_integers_beyond_64_bits_are_values_like_others(value: int) -> None:
    rows = [{"input_ids": [1, 2], "labels": [-100, 2], "prompt_id": value + n % 2} for n in range(4)]
    dataset = ScoredDataset(rows)
    column = dataset.column("prompt_id")
    assert column.codes.tolist() == [0, 1, 0, 1]
    assert dataset.column_fingerprint("prompt_id") != ScoredDataset(rows[::-1]).column_fingerprint("prompt_id")


@pytest.mark.parametrize("value", [2**40, 2**62, 2**63 - 1, -(2**63)])
def test_large_integers_are_told_apart(value: int) -> None:
    rows = datasets.Dataset.from_list(
        [
            {"input_ids": [1, 2], "labels": [-100, 2], "prompt_id": value - (n % 2 if value > 0 else -(n % 2))}
            for n in range(4)
        ]
    )
    assert ScoredDataset(rows).column("prompt_id").codes.tolist() == [0, 1, 0, 1]


# ---- The trainer ----


def test_a_copy_of_the_trainer_trains_with_the_same_curriculum(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """`copy.copy` shares the wrapped methods, so the copy is the original by another name."""
    trainer = plain_trainer(tmp_path / "run", tokenizer, **SAVING)
    attached = curriculum()
    attach(trainer, attached)
    copy.copy(trainer).train()
    assert len(attached.plans) == 2
    assert trained(trainer) == [n for plan in attached.plans for n in plan.indices.tolist()]


def test_each_trial_of_a_search_is_a_run_of_its_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Optuna need not be installed
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer = plain_trainer(tmp_path / "search", tokenizer, **SAVING)
    trainer.model_init = lambda: tiny.model()
    attached = curriculum()
    attach(trainer, attached, sample_log=True)
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer.hp_space = lambda trial: {"learning_rate": 1e-2 / (1 + trial.number)}
    trainer.hp_name = None
    runs = []
    for number in range(2):
        trainer.train(trial=SimpleNamespace(number=number, params={}))  # what `hyperparameter_search` calls
        runs.append(
            json.loads((tmp_path / "search" / f"run-{number}" / "distill_sampler" / "record" / "run.json").read_text())
        )
        assert len(attached.plans) == 2
        assert (tmp_path / "search" / f"run-{number}" / "scores.parquet").exists()
    assert runs[0]["run"] != runs[1]["run"]
    saved = json.loads((tmp_path / "search" / "run-1" / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"][STATE_ENTRY]["run"] == runs[1]["run"]
    for number in range(2):
        assert verified(tmp_path / "search" / f"run-{number}" / "checkpoint-6")[0] == 0
    assert not list((tmp_path / "search").glob("distill_sampler/samples-*"))


def test_a_record_that_is_damaged_while_the_run_trains_does_not_end_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    class Damages(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (path,) = (tmp_path / "run" / "distill_sampler" / "record").glob("pass-0000000-*")
            path.write_bytes(b"")

    trainer = plain_trainer(tmp_path / "run", tokenizer, **SAVING)
    trainer.add_callback(Damages())
    attached = curriculum()
    attach(trainer, attached)
    assert trainer.train().global_step == 6
    assert "scores.parquet and plans.parquet cannot be written" in caplog.text
    assert "pass-0000000" in caplog.text
    trainer.train()  # a new run, whose record begins anew


def test_the_best_model_at_the_end_changes_no_plan_and_can_be_resumed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:

    def run(output: Path, **best: Any) -> RecordedTrainer:
        trainer = plain_trainer(output, tokenizer, **SAVING)
        trainer.eval_dataset = trainer.train_dataset.select(range(4))
        for name, value in best.items():
            setattr(trainer.args, name, value)
        attach(trainer, curriculum())
        return trainer

    best: dict[str, Any] = {
        "load_best_model_at_end": True,
        "eval_strategy": IntervalStrategy.STEPS,
        "eval_steps": 1,
        "save_total_limit": 2,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
    }

    plain = run(tmp_path / "plain")
    plain.train()
    trainer = run(tmp_path / "best", **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert trained(trainer) == trained(plain)
    shutil.rmtree(tmp_path / "best" / "checkpoint-6")  # the best and the last one, and the one before
    resumed = run(tmp_path / "best", **best)
    resumed.train(resume_from_checkpoint=True)
    assert trained(resumed) == trained(plain)[-len(trained(resumed)) :]


def test_a_clock_that_jumps_back_does_not_change_which_checkpoint_is_the_last(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = plain_trainer(tmp_path / "run", tokenizer, **SAVING)
    attach(trainer, curriculum())
    trainer.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    for step in range(1, 6):  # the later it was written, the older it looks
        for path in [*(tmp_path / "run" / f"checkpoint-{step}").iterdir(), tmp_path / "run" / f"checkpoint-{step}"]:
            os.utime(path, (10**9 - step, 10**9 - step))
    resumed = plain_trainer(tmp_path / "run", tokenizer, **SAVING)
    attach(resumed, curriculum())
    resumed.train(resume_from_checkpoint=True)
    assert trained(resumed) == trained(trainer)[-len(trained(resumed)) :]
    assert len(trained(resumed)) == len(trained(trainer)) // 6


# ---- The disk ----


class Fill(TrainerCallback):
    """From a step on, no file of ours can be written: the disk is full, or the folder has become read-only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int, step: int) -> None:
        self.step = step
        self._patch = monkeypatch
        self._error = error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:

            def write(path: Path, content: bytes) -> None:
                raise OSError(self._error, os.strerror(self._error), str(path))

            for module in (parts, states):
                self._patch.setattr(module, "write_atomically", write)


@pytest.mark.parametrize("error", [28, 30], ids=["full", "read-only"])
def test_training_goes_on_without_a_record_where_it_can_no_longer_be_written(
    error: int,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = plain_trainer(tmp_path / "run", tokenizer, save_strategy="no")
    attached = curriculum()
    attach(trainer, attached)
    trainer.add_callback(Fill(monkeypatch, error, 2))
    with caplog.at_level(logging.WARNING, "distill_sampler"):
        trainer.train()
    assert len(trained(trainer)) == 2 * attached.num_samples
    assert "record can no longer be written" in caplog.text


def test_a_checkpoint_that_a_full_disk_cut_off_is_passed_over(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plain_trainer(tmp_path / "whole", tokenizer, **SAVING)
    attach(whole, curriculum())
    whole.train()
    trainer = plain_trainer(tmp_path / "run", tokenizer, **SAVING)
    attach(trainer, curriculum())
    with monkeypatch.context() as patch:
        trainer.add_callback(Fill(patch, 28, 4))
        with pytest.raises(OSError, match="No space left on device") as full:
            trainer.train()
    (note,) = full.value.__notes__
    assert "checkpoint-4 could not be saved" in note
    assert "MB left" in note
    assert re.search(r"checkpoint-3\..*resume_from_checkpoint=True", note)
    assert not (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").exists()
    resumed = plain_trainer(tmp_path / "run", tokenizer, **SAVING)
    attach(resumed, curriculum())
    resumed.train(resume_from_checkpoint=True)
    assert trained(resumed) == trained(whole)[-len(trained(resumed)) :]
    assert np.isclose(resumed.state.global_step, 6)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_training_goes_on_without_a_sample_log_where_it_can_no_longer_be_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(TrainerCallback):
        """From step 2 on, every write of the log fails as on a full disk."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                (log,) = (tap for tap in attached_to.taps if isinstance(tap, SampleLog))
                full = os.open("/dev/full", os.O_WRONLY)
                os.dup2(full, log._file)
                os.close(full)

    trainer = plain_trainer(tmp_path / "run", tokenizer, save_strategy="no")
    attach(trainer, curriculum(), sample_log=True)
    (attached_to,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, CurriculumCallback))
    trainer.add_callback(Full())
    with caplog.at_level(logging.WARNING, "distill_sampler"):
        trainer.train()
    assert len({line["step"] for line in read_log(tmp_path / "run" / "distill_sampler")}) == 2
    assert caplog.text.count("samples-0.jsonl can no longer be written") == 1
    assert trainer.state.global_step == 6
