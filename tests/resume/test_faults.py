"""The fault matrix: whichever file of a checkpoint is damaged, no resume trains on with it or ends in a raw error."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.distributed.launcher import launch

MATRIX = Path(__file__).parents[2] / "recipes" / "benchmarks" / "faults.py"


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    spec = importlib.util.spec_from_file_location("faults", MATRIX)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SAMPLE = [
    ("model.safetensors", "flipped"),
    ("optimizer.pt", "flipped"),
    ("rng_state.pth", "flipped"),
    ("scheduler.pt", "zeros"),
    ("trainer_state.json", "flipped"),
    ("tokenizer.json", "cut"),
    ("distill_sampler.safetensors", "deleted"),
    ("distill_sampler_manifest.json", "zeros"),
    ("distill_sampler_manifest.json", "deleted"),
]


def test_a_resume_is_never_of_a_damaged_file(faults: ModuleType, tmp_path: Path) -> None:
    found = faults.run_matrix(tmp_path, chosen=lambda *case: case in SAMPLE)
    assert {(file, name) for file, name, *_ in found} == set(SAMPLE)
    for file, name, how, said in found:
        expected = faults.AS_BEFORE if (file, name) == SAMPLE[-1] else faults.PASSED_OVER
        assert how == expected, (file, name, how, said)


def test_without_manifests_the_matrix_finds_what_changes_silently(faults: ModuleType, tmp_path: Path) -> None:
    """It would notice if manifests did nothing."""
    found = faults.run_matrix(tmp_path, manifests=False, chosen=lambda *case: case in SAMPLE[:1])
    assert {case[:2]: case[2] for case in found}["model.safetensors", "flipped"] == faults.CHANGED


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "ddp", "zero2", "zero3", "fsdp2"])
def test_every_damage_of_every_file_is_passed_over(way: str) -> None:
    if way.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    command = [sys.executable, str(MATRIX), "matrix", "--ways", way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(re.findall(r"^  (\S.*?) +(\d+)$", done.stdout, flags=re.MULTILINE))
    assert int(counts["passed over"]) > 40
    assert [counts[how] for how in ("SILENTLY CHANGED", "NOT NOTICED", "RAW ERROR")] == ["0"] * 3


LOADING = Path(__file__).with_name("load_run.py")
PARTS = {
    "zero2": "global_step2/*zero_pp_rank_1_*_optim_states.pt",
    "zero3": "global_step2/*zero_pp_rank_1_*_model_states.pt",
    "fsdp2": "pytorch_model_fsdp_0/__1_0.distcp",
}
"""By way, a file of a checkpoint that process 1 reads."""


@pytest.mark.slow
@pytest.mark.parametrize("way", PARTS)
def test_where_processes_load_together_a_failure_ends_the_job_and_names_the_whole_checkpoint(
    way: str, faults: ModuleType, tmp_path: Path
) -> None:
    if way.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    done = launch(LOADING, str(tmp_path / "run"), PARTS[way], cwd=tmp_path, config=faults.WAYS[way])
    assert done.returncode != 0
    assert not list((tmp_path / "run").glob("end-*"))
    named = rf"checkpoint-2 cannot be resumed from: loading it failed.*Resume from {tmp_path / 'run' / 'checkpoint-1'} "
    assert re.search(named + "with resume_from_checkpoint=", done.stderr), done.stderr[-4000:]


@pytest.mark.slow
def test_what_one_process_cannot_load_all_pass_over(faults: ModuleType, tmp_path: Path) -> None:
    done = launch(LOADING, str(tmp_path / "run"), "--rank-1-fails", cwd=tmp_path, config=faults.WAYS["ddp"])
    assert done.returncode == 0, done.stderr[-4000:]
    ends = [json.loads((tmp_path / "run" / f"end-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert ends == [{"from": str(tmp_path / "run" / "checkpoint-1"), "same": True}] * 2
    assert "checkpoint-2 is passed over: loading it failed with OSError" in done.stderr
