"""How checks report a broken contract with its cure, and the checks that metrics and policies share."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, cast

from distill_sampler.contract import lacking
from distill_sampler.serialize import described


class Verdict:
    """Reports broken contracts of one object.

    Args:
        item: a metric, policy or reader, or an object that should be one.
        protocol: the protocol of `distill_sampler.protocols` that it should satisfy.

    Raises:
        AssertionError: it does not satisfy the protocol.
    """

    def __init__(self, item: Any, protocol: type) -> None:
        self._kind = item.__name__ if isinstance(item, type) else type(item).__name__
        self.require(not isinstance(item, type), "it is a class", f"Check an object: {self._kind}(…)")
        self.require(
            isinstance(item, protocol),
            f"it is not a {protocol.__name__}, because it has no {', '.join(lacking(item, protocol))}",
            f"Subclass distill_sampler.{protocol.__name__}, which has defaults for most members",
        )

    def require(self, holds: bool, problem: str, cure: str) -> None:
        """Report a problem and its cure unless `holds`.

        Raises:
            AssertionError: `holds` is False.
        """
        if not holds:
            raise AssertionError(f"{self._kind}: {problem}. {cure}.")

    @contextmanager
    def calling(self, member: str, cure: str) -> Iterator[None]:
        """A context in which an exception counts as a broken contract: the object's `member` is called there.

        Raises:
            AssertionError: the call raised an exception.
        """
        try:
            yield
        except AssertionError:
            raise
        except Exception as error:
            problem = f"{member} raises {type(error).__name__}: {error}".rstrip(".")
            raise AssertionError(f"{self._kind}: {problem}. {cure}.") from error

    def require_value(self, item: Any) -> None:
        """Require that a metric or policy is a value: immutable, picklable, and identified by its fields.

        Raises:
            AssertionError: it is not.
        """
        self.require(
            is_dataclass(item) and cast("Any", item).__dataclass_params__.frozen,
            "it is not a frozen dataclass, so its configuration cannot be compared",
            "Decorate the class with @dataclass(frozen=True, kw_only=True)",
        )
        with self.calling(
            "pickling it", "Define functions at the top of a module, and open files and connections late"
        ):
            copy = pickle.loads(pickle.dumps(item))
        self.require(
            described(copy) == described(item),
            f"a copy describes itself as {described(copy)}, not as {described(item)}, so a resume would refuse it",
            "Make its fields plain values, frozen dataclasses or functions, and exclude fields that are not "
            "configuration from comparisons: field(default=None, compare=False)",
        )
