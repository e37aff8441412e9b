"""A run's record: every scoring pass and every plan with its reasons, kept as they happen.

With a folder, each pass and each plan is a file of its own, written whole or not at all, and read back when somebody
asks: memory does not grow with the run. Without one (a loop of one's own that names no folder) they stay in memory.

    OUTPUT/distill_sampler/record/run.json                    whose record this is, and what its numbers mean
    OUTPUT/distill_sampler/record/samples-HASH.parquet        what each sample is: the user's columns, lengths, hashes
    OUTPUT/distill_sampler/record/pass-0000000-HASH.parquet   what a scoring pass measured
    OUTPUT/distill_sampler/record/plan-0000000-HASH.parquet   an epoch's plan
    OUTPUT/distill_sampler/record/left-0000000-HASH.parquet   which policy left out which sample

A resume trims the record to its checkpoint: what came after it will happen again.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa

from distill_sampler.artifacts.parts import read_part, write_part
from distill_sampler.artifacts.passes import missing_column
from distill_sampler.planning.planner import PlannedEpoch
from distill_sampler.serialize import write_atomically
from distill_sampler.store import Measurements, ScoringPass
from distill_sampler.types import EpochPlan

logger = logging.getLogger(__name__)

T = TypeVar("T")

RECORD = Path("distill_sampler", "record")
"""Where a run's record lies in its output folder."""
RUN = "run.json"


class LazyEntries(Sequence[T], Generic[T]):
    """The passes or the plans of a run, each read when it is looked at."""

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
        places = range(len(self))[index]
        return self._load(places) if isinstance(places, int) else [self._load(place) for place in places]

    def __iter__(self) -> Iterator[T]:
        return (self._load(place) for place in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return list(self) == other


class Record:
    """Passes and plans of one run.

    Args:
        folder: where they are kept; None: in memory.
        write: whether this process writes; the others only read.
    """

    def __init__(self, folder: Path | None = None, *, write: bool = True) -> None:
        self._folder = folder
        self._run: str | None = None
        self._write = write
        self._passes: list[ScoringPass] = []
        self._plans: list[PlannedEpoch] = []

    @property
    def folder(self) -> Path | None:
        """Where the record lies. Another run may have moved it aside since."""
        if self._folder is None or not self._run or read_run(self._folder).get("run") == self._run:
            return self._folder
        aside = _aside(self._folder, self._run)
        return aside if aside.exists() else self._folder

    @property
    def passes(self) -> Sequence[ScoringPass]:
        """Every scoring pass that is kept, the first one first."""
        if self.folder is None:
            return self._passes
        return LazyEntries(lambda: self._count("pass"), self._load_pass)

    @property
    def plans(self) -> Sequence[PlannedEpoch]:
        """Every plan that is kept: one for each epoch, and one for each time that the rest of an epoch was planned."""
        if self.folder is None:
            return self._plans
        return LazyEntries(lambda: self._count("plan"), self._load_plan)

    def begin(self, run: Mapping[str, Any], samples: pa.Table) -> None:
        """Start a record, or go on with it if it is of the same run. The record of another run is moved aside.

        Args:
            run: whose record this is (`"run"`), and what its numbers mean (`scorefile.run_facts`).
            samples: one row for each sample.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._folder is None or not self._write:
            self._passes, self._plans = [], []
            self._run = run.get("run")
            return
        if self._folder.exists() and read_run(self._folder).get("run") != run.get("run"):
            if len(self.passes):
                set_aside(self._folder)
            else:
                shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._run = run.get("run")
        for old in self._folder.glob("samples-*.parquet"):
            old.unlink()
        write_part(samples, self._folder, "samples")
        write_atomically(self._folder / RUN, json.dumps(run, indent=1, default=str).encode())

    def add_pass(self, taken: ScoringPass) -> None:
        """Keep a scoring pass.

        Raises:
            OSError: it cannot be written.
        """
        if self.folder is None:
            self._passes.append(taken)
        elif self._write:
            self._add("pass", self._count("pass"), _pass_table(taken))

    def add_plan(self, planned: PlannedEpoch) -> None:
        """Keep a plan and its reasons.

        Raises:
            OSError: it cannot be written.
        """
        if self.folder is None:
            self._plans.append(planned)
            return
        if not self._write:
            return
        number = self._count("plan")
        told = {"epoch": planned.epoch, "step": planned.step, "start": planned.start, "passes": planned.passes}
        plan = pa.table({"sample": planned.plan.indices, "weight": planned.plan.weights})
        # the reasons first: a plan that is there has them
        self._add("left", number, pa.table({"left_out_by": planned.left_out_by.astype(np.int16)}))
        self._add("plan", number, plan.replace_schema_metadata({b"record": json.dumps(told).encode()}))

    def trim(self, passes: int, plans: int) -> None:
        """Forget what came after so many passes and plans.

        Raises:
            OSError: a file cannot be removed.
        """
        del self._passes[passes:], self._plans[plans:]
        if self.folder is None or not self._write:
            return
        for kind, kept in (("pass", passes), ("plan", plans), ("left", plans)):
            for number, path in self._files(kind).items():
                if number >= kept:
                    path.unlink()
        if self._count("pass") < passes or self._count("plan") < plans:
            logger.warning(
                "%s lacks passes or plans from before the checkpoint (%d of %d and %d of %d are there), so history and "
                "reports are incomplete. Training is not affected.",
                self.folder,
                self._count("pass"),
                passes,
                self._count("plan"),
                plans,
            )

    # ---- Files ----

    def _add(self, kind: str, number: int, table: pa.Table) -> None:
        assert self.folder is not None
        for stale in self.folder.glob(f"{kind}-{number:07d}-*.parquet"):  # a kill came between reasons and plan
            stale.unlink()
        write_part(table, self.folder, f"{kind}-{number:07d}")

    def _files(self, kind: str) -> dict[int, Path]:
        assert self.folder is not None
        found = ((re.fullmatch(rf"{kind}-(\d+)-\w+\.parquet", p.name), p) for p in self.folder.glob(f"{kind}-*"))
        return dict(sorted((int(match[1]), path) for match, path in found if match))

    def _count(self, kind: str) -> int:
        return len(self._files(kind))

    def _load_pass(self, place: int) -> ScoringPass:
        return _pass_of(read_part(list(self._files("pass").values())[place]))

    def _load_plan(self, place: int) -> PlannedEpoch:
        number, path = list(self._files("plan").items())[place]
        table = read_part(path)
        told = json.loads(table.schema.metadata[b"record"])
        return PlannedEpoch(
            plan=EpochPlan(indices=table["sample"].to_numpy(), weights=table["weight"].to_numpy()),
            left_out_by=read_part(self._files("left")[number])["left_out_by"].to_numpy().astype(np.int64),
            **told,
        )


def read_run(folder: Path) -> dict[str, Any]:
    """Whose record lies in a folder, and what its numbers mean; empty if nobody can tell."""
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_samples(folder: Path) -> pa.Table:
    """What each sample of a record is."""
    (path,) = folder.glob("samples-*.parquet")
    return read_part(path)


def set_aside(folder: Path) -> None:
    """Rename another run's record, and say so."""
    aside = _aside(folder, str(read_run(folder).get("run") or uuid.uuid4().hex[:16]))
    shutil.rmtree(aside, ignore_errors=True)  # an older state of the same run
    folder.rename(aside)
    logger.warning("%s held the record of another run; it was moved to %s.", folder, aside.name)


def _aside(folder: Path, run: str) -> Path:
    return folder.with_name(f"{folder.name}-{run}")


def _pass_table(taken: ScoringPass) -> pa.Table:
    """One row for each measurement, in the order in which they were made."""
    tables = []
    for some in taken.measured:
        tables.append(
            pa.table(
                {
                    "sample": some.indices,
                    "step": some.step,
                    "observed": np.full(len(some.indices), some.observed),
                    **some.columns,
                    **{missing_column(name): codes.astype(np.int8) for name, codes in some.missing.items()},
                }
            )
        )
    told = {
        "epoch": taken.epoch,
        "step": taken.step,
        "drift": taken.drift,
        "num_samples": taken.num_samples,
        "metrics": list(taken.measured[-1].missing) if taken.measured else [],
    }
    table = pa.concat_tables(tables) if tables else pa.table({"sample": np.zeros(0, np.int64)})
    return table.replace_schema_metadata({b"record": json.dumps(told).encode()})


def _pass_of(table: pa.Table) -> ScoringPass:
    told = json.loads(table.schema.metadata[b"record"])
    metrics: list[str] = told["metrics"]
    missing = {name: missing_column(name) for name in metrics}
    names = [n for n in table.column_names if n not in ("sample", "step", "observed", *missing.values())]
    measured = []
    observed = table["observed"].to_numpy() if "observed" in table.column_names else np.zeros(0, bool)
    for seen in (True, False):  # what was observed comes first
        at = np.flatnonzero(observed == seen)
        if len(at):
            rows = table.take(pa.array(at))
            measured.append(
                Measurements(
                    indices=rows["sample"].to_numpy(),
                    step=rows["step"].to_numpy(),
                    columns={name: rows[name].to_numpy() for name in names},
                    missing={name: rows[column].to_numpy().astype(np.int64) for name, column in missing.items()},
                    observed=seen,
                )
            )
    return ScoringPass(
        num_samples=told["num_samples"],
        epoch=told["epoch"],
        step=told["step"],
        measured=measured,
        drift=told["drift"],
    )
