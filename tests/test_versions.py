"""What every supported release of transformers and TRL must do the same. `recipes/matrix.py` runs this in each."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from distill_sampler import BestOf, Curriculum, RankSurprisalRatio, Scorer, Shuffle, attach
from distill_sampler.integrations import versions
from tests import tiny
from tests.cli.conftest import call
from tests.test_attach import arguments, plain_trainer

ROOT = Path(__file__).parents[1]
RSR = "rank_surprisal_ratio"
FIRST_PLAN = "7f3b94b51b5b"
"""Fingerprint of the plan of epoch 0, on the toy candidates and the student below."""


def student() -> PreTrainedModel:
    """The tiny model with weights that do not depend on how a release initialises them."""
    model = tiny.model()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" not in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def messages(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": row["prompt"] + row["completion"]}


def sft(rows: Callable[[], datasets.Dataset], **changes: Any) -> Callable[[Path, Any], Any]:
    def make(output: Path, tokenizer: Any) -> Any:
        args = SFTConfig(**arguments(output, bf16=False, gradient_checkpointing=False, **changes))
        return SFTTrainer(model=student(), processing_class=tokenizer, train_dataset=rows(), args=args)

    return make


TRAINERS: dict[str, Callable[[Path, Any], Any]] = {
    "Trainer": lambda output, tokenizer: plain_trainer(output, tokenizer, model=student()),
    "SFTTrainer": sft(tiny.candidates),
    "SFTTrainer, all tokens": sft(tiny.candidates, completion_only_loss=False),
    "SFTTrainer, messages": sft(lambda: tiny.candidates().map(messages, remove_columns=["prompt", "completion"])),
    "SFTTrainer, assistant only": sft(
        lambda: tiny.candidates().map(messages, remove_columns=["prompt", "completion"]), assistant_only_loss=True
    ),
    "SFTTrainer, padding-free": sft(tiny.candidates, padding_free=True, max_length=None),
}


@pytest.mark.parametrize("kind", TRAINERS)
def test_every_release_plans_the_same_for_every_layout_and_trains_it(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = TRAINERS[kind](tmp_path, tokenizer)
    curriculum = Curriculum(
        metrics=[RankSurprisalRatio()],
        policies=[BestOf(RSR, per="prompt_id"), Shuffle()],
        scorer=Scorer(progress=False),
    )
    attach(trainer, curriculum, sample_log=True)  # with a log, every batch is compared with the plan
    trainer.train()
    assert trainer.state.global_step == 6
    assert len(curriculum.plans) == 2
    assert curriculum.plans[0].fingerprint == FIRST_PLAN


SAVING = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}


def resumed(folder: Path, tokenizer: PreTrainedTokenizerBase, checkpoint: Path | None = None, **changes: Any) -> Any:
    trainer = plain_trainer(folder, tokenizer, model=student(), **{**SAVING, **changes})
    curriculum = Curriculum(
        metrics=[RankSurprisalRatio()],
        policies=[BestOf(RSR, per="prompt_id"), Shuffle()],
        scorer=Scorer(progress=False),
    )
    attach(trainer, curriculum)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def resume_everywhere(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A resume within the first epoch, between the two and within the second ends with the same weights."""
    whole = resumed(folder / "whole", tokenizer)
    for step in (2, 3, 4):
        rest = resumed(folder / f"rest-{step}", tokenizer, folder / "whole" / f"checkpoint-{step}")
        for left, right in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
            assert torch.equal(left, right)


def test_a_resume_trains_the_rest(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    resume_everywhere(tmp_path, tokenizer)


@pytest.mark.slow
def test_the_oldest_releases_keep_the_promises_in_an_environment_of_their_own(tmp_path: Path) -> None:
    """A thin slice of the matrix. On this Python's packages, because torch takes minutes to install."""
    matrix = ROOT / "recipes" / "matrix.py"
    command = [sys.executable, str(matrix), "--reuse", "--only", "4.57", "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    if "No matching distribution found" in done.stdout + done.stderr:
        pytest.skip("no package index has the old releases")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "transformers 4.57.6, trl 0.24.0" in done.stdout


# ---- Without the extras ----


@pytest.mark.parametrize("recipe", ["sft", "provenance"])
def test_a_recipe_without_its_extra_says_what_to_install(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match=r"pip install 'distill_sampler\[(trl|demo)\]'"):
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"))


def test_the_demo_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distill_sampler.cli.demo", None)
    done = call("demo")
    assert done.code == 1
    assert "pip install 'distill_sampler[demo]'" in done.said


# ---- What older releases need, tried with this one ----


def test_labels_made_from_masks_are_those_of_the_trainer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = TRAINERS["SFTTrainer"](tmp_path, tokenizer)
    rows = versions.prepared_rows(trainer)

    def masks(row: dict[str, Any]) -> dict[str, Any]:
        return {"completion_mask": [label != -100 for label in row["labels"]]}

    older = SimpleNamespace(
        train_dataset=rows.map(masks).remove_columns("labels"), args=trainer.args, completion_only_loss=True
    )
    monkeypatch.setattr("trl.__version__", "1.6.0")
    assert versions.prepared_rows(older)["labels"][:] == rows["labels"][:]
    older.completion_only_loss = False
    assert versions.prepared_rows(older)["labels"][:] == rows["input_ids"][:]
    monkeypatch.setattr("trl.__version__", "1.7.0")
    assert versions.prepared_rows(older) is older.train_dataset


@pytest.mark.parametrize(
    ("release", "settings", "expected"),
    [
        ("5.1.0", {"group_by_length": True}, "group_by_length=True"),
        ("5.1.0", {"group_by_length": False}, None),
        ("5.2.0", {"train_sampling_strategy": "sequential"}, "train_sampling_strategy='sequential'"),
        ("5.2.0", {"train_sampling_strategy": "random"}, None),
    ],
)
def test_the_trainers_own_order_is_found_under_the_name_of_its_release(
    release: str, settings: dict[str, Any], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.__version__", release)
    found = versions.sampling_of(SimpleNamespace(**settings))  # type: ignore[arg-type]
    assert (found and found[0]) == expected


def test_a_release_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "4.56.2")
    with pytest.raises(ImportError, match=r"distill_sampler needs transformers 4\.57 or later; 4\.56\.2 is installed"):
        runpy.run_path(versions.__file__)


def test_a_trl_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.__version__", "0.23.1")
    with pytest.raises(ImportError, match=r"needs trl 0\.24 or later; 0\.23\.1 is installed"):
        versions.refuse_old_trl()


def test_a_trainer_that_finds_its_own_place_resumes_there_and_refuses_steps_of_another_size(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_sampler.integrations.seams.BEGINS_ANYWHERE", False)
    resume_everywhere(tmp_path, tokenizer)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    with pytest.raises(ValueError, match=r"per_device_train_batch_size.*transformers 5\.3 or later"):
        resumed(tmp_path / "other", tokenizer, checkpoint, per_device_train_batch_size=1)
