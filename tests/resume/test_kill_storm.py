"""The kill storm, with fewer kills than in `recipes/benchmarks/kill_storm.py`; and a disk that is full for real."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from distill_sampler import attach
from distill_sampler.integrations.checkpoints import last_whole, why_broken
from tests.test_attach import curriculum, plain_trainer, trained

STORM = Path(__file__).parents[2] / "recipes" / "benchmarks" / "kill_storm.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "options"),
    [
        (12, ["--seed", "1"]),
        (6, ["--processes", "2", "--seed", "2"]),
        (6, ["--elastic", "--seed", "3"]),
        (6, ["--packs", "--elastic", "--seed", "4"]),
        (4, ["--objective", "--packs", "--prompts", "10", "--seed", "5"]),
    ],
    ids=["one process", "two processes", "one or two by turns", "packs, one or two by turns", "objectives on packs"],
)
def test_a_run_that_is_killed_many_times_trains_the_same_as_without_kills(
    kills: int, options: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, str(STORM), "--kills", str(kills), "--folder", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (survived,) = re.findall(r"^(\d+) kills in \d+ runs, 0 differences", done.stdout, flags=re.MULTILINE)
    assert int(survived) >= kills


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """One megabyte, a few checkpoints."""
    folder = tmp_path / "small"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mount = shutil.which("mount")
    if (
        os.geteuid() != 0
        or mount is None
        or subprocess.run([mount, *options], capture_output=True, check=False).returncode
    ):
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


SAVING = {"save_strategy": "steps", "save_steps": 1}


def run(output: Path, tokenizer: PreTrainedTokenizerBase, resume: Any = None) -> list[int]:
    trainer = plain_trainer(output, tokenizer, **SAVING)
    attach(trainer, curriculum(), sample_log=True)
    trainer.batches = []
    trainer.train(resume_from_checkpoint=resume)
    return trained(trainer)


def test_a_full_disk_ends_the_run_and_the_last_whole_checkpoint_resumes(
    small_disk: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = run(tmp_path / "whole", tokenizer)
    with pytest.raises(Exception, match=r"No space left|file write failed|unexpected pos|enforce fail") as full:
        run(small_disk, tokenizer)
    found, passed_over = last_whole(small_disk)
    assert found is not None
    assert f"The last whole checkpoint is {found}" in full.value.__notes__[0]
    assert len(passed_over) == 1
    output = Path(shutil.copytree(small_disk, tmp_path / "larger"))
    step = int(found.name.partition("-")[2])
    assert run(output, tokenizer, True) == whole[2 * step :]
    assert why_broken(output / "checkpoint-6") == ""


def test_a_read_only_folder_stops_only_what_must_be_written(
    small_disk: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    output = small_disk / "run"
    output.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    trainer = plain_trainer(output, tokenizer, save_strategy="no")
    attach(trainer, curriculum())
    trainer.train()
    assert len(trained(trainer)) == 12
    trainer = plain_trainer(output, tokenizer, **SAVING)
    attach(trainer, curriculum())
    with pytest.raises(OSError, match="Read-only file system"):
        trainer.train()
    assert "other runs are not kept out of it" in caplog.text
    assert "parts of the scoring pass cannot be kept" in caplog.text
