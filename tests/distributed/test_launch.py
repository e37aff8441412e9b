"""Two real processes under `accelerate launch`, on a CPU: the same scores, plans and order as one process has."""

import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "accelerate_configs"
WAYS = {
    "ddp": (CONFIGS / "cpu.yaml", "MULTI_CPU", "DistributedDataParallel", 1e-5),
    "zero2": (CONFIGS / "cpu_zero2.yaml", "DEEPSPEED", "DeepSpeedEngine", 1e-4),
    "zero3": (CONFIGS / "cpu_zero3.yaml", "DEEPSPEED", "DeepSpeedEngine", 1e-4),
    "fsdp2": (HERE / "cpu_fsdp2.yaml", "FSDP", "FSDPLlamaForCausalLM", 1e-4),
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and candidates on disk. Eight prompts: an epoch is two whole batches of four."""
    folder = tmp_path_factory.mktemp("launch")
    tiny.model().save_pretrained(folder / "student")
    tiny.tokenizer().save_pretrained(folder / "student")
    with open(folder / "candidates.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in tiny.candidates(8))
    return folder


def launch(stage: Path, name: str, config: Path | None, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if config is not None:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    command += [str(HERE / "sft_run.py"), str(stage / "student"), str(stage / "candidates.jsonl"), str(stage / name)]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=400, cwd=stage)


def reports(stage: Path, name: str, config: Path | None, *options: str) -> list[dict[str, Any]]:
    done = launch(stage, name, config, *options)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(path.read_text()) for path in sorted((stage / name).glob("rank-*.json"))]


@functools.cache
def alone(stage: Path) -> dict[str, Any]:
    """The run of one process, with the same global batch."""
    (report,) = reports(stage, "alone", None, "--batch-size", "4")
    return report


def trained(of_ranks: list[dict[str, Any]]) -> list[list[int]]:
    """Samples of each global batch: the batch of rank 0, then that of rank 1."""
    index = {tuple(row): place for place, row in enumerate(of_ranks[0]["rows"])}
    steps = zip(*(report["batches"] for report in of_ranks), strict=True)
    return [[index[tuple(row)] for batch in step for row in batch] for step in steps]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_score_plan_train_and_resume_as_one_does(way: str, stage: Path) -> None:
    config, distributed_type, wrapper, tolerance = WAYS[way]
    if distributed_type == "DEEPSPEED":
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    both = reports(stage, way, config)
    for report in both:
        assert report["world_size"] == 2
        assert report["distributed_type"].endswith(distributed_type)
        assert report["wrapper"] == wrapper
        assert report["plans"] == both[0]["plans"]
    one = alone(stage)
    np.testing.assert_allclose(both[0]["scores"][0], one["scores"][0], rtol=tolerance)
    np.testing.assert_allclose(both[0]["scores"][1], one["scores"][1], rtol=1e-3)  # of a student trained meanwhile
    assert both[0]["scores"] == both[1]["scores"]
    assert both[0]["plans"] == one["plans"]
    assert trained(both) == trained([one])
    np.testing.assert_allclose(both[0]["losses"], one["losses"], rtol=1e-3)

    rest = reports(stage, f"{way}-resumed", config, "--resume", str(stage / way / "checkpoint-1"))
    assert trained(rest) == trained([one])[1:]
    np.testing.assert_allclose(rest[0]["losses"][-3:], one["losses"][-3:], rtol=1e-3)


@pytest.mark.parametrize("options", [["--lora"], ["--checkpointing"]])
def test_a_sharded_student_with_an_adapter_or_checkpointing_scores_as_one_process_does(
    options: list[str], stage: Path
) -> None:
    pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    name = options[0].strip("-")
    both = reports(stage, f"zero3-{name}", WAYS["zero3"][0], *options)
    (one,) = reports(stage, f"alone-{name}", None, "--batch-size", "4", *options)
    np.testing.assert_allclose(both[0]["scores"][0], one["scores"][0], rtol=1e-4)
    assert trained(both) == trained([one])


def test_fewer_samples_than_processes_do_not_hang(stage: Path) -> None:
    both = reports(stage, "few", WAYS["fsdp2"][0], "--rows", "1")
    assert [report["plans"] for report in both] == [[[0], [0]]] * 2


def test_other_data_on_a_process_stops_the_run_with_what_differs(stage: Path) -> None:
    done = launch(stage, "other", WAYS["ddp"][0], "--other-data-on-rank-1")
    assert done.returncode != 0
    assert "The processes do not have the same data set: rank 0 has" in done.stderr


def test_a_process_that_dies_while_scoring_ends_the_others_soon(stage: Path) -> None:
    started = time.monotonic()
    done = launch(stage, "dies", WAYS["fsdp2"][0], "--die-on-rank-1")
    assert done.returncode != 0
    assert "exitcode  : 9" in done.stderr
    assert time.monotonic() - started < 150
