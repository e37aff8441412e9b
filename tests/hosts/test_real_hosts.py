"""LLaMA-Factory, ms-swift and axolotl as they are published, each in an environment of its own, with a curriculum.

docs/hosts.md says how to make the environments. Name their Pythons in `LLAMAFACTORY_PYTHON`, `MS_SWIFT_PYTHON` and
`AXOLOTL_PYTHON`.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def run(host: str, folder: Path, *checkpoint: str) -> tuple[list[int], list[str]]:
    """Train in the host's environment, and return the sample and the prompt at each place of the two plans."""
    variable = host.replace("-", "_").upper() + "_PYTHON"
    if not (python := os.environ.get(variable)):
        pytest.skip(f"{variable} does not name a Python that has {host}")
    folder.mkdir(exist_ok=True)
    command = [python, str(Path(__file__).with_name("host_run.py")), host, str(folder), *checkpoint]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    print((folder / "releases.json").read_text(encoding="utf-8"))
    plans = pq.read_table(folder / "out" / "plans.parquet")
    return plans["sample"].to_pylist(), plans["prompt_id"].to_pylist()


@pytest.mark.slow
@pytest.mark.parametrize("host", ["llamafactory", "ms-swift", "axolotl"])
def test_a_published_host_trains_the_plan_and_resumes_it(host: str, tmp_path: Path) -> None:
    planned, prompts = run(host, tmp_path / "whole")
    assert len(prompts) == 16
    assert len(set(prompts[:8])) == len(set(prompts[8:])) == 8
    shutil.copytree(tmp_path / "whole", tmp_path / "rest")
    out = tmp_path / "rest" / "out"
    for step in (2, 4, 8):
        shutil.rmtree(out / f"checkpoint-{step}")
    (out / "plans.parquet").unlink()
    again = run(host, tmp_path / "rest", "out/checkpoint-6")  # within the second epoch of four steps
    assert again == (planned, prompts)
    # a host that ignores the checkpoint trains from the start, and ends with the same plans and weights
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}
    last = "out/checkpoint-8/model.safetensors"
    trained, resumed = load_file(tmp_path / "whole" / last), load_file(tmp_path / "rest" / last)
    assert trained.keys() == resumed.keys()
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)
