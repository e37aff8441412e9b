"""A run's record: every scoring pass, and every plan with its reasons, kept as they happen.

With a folder, each pass and each plan is a file of its own, written completely or not at all, and read when it is
needed: memory does not grow with the run. Without a folder (in a loop of your own) they stay in memory.

    OUTPUT/distill_sampler/record/run.json                    identity of the run, and what its numbers mean
    OUTPUT/distill_sampler/record/samples-HASH.parquet        what each sample is: the user's columns, lengths, hashes
    OUTPUT/distill_sampler/record/pass-0000000-HASH.parquet   what a scoring pass measured
    OUTPUT/distill_sampler/record/plan-0000000-HASH.parquet   a plan of an epoch
    OUTPUT/distill_sampler/record/left-0000000-HASH.parquet   which policy left out which sample

A resume trims the record to its checkpoint: the later passes and plans will happen again. The numbers in the names
count the run's passes and plans from 0, so a file that was deleted leaves a gap, which is named.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
import pyarrow as pa

from distill_sampler.artifacts.parts import read_part, write_part
from distill_sampler.artifacts.passes import missing_column
from distill_sampler.planning.planner import PlannedEpoch
from distill_sampler.serialize import write_atomically
from distill_sampler.store import Measurements, ScoringPass
from distill_sampler.types import EpochPlan, IntArray

logger = logging.getLogger(__name__)

T = TypeVar("T")

RECORD = Path("distill_sampler", "record")
"""Folder of the record inside a run's output folder."""
RUN = "run.json"


class LazyEntries(Sequence[T], Generic[T]):
    """The passes or the plans of a run. Each is read from disk when it is accessed."""

    def __init__(self, count: Callable[[], int], load: Callable[[int], T]) -> None:
        self._count = count
        self._load = load

    def __len__(self) -> int:
        return self._count()

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        selected = range(len(self))[index]
        return self._load(selected) if isinstance(selected, int) else [self._load(each) for each in selected]

    def __iter__(self) -> Iterator[T]:
        return (self._load(index) for index in range(len(self)))

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
        self._passes: list[ScoringPass] = []
        self._plans: list[PlannedEpoch] = []
        self._next = {"pass": 0, "plan": 0}
        """Number of the run's next pass and of its next plan."""
        self._has_said = False

    @property
    def folder(self) -> Path | None:
        """Folder of the record. Another run may have moved it aside."""
        if self._folder is None or not self._run or read_run(self._folder).get("run") == self._run:
            return self._folder
        aside = _aside(self._folder, self._run)
        return aside if aside.exists() else self._folder

    @property
    def passes(self) -> Sequence[ScoringPass]:
        """Every scoring pass in the record, in order."""
        if self.folder is None:
            return self._passes
        return LazyEntries(lambda: self._count("pass"), self._load_pass)

    @property
    def plans(self) -> Sequence[PlannedEpoch]:
        """Every plan in the record, in order: one for each epoch, and one for each time an epoch was replanned."""
        if self.folder is None:
            return self._plans
        return LazyEntries(lambda: self._count("plan"), self._load_plan)

    def numbers(self, kind: Literal["pass", "plan"]) -> list[int]:
        """The numbers in the run of the passes or plans that the record has."""
        if self.folder is not None:
            return list(self._files(kind))
        kept = len(self._passes if kind == "pass" else self._plans)
        return list(range(self._next[kind] - kept, self._next[kind]))

    def continued_in_memory(self) -> Record:
        """A record in memory of the passes and plans that follow."""
        record = Record(write=False)
        record._next = dict(self._next)
        return record

    def passes_between(self, first: int, stop: int) -> Sequence[ScoringPass]:
        """The run's passes `first` to `stop - 1`.

        Raises:
            ValueError: the record lacks one of them.
        """
        place = {number: place for place, number in enumerate(self.numbers("pass"))}
        if gone := [number for number in range(first, stop) if number not in place]:
            raise ValueError(
                f"{self.folder or 'The record in memory'} lacks {_names('pass', gone)}, so the scores of that time are "
                "not known."
            )
        return [self.passes[place[number]] for number in range(first, stop)]

    def missing_plans(self) -> dict[str, list[int]]:
        """The plans that were deleted from the record: for each name, the epochs that it may have been of.

        The last plans leave no trace.
        """
        numbers = self.numbers("plan")
        if self.folder is None or not _gaps(numbers):
            return {}
        found, before, epoch = {}, -1, -1
        for number, planned in zip(numbers, self.plans, strict=True):
            if gone := range(before + 1, number):
                last = planned.epoch - (planned.start == 0)
                without = range(epoch + 1, last + 1)  # epochs of which no plan is there
                epochs = without if len(without) == len(gone) else range(max(epoch, 0), last + 1)
                found.update({_names("plan", [each]): list(epochs) for each in gone})
            before, epoch = number, planned.epoch
        return found

    def say_what_is_missing(self) -> None:
        """Log a warning, once, if passes or plans were deleted from the record."""
        if self.folder is None or self._has_said:
            return
        gaps = {kind: _gaps(self.numbers(kind)) for kind in ("pass", "plan")}
        if any(gaps.values()):
            self._has_said = True
            logger.warning(
                "%s lacks %s. What they held is missing in the run's history, tables and report.",
                self.folder,
                ", ".join(_names(kind, numbers) for kind, numbers in gaps.items() if numbers),
            )

    def begin(self, run: Mapping[str, Any], samples: pa.Table) -> None:
        """Start a record, or continue it if it is of the same run. The record of another run is moved aside.

        Args:
            run: identity of the run (`"run"`), and what its numbers mean (`schema.run_facts`).
            samples: what each sample is, one row each.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._folder is None or not self._write:
            self._passes, self._plans, self._next = [], [], {"pass": 0, "plan": 0}
            self._run = run.get("run")
            return
        if self._folder.exists() and read_run(self._folder).get("run") != run.get("run"):
            if len(self.passes):
                set_aside(self._folder)
            else:
                shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._run = run.get("run")
        self._next = {kind: max(self._files(kind), default=-1) + 1 for kind in self._next}
        for old in self._folder.glob("samples-*.parquet"):
            old.unlink()
        write_part(samples, self._folder, "samples")
        write_atomically(self._folder / RUN, json.dumps(run, indent=1, default=str).encode())

    def add_pass(self, scoring_pass: ScoringPass) -> None:
        """Add a scoring pass.

        Raises:
            OSError: the pass cannot be written.
        """
        if self.folder is None:
            self._passes.append(scoring_pass)
        elif self._write:
            self._add("pass", self._next["pass"], _pass_table(scoring_pass))
        self._next["pass"] += 1

    def add_plan(self, planned: PlannedEpoch) -> None:
        """Add a plan and its reasons.

        Raises:
            OSError: the plan cannot be written.
        """
        if self.folder is None:
            self._plans.append(planned)
        elif self._write:
            self._write_plan(self._next["plan"], planned)
        self._next["plan"] += 1

    def _write_plan(self, number: int, planned: PlannedEpoch) -> None:
        metadata = {"epoch": planned.epoch, "step": planned.step, "start": planned.start, "passes": planned.passes}
        plan = pa.table({"sample": planned.plan.indices, "weight": planned.plan.weights, **packs_of(planned.plan)})
        # write the reasons first, so that every plan in the record has them
        self._add("left", number, pa.table({"left_out_by": planned.left_out_by.astype(np.int16)}))
        self._add("plan", number, plan.replace_schema_metadata({b"record": json.dumps(metadata).encode()}))

    def trim(self, passes: int, plans: int) -> None:
        """Keep only the first `passes` passes and the first `plans` plans.

        Raises:
            OSError: a file cannot be deleted.
        """
        if self.folder is None:
            del self._passes[sum(number < passes for number in self.numbers("pass")) :]
            del self._plans[sum(number < plans for number in self.numbers("plan")) :]
        self._next = {"pass": passes, "plan": plans}
        if self.folder is None or not self._write:
            return
        for kind, kept in (("pass", passes), ("plan", plans), ("left", plans)):
            for number, path in self._files(kind).items():
                if number >= kept:
                    path.unlink()
        if self._count("pass") < passes or self._count("plan") < plans:
            logger.warning(
                "%s lacks passes or plans from before the checkpoint (it has %d of %d passes and %d of %d plans). "
                "History and reports will be incomplete. Training is not affected.",
                self.folder,
                self._count("pass"),
                passes,
                self._count("plan"),
                plans,
            )

    # ---- Files ----

    def _add(self, kind: str, number: int, table: pa.Table) -> None:
        assert self.folder is not None
        for stale in self.folder.glob(f"{kind}-{number:07d}-*.parquet"):  # left by a kill before the plan was written
            stale.unlink()
        write_part(table, self.folder, f"{kind}-{number:07d}")

    def _files(self, kind: str) -> dict[int, Path]:
        assert self.folder is not None
        found = ((re.fullmatch(rf"{kind}-(\d+)-\w+\.parquet", p.name), p) for p in self.folder.glob(f"{kind}-*"))
        return dict(sorted((int(match[1]), path) for match, path in found if match))

    def _count(self, kind: str) -> int:
        return len(self._files(kind))

    def _load_pass(self, index: int) -> ScoringPass:
        return _pass_from_table(read_part(list(self._files("pass").values())[index]))

    def _load_plan(self, index: int) -> PlannedEpoch:
        number, path = list(self._files("plan").items())[index]
        left_out = self._files("left").get(number)
        if left_out is None:  # it is written before the plan
            raise ValueError(f"{path.parent} is damaged: the reasons of {path.name} (left-{number:07d}) were deleted.")
        table = read_part(path)
        metadata = json.loads(table.schema.metadata[b"record"])
        return PlannedEpoch(
            plan=EpochPlan(
                indices=table["sample"].to_numpy(), weights=table["weight"].to_numpy(), packs=_bounds_of(table)
            ),
            left_out_by=read_part(left_out)["left_out_by"].to_numpy().astype(np.int64),
            **metadata,
        )


def _gaps(numbers: Sequence[int]) -> list[int]:
    """The numbers from 0 that are left out: `[0, 3, 4] -> [1, 2]`."""
    return sorted(set(range(max(numbers, default=-1))) - set(numbers))


def _names(kind: str, numbers: Sequence[int]) -> str:
    return ", ".join(f"{kind}-{number:07d}" for number in numbers)


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


def _pass_table(scoring_pass: ScoringPass) -> pa.Table:
    """One row for each measurement, in the order in which they were made."""
    tables = []
    for measurements in scoring_pass.measured:
        missing = {missing_column(name): codes.astype(np.int8) for name, codes in measurements.missing.items()}
        tables.append(
            pa.table(
                {
                    "sample": measurements.indices,
                    "step": measurements.step,
                    "observed": np.full(len(measurements.indices), measurements.observed),
                    **measurements.columns,
                    **missing,
                }
            )
        )
    metadata = {
        "epoch": scoring_pass.epoch,
        "step": scoring_pass.step,
        "drift": scoring_pass.drift,
        "num_samples": scoring_pass.num_samples,
        "metrics": list(scoring_pass.measured[-1].missing) if scoring_pass.measured else [],
    }
    table = pa.concat_tables(tables) if tables else pa.table({"sample": np.zeros(0, np.int64)})
    return table.replace_schema_metadata({b"record": json.dumps(metadata).encode()})


def _pass_from_table(table: pa.Table) -> ScoringPass:
    metadata = json.loads(table.schema.metadata[b"record"])
    metrics: list[str] = metadata["metrics"]
    missing = {name: missing_column(name) for name in metrics}
    names = [n for n in table.column_names if n not in ("sample", "step", "observed", *missing.values())]
    measured = []
    observed = table["observed"].to_numpy() if "observed" in table.column_names else np.zeros(0, bool)
    for was_observed in (True, False):  # observed numbers come first
        selected = np.flatnonzero(observed == was_observed)
        if len(selected):
            rows = table.take(pa.array(selected))
            measured.append(
                Measurements(
                    indices=rows["sample"].to_numpy(),
                    step=rows["step"].to_numpy(),
                    columns={name: rows[name].to_numpy() for name in names},
                    missing={name: rows[column].to_numpy().astype(np.int64) for name, column in missing.items()},
                    observed=was_observed,
                )
            )
    return ScoringPass(
        num_samples=metadata["num_samples"],
        epoch=metadata["epoch"],
        step=metadata["step"],
        measured=measured,
        drift=metadata["drift"],
    )


def packs_of(plan: EpochPlan) -> dict[str, IntArray]:
    """The column `pack` of a plan's table: the number of each sample's pack, from 0. None without packs."""
    if plan.packs is None:
        return {}
    return {"pack": np.repeat(np.arange(plan.num_rows), np.diff(plan.packs))}


def _bounds_of(table: pa.Table) -> IntArray | None:
    if "pack" not in table.column_names:
        return None
    pack = table["pack"].to_numpy()
    return np.searchsorted(pack, np.arange(pack[-1] + 2))
