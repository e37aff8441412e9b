"""The explanations under the fields of a dataclass, in its docstring, where `help()` shows them.

    @documents_fields
    @dataclass(frozen=True)
    class Shuffle:
        \"\"\"Shuffle the plan.\"\"\"

        bucket: int | None = None
        \"\"\"How many consecutive samples are shuffled among themselves.\"\"\"

`help(Shuffle)` then lists `bucket` with its explanation.
"""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C", bound=type[Any])


def documents_fields(cls: C) -> C:
    """Add the explanations of a dataclass's fields, its own and inherited ones, to its docstring."""
    explained: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        explained |= _explained(base.__module__).get(base.__name__, {})
    lines = [f"    {field.name}: {explained[field.name]}" for field in fields(cls) if field.name in explained]
    if lines:
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Fields:", *lines])
    return cls


@cache
def _explained(module: str) -> dict[str, dict[str, str]]:
    """For each class of a module the strings under its annotated names; nothing where there is no source."""
    if module in ("builtins", "typing", "abc"):
        return {}
    try:
        tree = ast.parse(Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, AttributeError):
        return {}
    return {node.name: _strings_under_names(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _strings_under_names(node: ast.ClassDef) -> dict[str, str]:
    return {
        name.target.id: " ".join(after.value.value.split())
        for name, after in zip(node.body, node.body[1:], strict=False)
        if isinstance(name, ast.AnnAssign) and isinstance(name.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    }
