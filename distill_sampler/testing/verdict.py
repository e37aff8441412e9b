"""How a check speaks: whose contract is broken, how, and what to do about it; and what metrics and policies share."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, cast

from distill_sampler.contract import lacking
from distill_sampler.serialize import described


class Verdict:
    """What is said of one object.

    Args:
        item: a metric, policy or reader, or what somebody takes for one.
        protocol: the class of `distill_sampler.types` that it should satisfy.

    Raises:
        AssertionError: it is none.
    """

    def __init__(self, item: Any, protocol: type) -> None:
        self._kind = item.__name__ if isinstance(item, type) else type(item).__name__
        self.require(not isinstance(item, type), "it is a class", f"Check an object: {self._kind}(…)")
        self.require(
            isinstance(item, protocol),
            f"it is no {protocol.__name__}, because it has no {', '.join(lacking(item, protocol))}",
            f"Subclass distill_sampler.{protocol.__name__}, which has defaults for most of it",
        )

    def require(self, holds: bool, problem: str, cure: str) -> None:
        """Say what is wrong unless it holds.

        Raises:
            AssertionError: it does not hold.
        """
        if not holds:
            raise AssertionError(f"{self._kind}: {problem}. {cure}.")

    @contextmanager
    def calling(self, member: str, cure: str) -> Iterator[None]:
        """An exception that comes out of a call is a broken contract too.

        Raises:
            AssertionError: anything was raised.
        """
        try:
            yield
        except AssertionError:
            raise
        except Exception as error:
            problem = f"{member} raises {type(error).__name__}: {error}".rstrip(".")
            raise AssertionError(f"{self._kind}: {problem}. {cure}.") from error

    def require_value(self, item: Any) -> None:
        """A metric or policy is a value: it cannot change, it can be copied, and its text tells it from others.

        Raises:
            AssertionError: it is none.
        """
        self.require(
            is_dataclass(item) and cast("Any", item).__dataclass_params__.frozen,
            "it is no frozen dataclass, so nothing tells its configuration from another one",
            "Decorate the class with @dataclass(frozen=True, kw_only=True)",
        )
        with self.calling("pickling it", "Keep functions at the top of a module, and open files and connections late"):
            copy = pickle.loads(pickle.dumps(item))
        self.require(
            described(copy) == described(item),
            f"a copy describes itself as {described(copy)}, not as {described(item)}, so a resume would refuse it",
            "Make its fields plain values, frozen dataclasses or functions, and leave out of comparisons what is no "
            "configuration: field(default=None, compare=False)",
        )
