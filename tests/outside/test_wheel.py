"""The out-of-tree package as a real wheel, built and installed, with processes that see it and some that do not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import rows, student_path, write_lines
from tests.outside.conftest import PACKAGE

__all__ = ["student_path"]  # a fixture
ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-c", "from distill_sampler.cli import app; app()")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pip has installed the wheel that pip has built."""
    pytest.importorskip("setuptools", reason="the wheel is built without a network, so setuptools must be here")
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    run(*pip, "install", "--no-deps", "--target", folder / "site", wheel)
    return folder / "site"


def run(*command: object, path: tuple[Path, ...] = (), cwd: Path | None = None) -> str:
    """What a command prints. It must end well."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "COLUMNS": "200"}
    ended = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.mark.slow
def test_an_installed_package_adds_metrics_a_policy_and_a_reader(
    site: Path, tmp_path: Path, tutors: tuple[Path, Path], student_path: Path
) -> None:
    have, lack = (site, ROOT), (ROOT,)
    data = write_lines(tmp_path / "data.jsonl", [{**row, "reward": place % 3} for place, row in enumerate(rows())])
    metrics = f"reward_per_nat,TutorRatio(tutor=Bigrams('{tutors[0]}'))"
    score = (*COMMAND, "score", data, "--model", student_path, "--metrics", metrics, "--output", "scores.parquet")
    run(*score, path=have, cwd=tmp_path)
    run(sys.executable, Path(__file__).with_name("installed_run.py"), site, tmp_path, path=have, cwd=tmp_path)
    for path in (have, lack):
        for source in ("scores.parquet", "run"):
            told = run(*COMMAND, "teachers", source, "--metric", "tutor_ratio", path=path, cwd=tmp_path)
            assert "Ranked by tutor ratio" in told
            run(*COMMAND, "report", source, "--output", "report.html", path=path, cwd=tmp_path)
            assert "tutor_ratio" in (tmp_path / "report.html").read_text(encoding="utf-8")
    policy = ("--policy", "KeepMiddle(reward_per_nat)")
    for source in ("scores.parquet", "run"):
        run(*COMMAND, "select", source, *policy, "--output", f"{source}.jsonl", path=have, cwd=tmp_path)
        assert '"reward_per_nat"' in (tmp_path / f"{source}.jsonl").read_text(encoding="utf-8")
