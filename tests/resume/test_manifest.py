"""A manifest says of every file of a checkpoint what was saved; what differs from it is named before it is loaded."""

import contextlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from distill_sampler import attach
from distill_sampler.artifacts import manifest
from distill_sampler.artifacts.manifest import MANIFEST, Manifests, damage, write_manifest
from distill_sampler.distributed import Ranks
from distill_sampler.integrations.seams import random_state_kept
from tests import tiny
from tests.test_attach import RecordedTrainer, arguments, curriculum, plain_trainer, trained

SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Files as processes write them, with a manifest."""
    folder = tmp_path / "checkpoint-3"
    (folder / "global_step3").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, size in (("model.safetensors", 5000), ("global_step3/optimizer_0.pt", 300), ("empty", 0), ("é.txt", 9)):
        (folder / name).write_bytes(random.bytes(size))
    write_manifest(folder)
    return folder


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit": (lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]), "not what was"),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "not what was saved"),
    "an end": (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes and was saved with"),
    "a longer end": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes and was saved with"),
    "all of it": (lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("of", DAMAGES)
@pytest.mark.parametrize("file", ["model.safetensors", "global_step3/optimizer_0.pt", "é.txt"])
def test_any_damage_of_any_file_is_named(file: str, of: str, checkpoint: Path) -> None:
    assert damage(checkpoint) == ""
    harm, said = DAMAGES[of]
    harm(checkpoint / file)
    assert file in damage(checkpoint)
    assert said in damage(checkpoint)


@pytest.mark.parametrize("of", DAMAGES)
def test_a_damaged_manifest_is_named_and_one_that_is_missing_says_nothing(of: str, checkpoint: Path) -> None:
    DAMAGES[of][0](checkpoint / MANIFEST)
    if of == "all of it":
        (checkpoint / "empty").unlink()
        assert damage(checkpoint) == ""
    else:
        assert damage(checkpoint) == f"its {MANIFEST} is damaged"


def test_a_number_in_the_manifest_that_was_changed_is_damage(checkpoint: Path) -> None:
    text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
    (checkpoint / MANIFEST).write_text(text.replace("5000", "5001"), encoding="utf-8")
    assert damage(checkpoint) == f"its {MANIFEST} is damaged"


def test_files_that_came_later_are_not_looked_at(checkpoint: Path) -> None:
    (checkpoint / "notes.md").write_text("A good one.", encoding="utf-8")
    assert damage(checkpoint) == ""


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_each_file_is_looked_at_by_one_process(processes: int, checkpoint: Path) -> None:
    ranks = [Ranks(rank=rank, world_size=processes) for rank in range(processes)]
    assert [damage(checkpoint, of) for of in ranks] == [""] * processes
    for file in ("model.safetensors", "global_step3/optimizer_0.pt", "empty", "é.txt"):
        content = (checkpoint / file).read_bytes()
        (checkpoint / file).unlink()
        assert sum(file in damage(checkpoint, of) for of in ranks) == 1
        (checkpoint / file).write_bytes(content)


def test_a_manifest_of_a_later_version_is_not_compared_and_that_is_said(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(manifest, "FORMAT", 0)
    assert damage(checkpoint) == ""
    assert "another version of distill_sampler" in caplog.text


def test_files_that_change_while_they_are_read_get_no_manifest(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when somebody still writes to the checkpoint."""
    quick_hashes, left = manifest.quick_hashes, 0

    def change_and_hash(*args: Any, **kwargs: Any) -> list[str]:
        nonlocal left
        if left > 0:
            left -= 1
            (checkpoint / "model.safetensors").write_bytes(bytes(5000 + left))
        return quick_hashes(*args, **kwargs)

    monkeypatch.setattr(manifest, "quick_hashes", change_and_hash)
    manifests = Manifests(write=True)
    for left, written in ((2, True), (100, False)):  # noqa: B007
        manifests.saving(checkpoint, Ranks())
        assert not (checkpoint / MANIFEST).exists()
        manifests.saved(checkpoint)
        manifests.begin(Ranks())
        manifests.wait()
        assert (checkpoint / MANIFEST).exists() == written
        assert ("gets no manifest" in caplog.text) == (not written)


def test_a_checkpoint_that_was_deleted_meanwhile_is_no_trouble(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifests = Manifests(write=True)
    manifests.saved(checkpoint)
    shutil.rmtree(checkpoint)
    manifests.begin(Ranks())
    manifests.wait()
    assert caplog.text == ""
    assert list(checkpoint.parent.iterdir()) == []


def test_a_manifest_appears_in_the_checkpoint_complete(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is uploaded while training goes on, and `_*` in the output folder never is."""
    (checkpoint / MANIFEST).unlink()
    write, seen = manifest.write_atomically, []

    def write_and_look(path: Path, content: bytes) -> None:
        write(path, content)
        seen.extend([path, *(file for file in checkpoint.iterdir() if MANIFEST in file.name)])

    monkeypatch.setattr(manifest, "write_atomically", write_and_look)
    write_manifest(checkpoint)
    (unfinished,) = seen
    assert unfinished == checkpoint.parent / f"_{MANIFEST}"
    assert not unfinished.exists()
    assert damage(checkpoint) == ""


# ---- In a trainer ----


def names_in(checkpoint: Path) -> set[str]:
    return set(json.loads((checkpoint / MANIFEST).read_bytes())["files"])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> tuple[Path, list[int]]:
    """The output folder of a run of two epochs of three steps, and what it trained."""
    output = tmp_path_factory.mktemp("whole")
    trainer = plain_trainer(output, tokenizer, **SAVING)
    attach(trainer, curriculum())
    trainer.train()
    return output, trained(trainer)


@pytest.fixture
def output(whole_run: tuple[Path, list[int]], tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(whole_run[0], tmp_path / "copy"))


def test_every_checkpoint_of_a_run_has_a_manifest_of_all_its_files(whole_run: tuple[Path, list[int]]) -> None:
    for step in range(1, 7):
        checkpoint = whole_run[0] / f"checkpoint-{step}"
        assert names_in(checkpoint) == {path.name for path in checkpoint.iterdir()} - {MANIFEST}
        assert damage(checkpoint) == ""
    assert [path.name for path in whole_run[0].iterdir() if path.name.startswith("_")] == []


@pytest.mark.parametrize("limit", [1, 2])
def test_the_trainer_deletes_the_oldest_checkpoints_with_manifests_as_without(
    limit: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """It goes by the time of a folder's last change, which a manifest would change."""
    trainer = plain_trainer(tmp_path, tokenizer, **SAVING, save_total_limit=limit)
    attach(trainer, curriculum())
    trainer.train()
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert left == [f"checkpoint-{step}" for step in range(7 - limit, 7)]
    assert all((tmp_path / name / MANIFEST).exists() for name in left)


class KeepsAnotherForm(TrainerCallback):
    """As many callbacks for adapters do: writes weights of its own into the checkpoint, and removes the trainer's."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (checkpoint / "own.bin").write_bytes(b"weights")
        (checkpoint / "training_args.bin").unlink()


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_what_callbacks_do_to_a_checkpoint_belongs_to_it(
    strategy: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = plain_trainer(tmp_path, tokenizer, save_strategy=strategy, save_steps=1)
    attach(trainer, curriculum())
    trainer.add_callback(KeepsAnotherForm())
    trainer.train()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        assert {"own.bin", "model.safetensors"} < names_in(checkpoint)
        assert "training_args.bin" not in names_in(checkpoint)
        assert damage(checkpoint) == ""


def test_a_run_that_begins_anew_in_a_folder_leaves_no_old_manifest(
    output: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = plain_trainer(output, tokenizer, **SAVING, max_steps=2, learning_rate=1e-3)
    attach(trainer, curriculum(), manifests=False)
    trainer.train()
    assert [(output / f"checkpoint-{step}" / MANIFEST).exists() for step in (1, 2, 3)] == [False, False, True]


def resumed(output: Path, tokenizer: PreTrainedTokenizerBase, resume: Any = True, **options: Any) -> list[int]:
    trainer = plain_trainer(output, tokenizer, **SAVING)
    attach(trainer, curriculum(), **options)
    trainer.batches = []
    trainer.train(resume_from_checkpoint=resume)
    return trained(trainer)


def test_without_manifests_none_is_written_and_none_compared(
    output: Path, whole_run: tuple[Path, list[int]], tokenizer: PreTrainedTokenizerBase
) -> None:
    shutil.rmtree(output / "checkpoint-6")
    (output / "checkpoint-5" / MANIFEST).write_bytes(b"")
    assert resumed(output, tokenizer, manifests=False) == whole_run[1][10:]
    assert not (output / "checkpoint-6" / MANIFEST).exists()


# ---- Whatever fails in loading ----


def foreign_optimizer(checkpoint: Path) -> None:
    torch.save({"state": {}, "param_groups": []}, checkpoint / "optimizer.pt")


def foreign_weights(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "model.safetensors", ignore_errors=True)
    tiny.model(hidden_size=16).save_pretrained(checkpoint)


def foreign_random_state(checkpoint: Path) -> None:
    """The trainer itself would load it after `on_train_begin`."""
    torch.save({"python": 3}, checkpoint / "rng_state.pth")


@pytest.mark.parametrize("change", [foreign_optimizer, foreign_weights, foreign_random_state])
def test_what_cannot_be_loaded_is_passed_over(
    change: Callable[[Path], None],
    output: Path,
    whole_run: tuple[Path, list[int]],
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whole files, and no manifest that says that they are others."""
    change(output / "checkpoint-6")
    (output / "checkpoint-6" / MANIFEST).unlink()
    with caplog.at_level(logging.WARNING, "distill_sampler"):
        assert resumed(output, tokenizer) == whole_run[1][10:]
    assert "checkpoint-6 is passed over: loading it failed with" in caplog.text
    assert "Resuming from checkpoint-5" in caplog.text
    for step in range(1, 7):
        if step < 5:
            shutil.rmtree(output / f"checkpoint-{step}")
        else:
            change(output / f"checkpoint-{step}")
            (output / f"checkpoint-{step}" / MANIFEST).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"no complete checkpoint in .*loading it failed.*Start from the beginning"):
        resumed(output, tokenizer)


def test_a_named_checkpoint_that_cannot_be_loaded_is_refused_and_a_whole_one_is_offered(
    output: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    foreign_optimizer(output / "checkpoint-5")
    (output / "checkpoint-5" / MANIFEST).unlink()
    with pytest.raises(
        ValueError, match=r"checkpoint-5 cannot be resumed from: loading it failed.*Resume from .*checkpoint-6 instead"
    ):
        resumed(output, tokenizer, str(output / "checkpoint-5"))


def test_a_random_state_is_tried_without_a_trace() -> None:
    def drawn() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(1).item()]  # noqa: NPY002

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    expected = drawn()
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    with contextlib.suppress(ValueError), random_state_kept():
        drawn()
        raise ValueError
    assert drawn() == expected


def test_an_attempt_that_failed_leaves_no_trace(
    output: Path, tokenizer: PreTrainedTokenizerBase, whole_run: tuple[Path, list[int]]
) -> None:
    """The weights are those of a resume from the one before, with noise in the embeddings added once."""

    def end(checkpoint: Path, resume: Any) -> list[torch.Tensor]:
        trainer = plain_trainer(checkpoint, tokenizer, **SAVING, neftune_noise_alpha=5.0)
        attach(trainer, curriculum())
        trainer.train(resume_from_checkpoint=resume)
        return [parameter.detach() for parameter in trainer.model.parameters()]

    shutil.rmtree(output / "checkpoint-6")
    whole = Path(shutil.copytree(output, output.parent / "other"))
    foreign_optimizer(output / "checkpoint-5")
    (output / "checkpoint-5" / MANIFEST).unlink()
    for left, right in zip(end(output, True), end(whole, str(whole / "checkpoint-4")), strict=True):
        assert torch.equal(left, right)


@pytest.fixture
def best_of(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A trainer that loads its best checkpoint, the first, when it ends."""
    trainer = RecordedTrainer(
        model=tiny.model(),
        processing_class=tokenizer,
        train_dataset=tiny.tokenised(tiny.candidates(), tokenizer),
        eval_dataset=tiny.tokenised(tiny.candidates(2), tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        args=TrainingArguments(
            **arguments(tmp_path, **SAVING, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
        ),
    )
    trainer.compute_metrics = None
    trainer.evaluate = lambda *args, **kwargs: {"eval_loss": float(trainer.state.global_step)}
    return trainer


@pytest.mark.parametrize("damaged", [False, True])
def test_a_best_checkpoint_that_was_damaged_is_not_loaded(damaged: bool, best_of: Any) -> None:
    class Damages(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if damaged and state.global_step == 5:
                weights = Path(args.output_dir) / "checkpoint-1" / "model.safetensors"
                DAMAGES["a bit"][0](weights)

    attach(best_of, curriculum())
    best_of.add_callback(Damages())
    if damaged:
        with pytest.raises(ValueError, match=r"load_best_model_at_end=True: .*checkpoint-1 .*model.safetensors"):
            best_of.train()
    else:
        best_of.train()
        assert best_of.state.best_model_checkpoint.endswith("checkpoint-1")
