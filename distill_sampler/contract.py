"""Checks of the metrics and policies that users pass, with one error message for each mistake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill_sampler.types import Metric, Policy, unknown_name

_HINTS = {"metric": "RankSurprisalRatio()", "policy": "Shuffle()"}


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
    """Check a list of policies.

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
            if name not in metrics:
                raise ValueError(f"{type(policy).__name__}: {unknown_name('metric', name, metrics, 'in metrics=')}")
    return tuple(found)


def _listed(items: Any, what: str) -> Sequence[Any]:
    argument = "metrics" if what == "metric" else "policies"
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise ValueError(f"{argument}= takes a list, such as [{_HINTS[what]}], but was given {_shown(items)}.")
    return items


def _checked(item: Any, protocol: Any, what: str) -> Any:
    kind = protocol.__name__
    argument = "metrics" if what == "metric" else "policies"
    if isinstance(item, type):
        raise ValueError(
            f"{argument}= was given the class {item.__name__}. Write {item.__name__}() to create an object."
        )
    if isinstance(item, str):
        raise ValueError(f"{argument}= was given the text {item!r}, but takes objects, such as {_HINTS[what]}.")
    if not isinstance(item, protocol):
        needed = [name for name in sorted(_members(protocol)) if not hasattr(item, name)]
        raise ValueError(
            f"{argument}= was given {_shown(item)}, which is not a {what}: it lacks {', '.join(needed)}. "
            f"Subclass distill_sampler.{kind}, which has defaults for most members."
        )
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


def _members(protocol: Any) -> set[str]:
    return {name for name in vars(protocol) if not name.startswith("_")} | (
        {"__call__"} if "__call__" in vars(protocol) else set()
    )


def _shown(item: Any) -> str:
    return item.__name__ + "()" if hasattr(item, "__name__") else f"a {type(item).__name__}"
