"""`distill-sampler verify` compares what was trained with the plan that was in force, or says that it cannot."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerBase, TrainingArguments

from distill_sampler import BestOf, Rescore, SortBy, attach
from distill_sampler.artifacts.record import Record
from distill_sampler.integrations.sample_log import SampleLog, read_log
from distill_sampler.types import Batch
from tests import tiny
from tests.distributed.launcher import launch
from tests.resume.test_checkpoints import steps_may_change, verified
from tests.test_attach import RSR, RecordedTrainer, arguments, curriculum, plain_trainer

SAVING = {"save_strategy": "steps", "save_steps": 1}
REPLANNED = Rescore(every_steps=2, lag=2)


def train(
    output: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sample_log: bool = True,
    resume: Path | None = None,
    **changes: Any,
) -> Any:
    """Two epochs of 12 samples in six steps, each replanned after two."""
    pack_to = changes.pop("pack_to", None)
    settings = {**SAVING, "learning_rate": 5e-2, **changes}
    if pack_to is None:
        trainer = plain_trainer(output, tokenizer, **settings)
    else:
        trainer = RecordedTrainer(
            model=tiny.model(),
            processing_class=tokenizer,
            train_dataset=tiny.tokenised(tiny.candidates(), tokenizer),
            data_collator=DataCollatorWithFlattening(),
            args=TrainingArguments(**arguments(output, **{**settings, "per_device_train_batch_size": 1})),
        )
    attached = curriculum(policies=[SortBy(RSR), BestOf(RSR, per="prompt_id", k=2)], rescore=REPLANNED)
    attach(trainer, attached, sample_log=sample_log, pack_to=pack_to)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return attached


@pytest.fixture(scope="module", params=[None, 160], ids=["samples", "packs"])
def replanned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> tuple[Path, Any]:
    output = tmp_path_factory.mktemp("replanned") / "run"
    return output, train(output, tokenizer, pack_to=request.param)


@pytest.fixture
def output(replanned: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of its folder to change."""
    return Path(shutil.copytree(replanned[0], tmp_path / "run"))


def checkpoints(output: Path) -> list[Path]:
    return sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def change_the_last_line(output: Path, *, epoch: int) -> None:
    log = output / "distill_sampler" / "samples-0.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()
    (*_, place) = (n for n, line in enumerate(lines) if json.loads(line).get("epoch") == epoch)
    last = json.loads(lines[place])
    lines[place] = json.dumps({**last, "samples": [number + 1 for number in last["samples"]]})
    log.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_what_was_trained_after_a_checkpoint_is_compared_with_the_later_plan(replanned: tuple[Path, Any]) -> None:
    output, attached = replanned
    assert len({plan.fingerprint for plan in attached.plans}) > 3  # each epoch has changed
    for checkpoint in checkpoints(output):
        code, said = verified(checkpoint)
        assert code == 0, said
        assert "not compared" not in said


def test_at_the_end_of_an_epoch_all_of_its_samples_are_trained(replanned: tuple[Path, Any]) -> None:
    """Packs that are planned anew hold another number of samples than the epoch's first plan."""
    output, attached = replanned
    steps = len(checkpoints(output)) // 2
    lengths = {planned.epoch: len(planned.plan) for planned in attached.cycle.record.plans}
    for epoch in (0, 1):
        said = verified(output / f"checkpoint-{steps * (epoch + 1)}")[1]
        assert f"{lengths[epoch]} of {lengths[epoch]} samples trained" in said


@steps_may_change
def test_a_plan_whose_rest_is_trained_in_larger_steps_is_trained_to_its_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    train(tmp_path / "run", tokenizer, num_train_epochs=1)
    train(
        tmp_path / "run",
        tokenizer,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        resume=tmp_path / "run" / "checkpoint-3",
    )
    code, said = verified(tmp_path / "run" / "checkpoint-5")
    assert code == 0, said
    assert "14 of 14 samples trained (2 of them are the plan's first samples" in said


def test_a_difference_after_the_checkpoint_is_found(output: Path) -> None:
    change_the_last_line(output, epoch=0)
    code, said = verified(output / "checkpoint-1")
    assert code == 1
    assert "DISAGREES in 1 places" in said


@pytest.mark.parametrize("lost", ["the whole record", "its end"])
def test_without_the_later_plans_what_they_cover_is_not_compared_and_counted(lost: str, output: Path) -> None:
    record = output / "distill_sampler" / "record"
    if lost == "the whole record":
        shutil.rmtree(record)
    else:
        for kind in ("plan", "left"):
            for path in sorted(record.glob(f"{kind}-*"))[1:]:
                path.unlink()
    change_the_last_line(output, epoch=0)
    code, said = verified(output / "checkpoint-1")
    assert code == 0, said
    # the next plan may have been made at step 2, and changes what is trained after two more
    assert "trained after optimizer step 4 are not compared" in said
    last = checkpoints(output)[-1]
    assert "not compared" not in verified(last)[1]


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["deleted", "empty"])
def test_a_damaged_record_is_named(change: Callable[[Path], Any], output: Path) -> None:
    (damaged,) = (output / "distill_sampler" / "record").glob("left-0000001-*")
    change(damaged)
    code, said = verified(output / "checkpoint-1")
    assert code == 2
    assert "left-0000001" in said
    assert "damaged" in said


def test_damage_that_the_comparison_does_not_need_does_not_end_it(output: Path) -> None:
    record = output / "distill_sampler" / "record"
    (damaged,) = record.glob("plan-0000000-*")
    damaged.write_bytes(b"")
    assert verified(checkpoints(output)[-1])[0] == 0
    for kind in ("plan", "left"):
        next(record.glob(f"{kind}-0000001-*")).unlink()
    code, said = verified(checkpoints(output)[-1])
    assert code == 0, said
    assert "lacks plan-0000001" in said


@pytest.mark.parametrize(
    ("which", "expected"), [("the checkpoint's own", 0), ("the epoch's next", 2), ("the next epoch's first", 0)]
)
def test_a_plan_that_was_deleted_from_the_record_is_named(which: str, expected: int, output: Path) -> None:
    record = output / "distill_sampler" / "record"
    epochs = [planned.epoch for planned in Record(record, write=False).plans]
    number = {"the checkpoint's own": 0, "the epoch's next": 1}.get(which, epochs.index(1))
    for kind in ("plan", "left"):
        (path,) = record.glob(f"{kind}-{number:07d}-*")
        path.unlink()
    code, said = verified(output / "checkpoint-1")
    assert code == expected, said
    assert f"lacks plan-{number:07d}, a plan of epoch {epochs[number]}" in said


def test_a_log_of_a_later_run_in_the_same_folder_is_not_compared(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    train(tmp_path / "run", tokenizer)
    train(tmp_path / "run", tokenizer, sample_log=False, save_strategy="no")
    assert verified(tmp_path / "run" / "checkpoint-3")[0] == 0  # its record was moved aside
    train(tmp_path / "run", tokenizer, save_strategy="no")
    code, said = verified(tmp_path / "run" / "checkpoint-3")
    assert code == 2
    assert "is of a later run" in said
    assert "--log" in said


@pytest.mark.slow
def test_what_two_processes_logged_is_verified_also_after_a_resume_with_one(tmp_path: Path) -> None:
    script, output = Path(__file__).with_name("log_run.py"), tmp_path / "run"
    config = Path(__file__).parents[2] / "accelerate_configs" / "cpu.yaml"
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = launch(script, str(output), cwd=tmp_path, config=config, environment=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    code, said = verified(*checkpoints(output))
    assert code == 0, said
    assert said.count("The log agrees") == 12
    for checkpoint in checkpoints(output)[4:]:
        shutil.rmtree(checkpoint)
    done = launch(script, str(output), str(output / "checkpoint-4"), cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    code, said = verified(*checkpoints(output))
    assert code == 0, said
    assert said.count("The log agrees") == 12
    assert len(read_log(output / "distill_sampler")) == 4 * 2 + 8


# ---- The log ----


def batch(step: int) -> Batch:
    one = np.ones(1, np.int64)
    return Batch(samples=one * step, weights=one, starts=one, lengths=one, shape=(1, 1), place=step, epoch=0, step=step)


def write(folder: Path, run: str, rank: int, world_size: int, *, first: int, last: int) -> None:
    log = SampleLog(rank=rank, world_size=world_size)
    log.begin(folder, run)
    with log.open(torch.nn.Identity(), step=first):
        for step in range(first, last):
            log.before(batch(step))


def test_on_a_resume_the_lines_of_processes_that_are_gone_are_trimmed_too(tmp_path: Path) -> None:
    for rank in (0, 1):
        write(tmp_path, "one", rank, 2, first=0, last=4)
    write(tmp_path, "one", 0, 1, first=2, last=5)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 1, 2, 2, 3, 4, 5]


@pytest.mark.parametrize("first", [0, 2])
def test_lines_of_another_run_are_never_kept(first: int, tmp_path: Path) -> None:
    for rank in (0, 1):
        write(tmp_path, "one", rank, 2, first=0, last=4)
    write(tmp_path, "other", 0, 1, first=first, last=5)
    assert [line["step"] for line in read_log(tmp_path, "other")] == list(range(first + 1, 6))
    with pytest.raises(ValueError, match=r"later run.*--log"):
        read_log(tmp_path, "one")
