"""Metrics and policies as people type them: `BestOf(rank_surprisal_ratio, per=prompt_id)`.

The text is parsed, never evaluated: calls of names, with numbers, strings, lists, dictionaries and bare words, which
stand for themselves. A name is one of ours, one that an installed package offers, or an import path:

- an installed package offers metrics, policies and readers by entry points (`plugins.py`);
- `package.module:Name` is imported, from the working directory too. Text that comes out of a file is never imported by
  its path (`recorded_metric`).
"""

from __future__ import annotations

import ast
import inspect
import io
import logging
import os
import sys
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from distill_sampler import metrics as metrics_package
from distill_sampler import policies as policies_package
from distill_sampler.contract import lacking
from distill_sampler.planning.rescore import Rescore
from distill_sampler.plugins import Plugin, imported, plugins
from distill_sampler.protocols import Metric, Policy
from distill_sampler.types import unknown_name

logger = logging.getLogger(__name__)

_COLON = "__colon__"
"""Stands for the colon of an import path while Python parses the text."""


def parse_policies(texts: Sequence[str]) -> list[Policy]:
    """`["BestOf(rank_surprisal_ratio, per=prompt_id)", "Shuffle"]` as policies, in this order.

    Raises:
        ValueError: no policy is called that, its arguments are wrong, or it cannot be imported.
    """
    made: list[Policy] = []
    for text in texts:
        names = _Names(what="policy", where=f"--policy {text}", kinds=("policy",), own=_own_policies())
        for node in _parsed(text, "--policy"):
            if not isinstance(node, (ast.Name, ast.Attribute, ast.Call)):
                raise ValueError(f"--policy {text}: write it like 'BestOf(rank_surprisal_ratio, per=prompt_id)'.")
            policy = names.made(node) if not isinstance(node, ast.Call) else names.value(node)
            if not isinstance(policy, Policy):
                if type(policy).__name__ in _own_policies():
                    raise ValueError(f"--policy {text}: {type(policy).__name__} goes inside a policy, such as BestOf.")
                raise ValueError(names.no_such(policy, Policy, node))
            made.append(policy)
    return made


def parse_metrics(text: str, **settings: Any) -> list[Metric]:
    """`"rank_surprisal_ratio,RankSurprisalRatio(rank_clip=50,name=rsr_50)"` as metrics.

    Args:
        text: names, or calls of the classes, with commas between.
        settings: values for the fields of that name of metrics that are given by name.

    Raises:
        ValueError: no metric is called that, its arguments are wrong, or it cannot be imported.
    """
    names = _Names(what="metric", where="--metrics", kinds=("metric",), own=_own_metrics(), inside=("metric", "reader"))
    made: list[Metric] = []
    for node in _parsed(text, "--metrics"):
        metric = names.made(node, settings) if isinstance(node, (ast.Name, ast.Attribute)) else names.value(node)
        if not isinstance(metric, Metric):
            raise ValueError(names.no_such(metric, Metric, node))
        made.append(metric)
    return made


def parse_rescore(text: str) -> Rescore:
    """`"Rescore(every_steps=200, fraction=0.1)"` as a budget.

    Raises:
        ValueError: it is none, or its arguments are wrong.
    """
    names = _Names(what="budget", where=f"--rescore {text}", kinds=(), own={"Rescore": Rescore}, imports=False)
    nodes = _parsed(text, "--rescore")
    found = names.value(nodes[0]) if len(nodes) == 1 and isinstance(nodes[0], ast.Call) else None
    if not isinstance(found, Rescore):
        raise ValueError(f"--rescore {text}: write it like 'Rescore(every_steps=200, fraction=0.1)'.")
    return found


def recorded_metric(text: str) -> Metric | None:
    """The metric that a file was written with; None if no installed package offers it.

    Nothing is imported by its path, and no reader is made: the file may come from anybody. A name of ours is ours.

    Args:
        text: as `serialize.as_typed` wrote it.
    """
    names = _Names(what="metric", where=text, kinds=("metric",), own=_own_metrics(), imports=False, from_file=True)
    try:
        (node,) = _parsed(text, "The metric")
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not names.knows(node.func.id):
            return None
        metric = names.value(node)
    except Exception as error:  # whatever another package raises, the numbers in the file can be shown
        logger.warning("%s is shown by its columns alone: %s", text, error)
        return None
    return metric if isinstance(metric, Metric) else None


def known_metrics(columns: Sequence[str]) -> dict[str, Metric]:
    """The metrics, with their defaults, whose numbers a table has that does not say what made them.

    A broken one of an installed package is reported in the log, by its name, and left out.
    """
    found: dict[str, Metric] = {}
    offered = [(item.__name__, item) for item in _own_classes()] + [(each.name, each) for each in plugins("metric")]
    for name, offer in offered:
        try:
            item = offer.load() if isinstance(offer, Plugin) else offer
            if any(parameter.default is parameter.empty for parameter in _parameters(item).values()):
                continue
            metric = item()
            if not isinstance(metric, Metric):
                raise ValueError(f"{name} gives a {type(metric).__name__}, which is no metric.")
        except Exception as error:  # of another package
            logger.warning("%s", error)
            continue
        if set(metric.columns) <= set(columns):
            found.setdefault(metric.name, metric)
    return found


def _own_classes() -> list[Any]:
    return [getattr(metrics_package, name) for name in metrics_package.__all__]


def _own_metrics() -> dict[str, Any]:
    """Our metrics by class, and by the name that they have as they are."""
    classes = {item.__name__: item for item in _own_classes()}
    names = {str(each.default): item for item in classes.values() for each in fields(item) if each.name == "name"}
    return {**names, **classes}


def _own_policies() -> dict[str, Any]:
    return {name: item for name in policies_package.__all__ if is_dataclass(item := getattr(policies_package, name))}


@dataclass(frozen=True, kw_only=True)
class _Names:
    """What the names in a text stand for."""

    what: str
    where: str
    """How messages begin."""
    kinds: tuple[str, ...]
    """Whose entry points are meant."""
    own: Mapping[str, Any]
    """Ours."""
    inside: tuple[str, ...] = ()
    """Whose entry points are meant within arguments, if others."""
    imports: bool = True
    """Whether import paths are followed."""
    from_file: bool = False
    """Whether a file says it, which means ours by a name of ours."""

    def knows(self, name: str) -> bool:
        """Whether anybody offers this name."""
        return name in self.own or bool(self._offers(name, self.kinds))

    def made(self, node: ast.expr, settings: Mapping[str, Any] | None = None) -> Any:
        """What a bare name stands for, made with its defaults and those `settings` that it has."""
        item = self._item(node, self.kinds)
        known = _parameters(item)
        given = {name: value for name, value in (settings or {}).items() if name in known and value is not None}
        return self._call(item, [], given)

    def value(self, node: ast.expr, *, nested: bool = False) -> Any:
        """What a piece of the text stands for."""
        match node:
            case ast.Constant(value=value) if isinstance(value, (str, int, float, type(None))):  # bool is an int
                return value
            case ast.Name(id=word):
                return word
            case ast.Attribute() if nested and _path(node):
                return self._item(node, self.kinds)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if isinstance(value, (int, float)):
                return -value
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self.value(item, nested=True) for item in items]
            case ast.Dict(keys=keys, values=values) if None not in keys:
                pairs = zip(keys, values, strict=True)
                return {self.value(k, nested=True): self.value(v, nested=True) for k, v in pairs if k is not None}
            case ast.Call(func=ast.Name() | ast.Attribute() as function, args=args, keywords=keywords) if all(
                keyword.arg for keyword in keywords
            ) and (isinstance(function, ast.Name) or _path(function)):
                item = self._item(function, (self.inside or self.kinds) if nested else self.kinds)
                named = {str(keyword.arg): self.value(keyword.value, nested=True) for keyword in keywords}
                return self._call(item, [self.value(arg, nested=True) for arg in args], named)
        raise ValueError(
            f"{self.where}: '{_shown(node)}' is not understood; use numbers, words, 'strings', [lists], "
            "{dictionaries}, and package.module:Name for what is to be imported."
        )

    def no_such(self, made: Any, protocol: Any, node: ast.expr) -> str:
        """The sentence for something that was made and is no metric, or no policy."""
        called = node.func if isinstance(node, ast.Call) else node
        offers = self._offers(called.id, self.kinds) if isinstance(called, ast.Name) else []
        package = f" of the installed package {offers[0].package}" if offers else ""
        return (
            f"{self.where}: '{_shown(node)}'{package} is of type {type(made).__name__}, which is no {self.what}: it "
            f"has no {', '.join(lacking(made, protocol))}. Subclass distill_sampler.{protocol.__name__}, a protocol "
            "with defaults for most of it."
        )

    def _item(self, node: ast.expr, kinds: tuple[str, ...]) -> Any:
        """The class or function that a name or an import path stands for.

        Raises:
            ValueError: nobody offers it, several packages do, or it cannot be imported.
        """
        if (path := _path(node)) is not None:
            if not self.imports:
                raise ValueError(f"{self.where}: {path} is an import path, which cannot be used here.")
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())  # last, so that it hides nothing that is installed
            return imported(path)
        if not isinstance(node, ast.Name):
            raise ValueError(f"{self.where}: '{_shown(node)}' is not understood; write Name or package.module:Name.")
        name = node.id
        offers = self._offers(name, kinds)
        own = self.own.get(name)
        if own is not None and (self.from_file or not offers):
            return own
        if not offers:
            alike = [each for each in self.own if each[:1].isupper() == name[:1].isupper()]  # classes, or their names
            known = {*alike, *(each.name for each in (plugins(*kinds) if kinds else ()))}
            raise ValueError(f"{self.where}: {unknown_name(self.what, name, known, 'that can be used')}")
        if own is not None or len(offers) > 1:
            packages = [each.package for each in offers]
            paths = [each.path for each in offers]
            if own is not None:
                packages, paths = ["distill_sampler", *packages], [f"{own.__module__}:{own.__name__}", *paths]
            raise ValueError(
                f"{self.where}: the {self.what} '{name}' is offered by {' and by '.join(packages)}, so it is not clear "
                f"which one is meant. Type the path of the one you want, {' or '.join(paths)}, or uninstall a package."
            )
        return offers[0].load()

    def _offers(self, name: str, kinds: tuple[str, ...]) -> list[Plugin]:
        """What installed packages offer by a name; if none does, and neither do we, by the name of a class."""
        every = plugins(*kinds) if kinds else []
        by_name = [each for each in every if each.name == name]
        if by_name or name in self.own:
            return by_name
        by_class = {each.path: each for each in every if each.path.partition(":")[2] == name}
        return list(by_class.values())

    def _call(self, item: Any, positional: list[Any], named: dict[str, Any]) -> Any:
        called = getattr(item, "__name__", repr(item))
        if not callable(item):
            raise ValueError(f"{self.where}: {called} is of type {type(item).__name__}, which makes no {self.what}.")
        try:
            return item(*positional, **named)
        except TypeError as error:
            reason = str(error).removeprefix(f"{called}.__init__() ").removeprefix("__init__() ")
            raise ValueError(f"{self.where}: {called} {reason}. Its arguments: {_arguments(item)}.") from None


def _parsed(text: str, option: str) -> list[ast.expr]:
    try:
        tree = ast.parse(_with_marked_colons(f"({text},)"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{option} {text}: that cannot be read; write Name(argument, name=value).") from None
    assert isinstance(tree, ast.Tuple)
    return tree.elts


def _with_marked_colons(text: str) -> str:
    """The text with the colons of import paths as a name that Python can parse: `a.b:C() -> a.b.__colon__.C()`.

    It stands between two names, and not inside a dictionary or a string.

    Raises:
        SyntaxError: a bracket or a string is not closed.
    """
    lines = text.splitlines(keepends=True)
    depth, places = 0, []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            depth += (token.string == "{") - (token.string == "}") if token.type == tokenize.OP else 0
            if token.type == tokenize.OP and token.string == ":" and depth == 0:
                before, after = token.line[: token.start[1]], token.line[token.end[1] :]
                if before[-1:].isidentifier() or before[-1:].isdigit():
                    places += [token.start] * after[:1].isidentifier()
    except tokenize.TokenError as error:
        raise SyntaxError(str(error)) from None
    for line, column in reversed(places):
        at = lines[line - 1]
        lines[line - 1] = f"{at[:column]}.{_COLON}.{at[column + 1 :]}"
    return "".join(lines)


def _shown(node: ast.expr) -> str:
    return ast.unparse(node).replace(f".{_COLON}.", ":")


def _path(node: ast.expr) -> str | None:
    """The import path that a node is, `package.module:Name`; None if it is none."""
    shown = _shown(node) if isinstance(node, ast.Attribute) else ""
    module, colon, name = shown.partition(":")
    parts = (*module.split("."), *name.split("."))
    return shown if colon and all(part.isidentifier() for part in parts) else None


def _parameters(item: Any) -> Mapping[str, inspect.Parameter]:
    try:
        found = inspect.signature(item).parameters
    except (ValueError, TypeError):  # written in C
        return {}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: each for name, each in found.items() if each.kind not in variadic}


def _arguments(item: Any) -> str:
    parameters = _parameters(item).values()
    return ", ".join(
        each.name if each.default is each.empty else f"{each.name}={each.default!r}" for each in parameters
    )
