"""The out-of-tree package by path, installed or not; counts of two tutors; candidates with a reward."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import datasets
import numpy as np
import pytest

from tests import tiny

PACKAGE = Path(__file__).parent / "package"
sys.path.append(str(PACKAGE))  # `import bigram_tutor` works; nothing is installed, so no name stands for it
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """What pip leaves of a package with entry points, `{group: {name: path}}`; by default of the one in `package/`."""

    def install(name: str = "", groups: Mapping[str, Mapping[str, str]] | None = None) -> Path:
        project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        name, groups = name or project["name"], project["entry-points"] if groups is None else groups
        folder = tmp_path / "site" / f"{name.replace('-', '_')}-0.1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n", encoding="utf-8")
        lines = [
            f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()
        ]
        (folder / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        monkeypatch.syspath_prepend(str(folder.parent))
        return folder

    return install


def candidates(num_prompts: int = 6) -> datasets.Dataset:
    """Toy candidates with a verifier's reward; one teacher's answers were not verified."""
    rows = tiny.candidates(num_prompts)
    rewards = [None if teacher == "ada" else float(place % 3) for place, teacher in enumerate(rows["teacher"])]
    return rows.add_column("reward", rewards)


@pytest.fixture
def tutors(tmp_path: Path) -> tuple[Path, Path]:
    """Two files of counts: of the candidates' tokens, and of the same backwards."""
    from bigram_tutor.readers import count_bigrams

    rows = tiny.tokenised(tiny.candidates(), tiny.tokenizer())["input_ids"]
    counts = count_bigrams(list(rows), tiny.VOCAB)
    paths = tmp_path / "tutor.npy", tmp_path / "other_tutor.npy"
    np.save(paths[0], counts)
    np.save(paths[1], counts.T)
    return paths
