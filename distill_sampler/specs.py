"""Metrics and policies as users type them: `BestOf(rank_surprisal_ratio, per=prompt_id)`.

The text is parsed, never evaluated. It consists of calls with numbers, strings, lists, dictionaries and bare words,
which stand for themselves. What is called is a name of the library, a name that an installed package offers, or an
import path:

- an installed package offers metrics, policies and readers by entry points (`plugins.py`);
- `package.module:Name` is imported, also from the working directory. An import path that was read from a file is never
  followed (`recorded_metric`).
"""

from __future__ import annotations

import ast
import inspect
import io
import logging
import os
import sys
import tokenize
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from distill_sampler import metrics as metrics_package
from distill_sampler import policies as policies_package
from distill_sampler.contract import lacking, require_fields
from distill_sampler.planning.rescore import Rescore
from distill_sampler.plugins import Plugin, imported, plugins
from distill_sampler.protocols import Metric, Policy
from distill_sampler.short_names import full_name, with_full_names
from distill_sampler.types import unknown_name

logger = logging.getLogger(__name__)

_COLON = "__colon__"
"""Stands for the colon of an import path while Python parses the text."""


def parse_policies(texts: Sequence[str], metrics: Collection[str] = ()) -> list[Policy]:
    """`["BestOf(rank_surprisal_ratio, per=prompt_id)", "Shuffle"]` as policies, in this order.

    Args:
        texts: policies as users type them. Metrics may have their short names: `BestOf(rsr, per=prompt_id)`.
        metrics: the names of the metrics that are scored. A short name that is one of them means that one.

    Raises:
        ValueError: there is no such policy, its arguments are wrong, or it cannot be imported.
    """
    made: list[Policy] = []
    for text in texts:
        names = _Names(what="policy", where=f"--policy {text}", kinds=("policy",), own=_own_policies(), scored=metrics)
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
        text: names, or calls of classes, separated by commas.
        settings: values by field name, for those metrics in `text` that are bare names and have such a field.

    Raises:
        ValueError: there is no such metric, its arguments are wrong, or it cannot be imported.
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
        ValueError: the text is not a call of `Rescore`, or its arguments are wrong.
    """
    names = _Names(what="budget", where=f"--rescore {text}", kinds=(), own={"Rescore": Rescore}, imports=False)
    nodes = _parsed(text, "--rescore")
    found = names.value(nodes[0]) if len(nodes) == 1 and isinstance(nodes[0], ast.Call) else None
    if not isinstance(found, Rescore):
        raise ValueError(f"--rescore {text}: write it like 'Rescore(every_steps=200, fraction=0.1)'.")
    return found


def recorded_metric(text: str) -> Metric | None:
    """The metric that a file was written with; None if no installed package offers it.

    The file may come from anybody, so no import path is followed and no reader is made. Where an installed package
    offers a metric under a name of the library, the library's own is used.

    Args:
        text: the metric as `serialize.as_typed` wrote it.
    """
    names = _Names(what="metric", where=text, kinds=("metric",), own=_own_metrics(), imports=False, from_file=True)
    try:
        (node,) = _parsed(text, "The metric")
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not names.knows(node.func.id):
            return None
        metric = names.value(node)
    except Exception as error:  # another package may raise anything; the numbers in the file can still be shown
        logger.warning("The metric %s cannot be made, so only its numbers are shown: %s", text, error)
        return None
    return metric if isinstance(metric, Metric) else None


def known_metrics(columns: Sequence[str]) -> dict[str, Metric]:
    """The metrics, with their defaults, whose columns a table has. For tables that do not record their metrics.

    A metric of an installed package that cannot be made is left out, with a warning that names it.
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
                raise ValueError(f"{name} makes a {type(metric).__name__}, which is not a metric.")
        except Exception as error:  # another package may raise anything
            logger.warning("%s", error)
            continue
        if set(metric.columns) <= set(columns):
            found.setdefault(metric.name, metric)
    return found


def _own_classes() -> list[Any]:
    return [getattr(metrics_package, name) for name in metrics_package.__all__]


def _own_metrics() -> dict[str, Any]:
    """The library's metrics by class name, and by the default of their `name`."""
    classes = {item.__name__: item for item in _own_classes()}
    names = {str(each.default): item for item in classes.values() for each in fields(item) if each.name == "name"}
    return {**names, **classes}


def _own_policies() -> dict[str, Any]:
    return {name: item for name in policies_package.__all__ if is_dataclass(item := getattr(policies_package, name))}


@dataclass(frozen=True, kw_only=True)
class _Names:
    """Resolves the names in a text, and makes the objects that it describes."""

    what: str
    """What the text should describe, in messages: `"metric"`, `"policy"`."""
    where: str
    """The beginning of messages: the option and its text."""
    kinds: tuple[str, ...]
    """The kinds of entry points in which names are looked up."""
    own: Mapping[str, Any]
    """The library's own classes by name."""
    inside: tuple[str, ...] = ()
    """The kinds of entry points for names within arguments; empty: the same as `kinds`."""
    imports: bool = True
    """Whether import paths are followed."""
    scored: Collection[str] = ()
    """The names of the metrics that are scored."""
    from_file: bool = False
    """Whether the text comes from a file. Then a name of the library always means the library's own class."""

    def knows(self, name: str) -> bool:
        """Whether the library or an installed package offers this name."""
        return name in self.own or bool(self._offers(name, self.kinds))

    def made(self, node: ast.expr, settings: Mapping[str, Any] | None = None) -> Any:
        """The object of a bare name, made with its defaults and those of the `settings` that it has fields for."""
        item = self._item(node, self.kinds)
        known = _parameters(item)
        given = {name: value for name, value in (settings or {}).items() if name in known and value is not None}
        return self._call(item, [], given)

    def value(self, node: ast.expr, *, nested: bool = False) -> Any:
        """The value of a piece of the text."""
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
            f"{self.where}: '{_shown(node)}' cannot be read. Use numbers, words, 'strings', [lists], {{dictionaries}}, "
            "and package.module:Name for an import."
        )

    def no_such(self, made: Any, protocol: Any, node: ast.expr) -> str:
        """The message for an object that was made, but is not a metric or not a policy."""
        called = node.func if isinstance(node, ast.Call) else node
        offers = self._offers(called.id, self.kinds) if isinstance(called, ast.Name) else []
        package = f" of the installed package {offers[0].package}" if offers else ""
        return (
            f"{self.where}: '{_shown(node)}'{package} is of type {type(made).__name__}, which is not a {self.what}: it "
            f"has no {', '.join(lacking(made, protocol))}. Subclass distill_sampler.{protocol.__name__}, a protocol "
            "with defaults for most members."
        )

    def _item(self, node: ast.expr, kinds: tuple[str, ...]) -> Any:
        """The class or function of a name or an import path.

        Raises:
            ValueError: no package offers it, several packages do, or it cannot be imported.
        """
        if (path := _path(node)) is not None:
            if not self.imports:
                raise ValueError(f"{self.where}: {path} is an import path, which cannot be used here. Use a name.")
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())  # at the end, so that it hides no installed module
            return imported(path)
        if not isinstance(node, ast.Name):
            raise ValueError(f"{self.where}: '{_shown(node)}' cannot be read. Write Name or package.module:Name.")
        name = node.id
        offers = self._offers(name, kinds)
        own = self.own.get(name) or (None if offers or self.from_file else self.own.get(full_name(name)))
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
        """The plug-ins of a name. If there are none, and the library lacks it too, those whose class has the name."""
        every = plugins(*kinds) if kinds else []
        by_name = [each for each in every if each.name == name]
        if by_name or name in self.own:
            return by_name
        by_class = {each.path: each for each in every if each.path.partition(":")[2] == name}
        return list(by_class.values())

    def _call(self, item: Any, positional: list[Any], named: dict[str, Any]) -> Any:
        called = getattr(item, "__name__", repr(item))
        if not callable(item):
            raise ValueError(
                f"{self.where}: {called} is of type {type(item).__name__}, which cannot make a {self.what}."
            )
        try:
            if is_dataclass(item) and isinstance(item, type):
                bound = inspect.signature(item).bind_partial(*positional, **named)
                require_fields(item, bound.arguments)
                return with_full_names(item(*bound.args, **bound.kwargs), self.scored)
            return item(*positional, **named)
        except TypeError as error:
            reason = str(error).removeprefix(f"{called}.__init__() ").removeprefix("__init__() ")
            raise ValueError(f"{self.where}: {called} {reason}. Its arguments: {_arguments(item)}.") from None


def _parsed(text: str, option: str) -> list[ast.expr]:
    try:
        tree = ast.parse(_with_marked_colons(f"({text},)"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{option} {text} cannot be read. Write Name(argument, name=value).") from None
    assert isinstance(tree, ast.Tuple)
    return tree.elts


def _with_marked_colons(text: str) -> str:
    """The text with the colons of import paths as a name that Python can parse: `a.b:C() -> a.b.__colon__.C()`.

    Such a colon stands between two names, outside of dictionaries and strings.

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
    """The import path that a node holds, `package.module:Name`; None if it is not one."""
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
