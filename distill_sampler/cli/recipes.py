"""`distill-sampler recipes`: the recipes that come with the library, listed or copied.

In a clone they lie beside the package. A wheel has them as data files, which pip puts under `share/distill_sampler`.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

FOLDERS = ("recipes", "accelerate_configs")
"""The folders that are copied."""
_SHARE = ("share", "distill_sampler")
_SUFFIXES = (".py", ".yaml", ".md", ".ipynb", ".svg")


def run(copy_to: Path | None, *, overwrite: bool, say: Console) -> dict[str, Any]:
    """List the recipes, or copy them.

    Args:
        copy_to: the folder to copy into; None: list them.
        overwrite: replace files that are there already.
        say: where to print.

    Returns:
        By file, what it does; or which files were written.

    Raises:
        ValueError: the installation lacks the recipes, or a file exists.
    """
    found = dict(_files())
    if not found:
        raise ValueError(
            "This installation of distill_sampler has no recipes. Install it from a wheel or a clone; in a clone they "
            "are in recipes/ and accelerate_configs/."
        )
    if copy_to is None:
        what = {str(name): text for name, path in found.items() if (text := _purpose(path))}
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(style="dim")
        for recipe, text in what.items():
            table.add_row(Text(recipe), Text(text))
        say.print(table)
        say.print("\nCopy them with `distill-sampler recipes --copy FOLDER`.", markup=False)
        return {"recipes": what}
    there = [name for name in found if (copy_to / name).exists()]
    if there and not overwrite:
        raise ValueError(f"{copy_to / there[0]} exists. Give another folder, or --overwrite.")
    for name, path in found.items():
        (copy_to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy_to / name)
    say.print(f"Copied {len(found)} files to {copy_to}/{' and '.join(FOLDERS)}.", markup=False, highlight=False)
    return {"folder": copy_to, "files": [str(name) for name in found]}


def _files() -> Iterator[tuple[PurePath, Path]]:
    """Each file of the recipes, by its name below the folder that they are copied into."""
    root = Path(__file__).parents[2]
    if (root / "recipes" / "sft.py").exists():
        for folder in FOLDERS:
            for path in sorted((root / folder).rglob("*")):
                if path.suffix in _SUFFIXES:
                    yield path.relative_to(root), path
        return
    for file in metadata.files("distill_sampler") or ():
        if _SHARE[0] in file.parts:
            place = file.parts.index(_SHARE[0])
            if file.parts[place : place + 2] == _SHARE and file.suffix in _SUFFIXES:
                yield PurePath(*file.parts[place + 2 :]), Path(str(file.locate())).resolve()


def _purpose(path: Path) -> str:
    """The first sentence of a script's docstring, or the first comment of a configuration."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
    return text.splitlines()[0].removeprefix("# ") if path.suffix == ".yaml" and text.startswith("#") else ""
