"""LLaMA-Factory and ms-swift as they are published, each in an environment of its own, with `attached` around them.

docs/hosts.md says how to make the environments. Name their Pythons in `LLAMAFACTORY_PYTHON` and `MS_SWIFT_PYTHON`.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
TRAINERS = {"llamafactory": "CustomSeq2SeqTrainer", "ms-swift": "Seq2SeqTrainer"}


def run(host: str, folder: Path, *checkpoint: str) -> dict[str, Any]:
    """Train in the host's environment, and return the report."""
    variable = host.replace("-", "_").upper() + "_PYTHON"
    if not (python := os.environ.get(variable)):
        pytest.skip(f"{variable} does not name a Python that has {host}")
    folder.mkdir(exist_ok=True)
    command = [python, str(Path(__file__).with_name("host_run.py")), host, str(folder), *checkpoint]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    print(report["releases"])
    return report


@pytest.mark.slow
@pytest.mark.parametrize("host", TRAINERS)
def test_a_published_host_trains_the_plan_and_resumes_it(host: str, tmp_path: Path) -> None:
    whole = run(host, tmp_path / "whole")
    assert whole["trainer"] == TRAINERS[host]
    assert [sorted(prompts) for prompts in whole["prompts"]] == [list(range(8)), list(range(8))]
    shutil.copytree(tmp_path / "whole", tmp_path / "rest")
    shutil.rmtree(tmp_path / "rest" / "out" / "checkpoint-8")
    rest = run(host, tmp_path / "rest", "out/checkpoint-6")  # within the second epoch of four steps
    assert rest["indices"] == whole["indices"]
    last = "out/checkpoint-8/model.safetensors"
    trained, resumed = load_file(tmp_path / "whole" / last), load_file(tmp_path / "rest" / last)
    assert trained.keys() == resumed.keys()
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)
