"""Checks of the metrics, policies and objectives that users pass, with one error message for each mistake."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from distill_sampler.protocols import Metric, Objective, Policy
from distill_sampler.short_names import full_name, with_full_names
from distill_sampler.types import unknown_name

_HINTS = {"metric": "RankSurprisalRatio()", "policy": "Shuffle()", "objective": "SoftTargets(teacher)"}
_ARGUMENTS = {"metric": "metrics", "policy": "policies", "objective": "objective"}


def checked_metrics(metrics: Any) -> dict[str, Metric]:
    """Check a list of metrics. Returns them by name.

    Raises:
        ValueError: something in the list is not a metric, or two metrics have the same columns.
    """
    found: list[Metric] = [_checked(item, Metric, "metric") for item in _listed(metrics, "metric")]
    names = [name for metric in found for name in metric.columns]
    if len(set(names)) < len(names) or len({metric.name for metric in found}) < len(found):
        duplicates = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"Two metrics give the same numbers ({', '.join(duplicates)}). Remove one, or give it another name="
        )
    return {metric.name: metric for metric in found}


def checked_policies(policies: Any, metrics: dict[str, Metric]) -> tuple[Policy, ...]:
    """Check a list of policies. Short names of metrics that are scored become the full ones.

    Raises:
        ValueError: something in the list is not a policy, or a policy names a metric that is not scored.
    """
    found: list[Policy] = [_checked(item, Policy, "policy") for item in _listed(policies, "policy")]
    for policy in found:
        for name in policy.uses_metrics:
            if not isinstance(name, str):
                raise ValueError(
                    f"{type(policy).__name__} needs the name of a metric, but was given {name!r}. Write "
                    f"'{getattr(name, 'name', 'rank_surprisal_ratio')}', and put the metric into metrics=."
                )
            if full_name(name, metrics) not in metrics:
                raise ValueError(f"{type(policy).__name__}: {unknown_name('metric', name, metrics, 'in metrics=')}")
    return tuple(with_full_names(policy, metrics) for policy in found)


def checked_objectives(objective: Any) -> tuple[Objective, ...]:
    """Check one objective, or a list of them.

    Raises:
        ValueError: something is not an objective, or two have the same name.
    """
    items = objective if isinstance(objective, Sequence) and not isinstance(objective, str) else [objective]
    found: list[Objective] = [_checked(item, Objective, "objective") for item in items]
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        raise ValueError(f"objective= has two objectives with the same name ({', '.join(names)}). Remove one.")
    return tuple(found)


def _listed(items: Any, what: str) -> Sequence[Any]:
    argument = _ARGUMENTS[what]
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise ValueError(f"{argument}= takes a list, such as [{_HINTS[what]}], but was given {_shown(items)}.")
    return items


def _checked(item: Any, protocol: Any, what: str) -> Any:
    kind = protocol.__name__
    argument = _ARGUMENTS[what]
    if isinstance(item, type):
        raise ValueError(
            f"{argument}= was given the class {item.__name__}. Write {item.__name__}() to create an object."
        )
    if isinstance(item, str):
        raise ValueError(f"{argument}= was given the text {item!r}, but takes objects, such as {_HINTS[what]}.")
    if inspect.isroutine(item):
        raise ValueError(
            f"{argument}= was given the function {item.__name__}. A {what} is an object: subclass "
            f"distill_sampler.{kind}, and call the function in its {'reduce' if what == 'metric' else '__call__'}."
        )
    if not isinstance(item, protocol):
        missing = ", ".join(lacking(item, protocol))
        raise ValueError(
            f"{argument}= was given {_shown(item)}, which is not a {what}: it lacks {missing}. "
            f"Subclass distill_sampler.{kind}, which has defaults for most members."
        )
    require_field_types(item)
    if what == "metric":
        if not isinstance(item.name, str):
            raise ValueError(
                f"{type(item).__name__}.name must be text. Give the field a default: name: str = 'my_metric'"
            )
        if item.name not in item.columns:
            raise ValueError(
                f"{type(item).__name__}.columns must list every number that reduce returns, including '{item.name}', "
                f"but is {tuple(item.columns)!r}."
            )
    return item


def members(protocol: Any) -> set[str]:
    """What an object must have to satisfy a protocol."""
    return {name for name in vars(protocol) if not name.startswith("_") or name == "__call__"}


def lacking(item: Any, protocol: Any) -> list[str]:
    """The members of a protocol that an object does not have."""
    return [name for name in sorted(members(protocol)) if not hasattr(item, name)]


def _shown(item: Any) -> str:
    return item.__name__ + "()" if hasattr(item, "__name__") else f"a {type(item).__name__}"


def require_field_types(item: Any) -> None:
    """Refuse a dataclass whose whole-number, number, switch or text field holds something else.

    Raises:
        ValueError: naming the argument and what it takes.
    """
    if is_dataclass(item) and not isinstance(item, type):
        require_fields(type(item), {each.name: getattr(item, each.name) for each in fields(item)})


def require_fields(kind: type, values: Mapping[str, Any]) -> None:
    """Refuse values that the whole-number, number, switch and text fields of a dataclass do not take.

    Raises:
        ValueError: naming the argument and what it takes.
    """
    for each in fields(kind):
        if each.name in values and all(name.strip() in _PLAIN_TYPES for name in str(each.type).split("|")):
            require_arguments(kind.__name__, **{each.name: (values[each.name], str(each.type))})


def require_arguments(owner: str, **arguments: tuple[Any, str | type]) -> None:
    """Refuse an argument of another type.

    Args:
        owner: whose arguments they are, for the error message.
        arguments: by name, the value, and what it takes: plain types such as `"int | None"`, or a class of ours.

    Raises:
        ValueError: naming the argument and what it takes.
    """
    for name, (value, takes) in arguments.items():
        if isinstance(takes, type):
            if not isinstance(value, takes):
                raise ValueError(f"{owner}({name}={value!r}): {name} takes an object, such as {takes.__name__}().")
            continue
        kinds = takes.split(" | ")
        if not any(_is_of(value, kind) for kind in kinds):
            words = " or ".join(_PLAIN_TYPES[kind][0] for kind in kinds)
            raise ValueError(f"{owner}({name}={value!r}): {name} takes {words}.")


_PLAIN_TYPES: dict[str, tuple[str, Any]] = {
    "int": ("a whole number", Integral),
    "float": ("a number", Real),
    "bool": ("True or False", bool),
    "str": ("text", str),
    "Path": ("the path of a file", Path),
    "None": ("None", type(None)),
}


def _is_of(value: Any, kind: str) -> bool:
    # True counts as 1 in Python, but nobody means it where a number belongs
    return isinstance(value, _PLAIN_TYPES[kind][1]) and (kind == "bool") == isinstance(value, bool)
