"""Metrics and policies as people type them: `BestOf(rank_surprisal_ratio, per=prompt_id)`.

The text is parsed, never evaluated: calls of the names that are offered, with numbers, strings, lists, dictionaries
and bare words, which stand for themselves.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from distill_sampler import metrics as metrics_package
from distill_sampler import policies as policies_package
from distill_sampler.planning.rescore import Rescore
from distill_sampler.types import Metric, Policy, unknown_name


def parse_policies(texts: Sequence[str]) -> list[Policy]:
    """`["BestOf(rank_surprisal_ratio, per=prompt_id)", "Shuffle"]` as policies, in this order.

    Raises:
        ValueError: no policy is called that, or its arguments are wrong.
    """
    offered = {name: item for name in policies_package.__all__ if is_dataclass(item := getattr(policies_package, name))}
    made = []
    for text in texts:
        for node in _parsed(text, "--policy"):
            if isinstance(node, ast.Name):
                node = ast.Call(func=node, args=[], keywords=[])
            if not isinstance(node, ast.Call):
                raise ValueError(f"--policy {text}: write it like 'BestOf(rank_surprisal_ratio, per=prompt_id)'.")
            policy = _value(node, offered, text, "policy")
            if not isinstance(policy, Policy):
                raise ValueError(f"--policy {text}: {type(policy).__name__} goes inside a policy, such as BestOf.")
            made.append(policy)
    return made


def parse_metrics(text: str, **settings: Any) -> list[Metric]:
    """`"rank_surprisal_ratio,RankSurprisalRatio(rank_clip=50,name=rsr_50)"` as metrics.

    Args:
        text: names, or calls of the classes, with commas between them.
        settings: values for the fields of that name of metrics that are given by name.

    Raises:
        ValueError: no metric is called that, or its arguments are wrong.
    """
    classes = {name: getattr(metrics_package, name) for name in metrics_package.__all__}
    names = {field.default: item for item in classes.values() for field in fields(item) if field.name == "name"}
    made = []
    for node in _parsed(text, "--metrics"):
        if isinstance(node, ast.Name):
            if node.id not in names and node.id not in classes:
                raise ValueError(f"--metrics: {unknown_name('metric', node.id, map(str, names), 'that can be scored')}")
            item = names.get(node.id) or classes[node.id]
            known = {field.name for field in fields(item)}
            given = {key: value for key, value in settings.items() if key in known and value is not None}
            made.append(_made(item, [], given, node.id))
        else:
            made.append(_value(node, classes, text, "metric"))
    return made


def parse_rescore(text: str) -> Rescore:
    """`"Rescore(every_steps=200, fraction=0.1)"` as a budget.

    Raises:
        ValueError: it is none, or its arguments are wrong.
    """
    nodes = _parsed(text, "--rescore")
    found = _value(nodes[0], {"Rescore": Rescore}, text, "budget") if len(nodes) == 1 else None
    if not isinstance(found, Rescore):
        raise ValueError(f"--rescore {text}: write it like 'Rescore(every_steps=200, fraction=0.1)'.")
    return found


def known_metrics(columns: Sequence[str], told: Sequence[str] = ()) -> dict[str, Metric]:
    """The metrics whose numbers a table has, by name: as they were `told`, else with their default configuration."""
    found: dict[str, Metric] = {}
    for text in told:
        try:
            metrics = parse_metrics(text)
        except ValueError:  # of a metric that this version does not know
            continue
        found.update({metric.name: metric for metric in metrics if set(metric.columns) <= set(columns)})
    for name in metrics_package.__all__:
        item = getattr(metrics_package, name)
        if any(field.default is MISSING and field.default_factory is MISSING for field in fields(item)):
            continue
        metric: Metric = item()
        if set(metric.columns) <= set(columns):
            found.setdefault(metric.name, metric)
    return found


def _parsed(text: str, option: str) -> list[ast.expr]:
    try:
        tree = ast.parse(f"({text},)", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{option} {text}: that cannot be read; write Name(argument, name=value).") from None
    assert isinstance(tree, ast.Tuple)
    return tree.elts


def _value(node: ast.expr, offered: Mapping[str, Any], text: str, what: str) -> Any:
    """What a piece of the text stands for."""
    match node:
        case ast.Constant(value=value) if isinstance(value, (str, int, float, type(None))):  # bool is an int
            return value
        case ast.Name(id=word):
            return word
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if isinstance(value, (int, float)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, offered, text, what) for item in items]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            pairs = zip(keys, values, strict=True)
            return {_value(k, offered, text, what): _value(v, offered, text, what) for k, v in pairs if k is not None}
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if all(k.arg for k in keywords):
            if name not in offered:
                raise ValueError(unknown_name(what, name, offered, "there are"))
            positional = [_value(arg, offered, text, what) for arg in args]
            named = {str(k.arg): _value(k.value, offered, text, what) for k in keywords}
            return _made(offered[name], positional, named, text)
    raise ValueError(
        f"{text}: '{ast.unparse(node)}' is not understood; use numbers, words, 'strings', [lists], {{dictionaries}}."
    )


def _made(item: Any, positional: list[Any], named: dict[str, Any], text: str) -> Any:
    try:
        return item(*positional, **named)
    except TypeError as error:
        reason = str(error).removeprefix(f"{item.__name__}.__init__() ").removeprefix("__init__() ")
        raise ValueError(f"{text}: {item.__name__} {reason}. Its arguments: {_arguments(item)}.") from None


def _arguments(item: Any) -> str:
    return ", ".join(
        field.name if field.default is MISSING else f"{field.name}={field.default!r}" for field in fields(item)
    )
