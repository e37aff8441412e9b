"""Plug-ins: metrics, policies and readers of other packages, found by a name or an import path.

An installed package offers one by an entry point of a group in `GROUPS`. Entry points are only looked up when a user
types a name, and only the one that is meant is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from typing import Any

from distill_sampler.types import unknown_name

GROUPS = {
    "metric": "distill_sampler.metrics",
    "policy": "distill_sampler.policies",
    "reader": "distill_sampler.readers",
}
"""The entry point group of each kind of object that a package can offer."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A metric, policy or reader that an installed package offers by an entry point. It is imported by `load`."""

    kind: str
    """`"metric"`, `"policy"` or `"reader"`."""
    name: str
    """The name that users type."""
    path: str
    """Its import path: `package.module:Name`."""
    package: str
    """The name of the installed distribution."""

    def load(self) -> Any:
        """Import it: a class, or a function that makes one.

        Raises:
            ValueError: it cannot be imported or called; the message names it, its package and the reason.
        """
        try:
            found = imported(self.path)
            if not callable(found):
                raise ValueError(f"{self.path} is a {type(found).__name__}, neither a class nor a function.")
            return found
        except ValueError as error:
            raise ValueError(
                f"The {self.kind} '{self.name}' of the installed package {self.package} cannot be used: {error} "
                f"Correct, update or uninstall {self.package}."
            ) from None


def plugins(*kinds: str) -> list[Plugin]:
    """What installed packages offer, in alphabetical order. Nothing is imported.

    Args:
        kinds: any of `"metric"`, `"policy"`, `"reader"`; without any, all of them.
    """
    from importlib.metadata import entry_points  # here, because only typed text needs it

    found = {
        Plugin(
            kind=kind,
            name=point.name,
            path=point.value.partition("[")[0].strip(),
            package=point.dist.name if point.dist else "(unknown)",
        )
        for kind in kinds or GROUPS
        for point in entry_points(group=GROUPS[kind])
    }
    return sorted(found, key=lambda each: (each.kind, each.name, each.package))


def imported(path: str) -> Any:
    """Import the object of an import path.

    Raises:
        ValueError: there is no such module or name, or importing it fails.
    """
    module, _, name = path.partition(":")
    try:
        found = import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{path} cannot be imported: there is no module '{error.name}'. Install its package, or run the "
                "command in the folder that has the module."
            ) from None
        raise ValueError(
            f"{path} cannot be imported: importing {module} fails with {type(error).__name__}: {error}."
        ) from error
    try:
        return reduce(getattr, name.split("."), found)
    except AttributeError:
        public = [each for each in vars(found) if not each.startswith("_")]
        raise ValueError(f"{path} cannot be imported: {unknown_name('name', name, public, f'in {module}')}") from None
