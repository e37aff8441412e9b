"""Short names of metrics, for people who type: `BestOf("rsr", per="prompt_id")`."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")

SHORT_NAMES = {
    "rsr": "rank_surprisal_ratio",
    "ln": "local_naturalness",
    "gn": "global_naturalness",
    "ifd": "instruction_following_difficulty",
    "rho1": "rho1_share",
}
_FIELDS = ("metric", "metrics")
"""Fields of policies and expressions that name metrics."""


def full_name(name: str, known: Collection[str] = ()) -> str:
    """The metric's name that a short one stands for: `"rsr" -> "rank_surprisal_ratio"`; any other name as it is.

    Args:
        name: what a user typed.
        known: the names of the metrics that are scored. If `name` is one of them, it means that one.
    """
    return name if name in known else SHORT_NAMES.get(name.lower(), name)


def with_full_names(item: T, known: Collection[str] = ()) -> T:
    """A policy or an expression whose metrics have their full names, also in the policies and expressions inside of it.

    Args:
        item: the policy or the expression. It is not changed. Only dataclasses have short names, in their fields
            `metric` and `metrics`.
        known: as for `full_name`.
    """
    full: T = _full(item, known, names=False)
    return full


def _full(value: Any, known: Collection[str], *, names: bool) -> Any:
    if isinstance(value, str):
        return full_name(value, known) if names else value
    if type(value) in (list, tuple):
        parts = [_full(part, known, names=names) for part in value]
        return value if all(a is b for a, b in zip(value, parts, strict=True)) else type(value)(parts)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changed = {}
    for each in fields(value):
        before = getattr(value, each.name)
        after = _full(before, known, names=each.name in _FIELDS)
        if after is not before:
            changed[each.name] = after
    result = copy(value) if changed else value
    for name, after in changed.items():
        object.__setattr__(result, name, after)
    return result
