"""Every benchmark can be started: what it imports from the library is still there."""

from __future__ import annotations

import re
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_imports(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    assert "main" in runpy.run_path(str(path), run_name="imported")


def test_the_benchmark_of_a_runs_beginning_runs_and_resumes() -> None:
    found = runpy.run_path(str(BENCHMARKS / "planning.py"), run_name="imported")["measure_run"](400)
    assert {"set up", "order", "epoch 0", "epoch 1", "save", "resume", "peak MB"} <= found.keys()


FAKE = """
import os, sys
print(__file__, os.getcwd(), "~/.cache/thing.py:3", "../data/rows.jsonl", "https://host/a", sys.argv[1], "2 tokens/s")
print("10%\\r100%", file=sys.stderr)
sys.exit(int(sys.argv[2]))
"""


def keep(folder: Path, status: int) -> int:
    (folder / "fake.py").write_text(FAKE, encoding="utf-8")
    command = [str(folder / "fake.py"), "/somewhere/data/rows.jsonl", str(status)]
    code: int = runpy.run_path(str(BENCHMARKS / "keep.py"), run_name="imported")["keep"]("name", command, folder / "to")
    return code


def test_a_kept_result_says_where_it_is_from_and_names_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert keep(tmp_path, 0) == 0
    head, _, body = (tmp_path / "to" / "name.txt").read_text(encoding="utf-8").partition("\n\n")
    found = dict(line.split(": ", 1) for line in head.splitlines())
    assert found["command"] == "python fake.py rows.jsonl 0"
    assert {"date", "code", "machine", "threads", "versions", "load average", "other programs"} < found.keys()
    assert f"torch {torch.__version__}" in found["versions"]
    line, bar = body.splitlines()
    assert line.split()[2:] == ["thing.py:3", "rows.jsonl", "https://host/a", "rows.jsonl", "2", "tokens/s"]
    assert bar == "100%"
    for folder in (tmp_path.parent, Path(sys.executable).parent, BENCHMARKS.parents[1]):
        assert str(folder) not in head + body


def test_a_benchmark_that_fails_leaves_the_kept_result(tmp_path: Path) -> None:
    keep(tmp_path, 0)
    before = (tmp_path / "to" / "name.txt").read_bytes()
    assert keep(tmp_path, 3) == 3
    assert (tmp_path / "to" / "name.txt").read_bytes() == before


def test_every_kept_result_has_a_command_of_this_folder_and_no_path() -> None:
    for path in (BENCHMARKS / "results").glob("*.txt"):
        text = path.read_text(encoding="utf-8")
        script = text.splitlines()[0].removeprefix("command: python ").split()[0]
        assert (BENCHMARKS / script).exists(), path
        assert not re.search(r"(?<![\w./])[~.]{0,2}/[\w.+@~-]+/", text), path


def test_the_accelerators_benchmark_tells_the_cost_of_a_batch_from_that_of_a_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    of = runpy.run_path(str(BENCHMARKS / "accelerator.py"), run_name="imported")
    found = of["Passes"](few=[1.0, 1.2], many=[2.6, 2.8], batches=(4, 12))
    assert found.batch == pytest.approx(0.2)
    assert found.once == pytest.approx(0.3)

    device = of["Device"]("cpu", "float32")
    model = of["SHAPES"]["tiny"].make(device.at, device.dtype)
    options = Namespace(batch_tokens=16, step_tokens=16, compiled=False, rounds=2, seconds=0.0)
    line = of["measure"](device, model, "tiny", 8, options)
    assert line.rows == 2
    assert [len(seconds.many) for seconds in line.passes.values()] == [2, 2]
    assert [len(seconds) for seconds in line.steps] == [2, 2]
    # 2 · 16 · (2 layers · (q, o: 64 · 64; k, v: 64 · 32; three of 64 · 128; biases and norms) + last norm), attention
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + (64 + 32 + 32) + 2 * 64
    assert line.body.flop == 2 * 16 * (2 * layer + 64) + 2 * 2 * 64 * 2 * 8**2
    assert line.head.flop == 2 * 16 * 64 * 2048
    assert line.head.bytes == 4 * 64 * 2048 + 2 * 4 * 16 * 2048
    measured, roofline = of["tables"]()
    of["add_rows"](measured, roofline, line, device)
    assert measured.row_count == roofline.row_count == 1
