"""Every benchmark can be started: what it imports from the library is still there."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_imports(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    assert "main" in runpy.run_path(str(path), run_name="imported")


def test_the_benchmark_of_a_runs_beginning_runs_and_resumes() -> None:
    found = runpy.run_path(str(BENCHMARKS / "planning.py"), run_name="imported")["measure_run"](400)
    assert {"set up", "order", "epoch 0", "epoch 1", "save", "resume", "peak MB"} <= found.keys()
