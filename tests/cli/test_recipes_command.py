"""The recipes reach people who have only the wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.cli.conftest import call

ROOT = Path(__file__).parents[2]
WANTED = sorted(
    path.relative_to(ROOT)
    for folder, pattern in (("recipes", "*.py"), ("recipes", "*.yaml"), ("accelerate_configs", "*.yaml"))
    for path in (ROOT / folder).rglob(pattern)
)


def test_all_recipes_are_copied_and_nothing_is_overwritten(tmp_path: Path) -> None:
    assert call("recipes", "--copy", tmp_path).code == 0
    for name in WANTED:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list(tmp_path.rglob("results"))  # the wheel has none either
    (tmp_path / "recipes" / "sft.py").write_text("mine", encoding="utf-8")
    again = call("recipes", "--copy", tmp_path)
    assert again.code == 1
    assert "--overwrite" in again.said
    assert (tmp_path / "recipes" / "sft.py").read_text(encoding="utf-8") == "mine"


def test_the_list_says_what_each_recipe_is_for() -> None:
    said = call("recipes").said
    for name in WANTED:
        assert name.name in said


def test_the_gallery_shows_every_recipe() -> None:
    gallery = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    scripts = {"screenshots.py", "add_solutions.py"}  # tools of this repository
    shown = {*(ROOT / "recipes").glob("*.py"), *(ROOT / "recipes" / "configs").glob("*.yaml")}
    assert [path.name for path in sorted(shown) if f"[{path.name}](" not in gallery and path.name not in scripts] == []


@pytest.mark.slow
def test_the_wheel_has_the_recipes(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="the wheel is built without a network, so setuptools must be here")
    source = tmp_path / "source"
    kept = [line for line in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines() if line]
    for name in kept:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for name in WANTED:
        assert any(member.endswith(f"data/share/distill_sampler/{name}") for member in held), name
    subprocess.run(
        [*pip, "install", "--no-deps", "--ignore-installed", "--prefix", str(tmp_path / "site"), str(wheel)], check=True
    )
    (package,) = (tmp_path / "site").rglob("distill_sampler/__init__.py")
    command = [sys.executable, "-c", "from distill_sampler.cli import app; app()", "recipes", "--copy", "copied"]
    environment = {**os.environ, "PYTHONPATH": str(package.parents[1])}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    for name in WANTED:
        assert (tmp_path / "copied" / name).read_bytes() == (ROOT / name).read_bytes()
