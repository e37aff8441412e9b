"""The explanations under the fields of a dataclass, in its docstring, where `help()` shows them.

    @documents_fields
    @dataclass(frozen=True)
    class Shuffle:
        \"\"\"Shuffle the plan.\"\"\"

        bucket: int | None = None
        \"\"\"How many consecutive samples are shuffled among themselves.\"\"\"

`help(Shuffle)` then lists `bucket` with its explanation. The source is read when somebody asks for the docstring, so
importing costs nothing.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


def documents_fields(cls: C) -> C:
    """Add the explanations of a dataclass's fields, its own and inherited ones, to its docstring."""
    cls.__doc__ = _WithFields(cls.__dict__.get("__doc__") or "")  # type: ignore[assignment]  # read by a descriptor
    return cls


class _WithFields:
    """A docstring that is completed when it is first read."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._whole: str | None = None

    def __get__(self, instance: Any, owner: type) -> str:
        if self._whole is None:
            fields = {name: text for cls in reversed(owner.__mro__) for name, text in _explained(cls).items()}
            shown = getattr(owner, "__dataclass_fields__", {})
            lines = [f"    {name}: {' '.join(text.split())}" for name, text in fields.items() if name in shown]
            self._whole = inspect.cleandoc(self._text) + ("\n\nFields:\n" + "\n".join(lines) if lines else "")
        return self._whole


def _explained(cls: type) -> dict[str, str]:
    """The strings that stand under the annotated names of a class's body; empty if there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    return {
        node.target.id: after.value.value
        for node, after in zip(body, body[1:], strict=False)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    }
