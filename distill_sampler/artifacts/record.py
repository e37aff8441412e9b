"""A run's record: every scoring pass, and every plan with its reasons, kept as they happen.

With a folder, each pass and each plan is a file of its own, written completely or not at all, and read when it is
needed: memory does not grow with the run. Without a folder (in a loop of your own) they stay in memory, and so do those
that follow after the disk is full.

    OUTPUT/distill_sampler/record/run.json                    identity of the run, and what its numbers mean
    OUTPUT/distill_sampler/record/samples-HASH.parquet        what each sample is: the user's columns, lengths, hashes
    OUTPUT/distill_sampler/record/pass-0000000-HASH.parquet   what a scoring pass measured
    OUTPUT/distill_sampler/record/plan-0000000-HASH.parquet   a plan of an epoch
    OUTPUT/distill_sampler/record/left-0000000-HASH.parquet   which policy left out which sample

A resume trims the record to its checkpoint: the later passes and plans will happen again. The numbers in the names
count the run's passes and plans from 0, so a file that was deleted leaves a gap, which is named.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

import pyarrow as pa

from distill_sampler.artifacts.parts import read_part, write_part
from distill_sampler.artifacts.record_files import (
    pass_table,
    plan_header,
    plan_table,
    read_pass,
    read_plan,
    reasons_table,
)
from distill_sampler.planning.planner import PlannedEpoch
from distill_sampler.serialize import write_atomically
from distill_sampler.store import ScoringPass

logger = logging.getLogger(__name__)

T = TypeVar("T")

RECORD = Path("distill_sampler", "record")
"""Folder of the record inside a run's output folder."""
RUN = "run.json"

Kind = Literal["pass", "plan"]
_KINDS: tuple[Kind, ...] = ("pass", "plan")


class Entries(Sequence[T], Generic[T]):
    """The passes or the plans that a record has. Each is read from disk when it is accessed."""

    def __init__(self, kept: Mapping[int, Path | T], read: Callable[[Path], T]) -> None:
        self._kept = kept
        self._read = read
        self.numbers = sorted(kept)
        """The number in the run of each. A file that was deleted leaves a gap."""

    def of(self, number: int) -> T:
        """The pass or plan with a number in the run."""
        kept = self._kept[number]
        return self._read(kept) if isinstance(kept, Path) else kept

    def items(self) -> Iterator[tuple[int, T]]:
        """Each with its number in the run."""
        return ((number, self.of(number)) for number in self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        selected = self.numbers[index]
        return self.of(selected) if isinstance(selected, int) else [self.of(number) for number in selected]

    def __eq__(self, other: object) -> bool:
        return list(self) == other


class Record:
    """Passes and plans of one run.

    Args:
        folder: folder of the files; None: keep passes and plans in memory.
        write: whether this process writes. The others only read.
    """

    def __init__(self, folder: Path | None = None, *, write: bool = True) -> None:
        self._folder = folder
        self._run: str | None = None
        self._write = write
        self._to_memory = folder is None
        self._passes: dict[int, ScoringPass] = {}
        self._plans: dict[int, PlannedEpoch] = {}
        """By number, what is in memory: everything without a folder, otherwise what could not be written to it."""
        self._next = {"pass": 0, "plan": 0}
        """Number of the run's next pass and of its next plan."""
        self._said = ""

    @property
    def folder(self) -> Path | None:
        """Folder of the record. Another run may have moved it aside."""
        if self._folder is None or not self._run or read_run(self._folder).get("run") == self._run:
            return self._folder
        aside = _aside(self._folder, self._run)
        return aside if aside.exists() else self._folder

    @property
    def passes(self) -> Entries[ScoringPass]:
        """Every scoring pass in the record, in order."""
        return Entries({**self._files("pass"), **self._passes}, read_pass)

    @property
    def plans(self) -> Entries[PlannedEpoch]:
        """Every plan in the record, in order: one for each epoch, and one for each time an epoch was replanned."""
        return Entries(self._kept_plans(), read_plan)

    # ---- What was deleted ----

    def missing(self, kind: Kind) -> list[int]:
        """The numbers of the passes or plans that the record lacks. In a run of another process, the last ones leave
        no trace."""
        numbers = (self.passes if kind == "pass" else self.plans).numbers
        last = max(numbers, default=-1)
        return sorted(set(range(max(last, self._next[kind] if self._write else 0))) - set(numbers))

    def lacks(self) -> str:
        """The names of the passes and plans that the record lacks; empty if it lacks none."""
        gone = {kind: self.missing(kind) for kind in _KINDS}
        return ", ".join(names(kind, numbers) for kind, numbers in gone.items() if numbers)

    def missing_plans(self) -> dict[int, range]:
        """The plans that the record lacks: by number, the epochs that each may have been of.

        Of the others, only those at the edge of a gap are looked at. One that cannot be read tells nothing.
        """
        gone = set(self.missing("plan"))
        found: dict[int, range] = {}
        kept = self._kept_plans() if gone else {}
        for first in sorted(number for number in gone if number - 1 not in gone):
            stop = next(number for number in itertools.count(first) if number not in gone)
            before = (-1, 0) if first == 0 else plan_header(kept[first - 1])
            after = plan_header(kept[stop]) if stop in kept else None
            end = after[0] + (after[1] > 0) if after else (before[0] if before else first) + 1 + stop - first
            if before and after and end - before[0] - 1 == stop - first:
                epochs = range(before[0] + 1, end)  # each epoch without a plan lost one
            else:
                epochs = range(max(before[0], 0) if before else 0, end)
            found.update(dict.fromkeys(range(first, stop), epochs))
        return found

    def last_plans(self) -> dict[int, int]:
        """By epoch, the number of its last plan. An epoch whose last plan may have been deleted is left out.

        Raises:
            ValueError: a plan cannot be read.
        """
        last = {}
        for number, kept in sorted(self._kept_plans().items()):
            if (header := plan_header(kept)) is None:
                raise ValueError(f"{kept} is damaged: it cannot be read.")
            last[header[0]] = number
        for number, epochs in self.missing_plans().items():
            for epoch in epochs:
                if last.get(epoch, number) < number:
                    del last[epoch]
        return last

    def last_plan(self, epoch: int) -> PlannedEpoch | None:
        """The last plan of an epoch; None if the run has not planned it.

        Raises:
            ValueError: it may have been deleted.
        """
        if (number := self.last_plans().get(epoch)) is not None:
            return self.plans.of(number)
        if gone := [number for number, epochs in self.missing_plans().items() if epoch in epochs]:
            raise ValueError(f"{self} lacks {names('plan', gone)}, which may be the last plan of epoch {epoch}.")
        return None

    def passes_between(self, first: int, stop: int) -> Sequence[ScoringPass]:
        """The run's passes `first` to `stop - 1`.

        Raises:
            ValueError: the record lacks one of them.
        """
        passes = self.passes
        if gone := sorted(set(range(first, stop)) - set(passes.numbers)):
            raise ValueError(f"{self} lacks {names('pass', gone)}, so the scores of that time are not known.")
        return [passes.of(number) for number in range(first, stop)]

    def facts(self) -> dict[str, Any]:
        """What a table says of the record: how far each pass moved the numbers that it did not measure, by the pass's
        number (None: it was deleted), and the names of what was deleted."""
        passes = self.passes
        drift: dict[int, Any] = {number: dict(each.drift) for number, each in passes.items()}
        count = max([*passes.numbers, *self.missing("pass")], default=-1) + 1
        return {"drift": [drift.get(number) for number in range(count)], "lacks": self.lacks()}

    def say_what_is_missing(self) -> None:
        """Log a warning, once, if passes or plans were deleted from the record."""
        lacks = self.lacks()
        if lacks and lacks != self._said:
            logger.warning(
                "%s lacks %s. What depends on them is left out of the run's history, tables and report.", self, lacks
            )
        self._said = lacks

    def __str__(self) -> str:
        return str(self.folder or "The record in memory")

    def begin(self, run: Mapping[str, Any], samples: pa.Table, *, earlier: Path | None = None) -> None:
        """Start a record, or continue it if it is of the same run. The record of another run is moved aside.

        Args:
            run: identity of the run (`"run"`), and what its numbers mean (`schema.run_facts`).
            samples: what each sample is, one row each.
            earlier: where the run may have kept its record until now. The record goes on from that one, or from one of
                this run that another has moved aside here.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._folder is None or not self._write:
            self._passes, self._plans, self._next = {}, {}, {"pass": 0, "plan": 0}
            self._run = run.get("run")
            return
        self._run = run.get("run")
        if earlier is not None and earlier.resolve() == self._folder.resolve():
            earlier = None
        before = record_of(earlier, self._run) if earlier and self._run else None
        if before is not None or read_run(self._folder).get("run") != self._run:
            if self._folder.exists():
                if len(self.passes) or len(self.plans):
                    set_aside(self._folder)
                else:
                    shutil.rmtree(self._folder)
            if before is not None:
                self._go_on_from(before)
            elif self._run and read_run(aside := _aside(self._folder, self._run)).get("run") == self._run:
                aside.rename(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._next = {kind: max(self._files(kind), default=-1) + 1 for kind in self._next}
        for old in self._folder.glob("samples-*.parquet"):
            old.unlink()
        write_part(samples, self._folder, "samples")
        write_atomically(self._folder / RUN, json.dumps(run, indent=1, default=str).encode())

    def _go_on_from(self, before: Record) -> None:
        """Begin with the files of a record in another folder: the same files where that is possible, else copies. They
        are never written again. A kill meanwhile leaves nothing that is taken for a record."""
        assert self._folder is not None
        assert before.folder is not None
        begun = self._folder.with_name(f"{self._folder.name}.begun")
        shutil.rmtree(begun, ignore_errors=True)
        try:
            begun.mkdir(parents=True)
            files = [each for kind in ("pass", "left", "plan") for each in before._files(kind).values()]
            for path in (before.folder / RUN, *files):
                try:
                    os.link(path, begun / path.name)
                except OSError:  # another file system
                    shutil.copyfile(path, begun / path.name)
            begun.rename(self._folder)
        except OSError as error:
            logger.warning("%s cannot be copied to %s (%s).", before, self._folder, error)
            shutil.rmtree(begun, ignore_errors=True)

    def add_pass(self, scoring_pass: ScoringPass) -> None:
        """Add a scoring pass."""
        number = self._next["pass"]
        if not self._written(lambda: self._add("pass", number, pass_table(scoring_pass))):
            self._passes[number] = scoring_pass
        self._next["pass"] += 1

    def add_plan(self, planned: PlannedEpoch) -> None:
        """Add a plan and its reasons."""
        number = self._next["plan"]
        if not self._written(lambda: self._write_plan(number, planned)):
            self._plans[number] = planned
        self._next["plan"] += 1

    def _written(self, write: Callable[[], None]) -> bool:
        """Write to the folder, unless another process does. If that fails (a full disk), this and all that follows
        stays in memory."""
        if not self._to_memory and self._write:
            try:
                write()
            except OSError as error:
                logger.warning(
                    "The run's record can no longer be written (%s). Training continues. What follows stays in memory.",
                    error,
                )
                self._to_memory = True
        return not self._to_memory

    def _write_plan(self, number: int, planned: PlannedEpoch) -> None:
        # write the reasons first, so that every plan in the record has them
        self._add("left", number, reasons_table(planned))
        self._add("plan", number, plan_table(planned))

    def trim(self, passes: int, plans: int) -> None:
        """Keep only the first `passes` passes and the first `plans` plans.

        Raises:
            OSError: a file cannot be deleted.
        """
        self._passes = {number: kept for number, kept in self._passes.items() if number < passes}
        self._plans = {number: kept for number, kept in self._plans.items() if number < plans}
        self._next = {"pass": passes, "plan": plans}
        if self.folder is None or not self._write:
            return
        for kind, kept in (("pass", passes), ("plan", plans), ("left", plans)):
            for number, path in self._files(kind).items():
                if number >= kept:
                    path.unlink()
        self.say_what_is_missing()

    # ---- Files ----

    def _add(self, kind: str, number: int, table: pa.Table) -> None:
        assert self.folder is not None
        for stale in self.folder.glob(f"{kind}-{number:07d}-*.parquet"):  # left by a kill before the plan was written
            stale.unlink()
        write_part(table, self.folder, f"{kind}-{number:07d}")

    def _files(self, kind: str) -> dict[int, Path]:
        if (folder := self.folder) is None:
            return {}
        found = ((re.fullmatch(rf"{kind}-(\d+)-\w+\.parquet", p.name), p) for p in folder.glob(f"{kind}-*"))
        return {int(match[1]): path for match, path in found if match}

    def _kept_plans(self) -> dict[int, Path | PlannedEpoch]:
        return {**self._files("plan"), **self._plans}


def names(kind: Kind, numbers: Sequence[int]) -> str:
    """Passes or plans as the names of their files begin."""
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return ", ".join(f"{kind}-{number:07d}" for number in numbers[:5]) + more


def read_run(folder: Path) -> dict[str, Any]:
    """What a record's `run.json` says: the identity of the run, and what its numbers mean. Empty if it cannot be
    read."""
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def record_of(folder: Path, run: str) -> Record | None:
    """The record of a run, even where another run has moved it aside; None if there is none.

    Args:
        folder: where a run keeps its record.
        run: identity of the run.
    """
    found = next((each for each in (folder, _aside(folder, run)) if read_run(each).get("run") == run), None)
    return None if found is None else Record(found, write=False)


def read_samples(folder: Path) -> pa.Table:
    """What each sample of a record is, one row each."""
    (path,) = folder.glob("samples-*.parquet")
    return read_part(path)


def set_aside(folder: Path) -> None:
    """Move another run's record aside, and log a warning."""
    aside = _aside(folder, str(read_run(folder).get("run") or uuid.uuid4().hex[:16]))
    shutil.rmtree(aside, ignore_errors=True)  # an older record of that run
    folder.rename(aside)
    logger.warning("%s held the record of another run. It was moved to %s.", folder, aside.name)


def _aside(folder: Path, run: str) -> Path:
    return folder.with_name(f"{folder.name}-{run}")
