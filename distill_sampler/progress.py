"""Progress of long work: a bar where somebody watches, and a line a minute where output goes to a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

EVERY = 60.0
"""Seconds between two lines."""


def watched() -> bool:
    """Whether stderr is a terminal, or the process runs a notebook: where bars can be drawn."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def progress_of(what: str, *, total: int | None = None, unit: str = "tok", disable: bool = False) -> Any:
    """A context with `update(n)`: a bar of tqdm where one can be drawn, otherwise `Lines`.

    Args:
        what: what is done: `"Scoring"`.
        total: how much there is to do; None: unknown.
        unit: what is counted.
        disable: show nothing.
    """
    if disable or watched():
        return tqdm(
            desc=what,
            total=total,
            unit=unit,
            unit_scale=True,
            leave=False,
            delay=2,
            dynamic_ncols=True,
            disable=disable,
        )
    return Lines(what, total=total, unit=unit)


class Lines:
    """Tells how far the work is, a line a minute; work of less than a minute is not mentioned.

    Args:
        what: what is done: `"Scoring"`.
        total: how much there is to do; None: unknown.
        unit: what is counted; empty if the number itself tells people nothing.
        say: prints a line.
        clock: gives seconds.
    """

    def __init__(
        self,
        what: str,
        *,
        total: float | None = None,
        unit: str = "",
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._say, self._clock = say, clock
        self._done = 0.0
        self._started = self._said = clock()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, more: float = 1) -> None:
        """Count more of the work as done."""
        self.at(self._done + more)

    def at(self, done: float, note: str = "") -> None:
        """Say how much is done, if the last line is a minute old.

        Args:
            done: how much of `total`.
            note: what else to say, such as a rate.
        """
        self._done = done
        now = self._clock()
        if now - self._said < EVERY:
            return
        self._said = now
        seconds = now - self._started
        parts = []
        if self._total:
            parts.append(f"{min(done / self._total, 1):.0%}")
        if self._unit:
            parts.append(f"{done:,.0f} {self._unit}, {done / seconds:,.0f} {self._unit}/s")
        parts += [note] if note else []
        parts.append(f"{_time(seconds)} so far")
        if self._total and 0 < done < self._total:
            parts.append(f"about {_time(seconds * (self._total / done - 1))} left")
        self._say(f"{self._what}: {', '.join(parts)}")


def _time(seconds: float) -> str:
    """`5400 -> "1 h 30 min"`"""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
