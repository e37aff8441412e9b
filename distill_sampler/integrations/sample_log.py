"""A log of the samples that were trained on, recorded where the loss is computed, and its comparison with a plan.

Each process R writes one file, `samples-R.jsonl`. Its first line is the identity of the run. Then follows a line for
each batch that went through the model:

    {"run": "1f0c6ab29d3e4857"}
    {"step": 7, "epoch": 1, "start": 4, "samples": [12, 3]}

These are the optimizer step that the batch was for (from 1), the epoch, the place of its first sample in the epoch's
plan, and its samples, identified by their tokens.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from distill_sampler.planning.planner import PlannedEpoch
from distill_sampler.protocols import Tap
from distill_sampler.serialize import write_atomically
from distill_sampler.types import Batch, EpochPlan

logger = logging.getLogger(__name__)


class SampleLog(Tap):
    """Writes the log of one process. The host calls `begin` before it opens the tap.

    Args:
        rank: number of the process.
        world_size: how many processes there are.
    """

    def __init__(self, *, rank: int = 0, world_size: int = 1) -> None:
        self._rank = rank
        self._world_size = world_size
        self._folder = self._earlier = Path()
        self._run = ""
        self._file = -1
        self._writable = True

    def begin(self, folder: Path, run: str, *, earlier: Path | None = None) -> None:
        """A run begins or continues.

        Args:
            folder: folder of the log.
            run: identity of the run.
            earlier: where the run may have kept its log until now. Its lines are taken along.
        """
        self._folder, self._run, self._earlier = folder, run, earlier or folder

    @property
    def _path(self) -> Path:
        return self._folder / f"samples-{self._rank}.jsonl"

    @contextmanager
    def open(self, model: Any, *, step: int) -> Iterator[None]:
        """Open the log. Lines of steps after `step` are removed, because those steps are trained again, and so are
        lines of another run."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._trim(self._path, step)
        if self._rank == 0:  # the run may have had more processes before
            logs = (path for folder in (self._folder, self._earlier) for path in folder.glob("samples-*.jsonl"))
            for name in {path.name for path in logs}:
                rank = re.fullmatch(r"samples-(\d+)\.jsonl", name)
                if rank and int(rank[1]) >= self._world_size:
                    self._trim(self._folder / name, step)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._writable = True
        try:
            yield
        finally:
            os.close(self._file)

    def _trim(self, path: Path, step: int) -> None:
        known = next((each for each in (self._earlier / path.name, path) if _run_of(each) == self._run), None)
        kept = [line for line in _lines(known) if line["step"] <= step] if step and known else []
        lines = [{"run": self._run}, *kept]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def before(self, batch: Batch) -> None:
        """Add the batch's line in a single write, so that a kill cannot leave half a line."""
        line = {
            "step": batch.step + 1,
            "epoch": batch.epoch,
            "start": batch.place,
            "samples": batch.samples.tolist(),
        }
        if not self._writable:
            return
        try:
            os.write(self._file, (json.dumps(line) + "\n").encode())
        except OSError as error:  # a full disk
            self._writable = False
            logger.warning(
                "%s can no longer be written (%s). Training continues without it; distill-sampler verify will miss the "
                "batches from step %d on.",
                self._path,
                error,
                batch.step + 1,
            )

    def after(self, batch: Batch) -> None:
        pass


def read_log(folder: Path, run: str | None = None) -> list[dict[str, Any]]:
    """The lines of all processes' logs, in the order of the epochs and of the plan.

    Args:
        folder: folder of the log.
        run: identity of the run that the log must be of; None: any.

    Raises:
        ValueError: there is no log, or it is of another run.
    """
    files = sorted(folder.glob("samples-*.jsonl"))
    if not files:
        raise ValueError(
            f"There is no sample log in {folder}. Record one with attach(trainer, curriculum, sample_log=True)."
        )
    if run is not None and any(_run_of(file) not in (run, None) for file in files):
        raise ValueError(
            f"The sample log in {folder} is of a later run, which has begun anew in the same folder, so it cannot be "
            "compared. Give each run an output folder of its own, or name the folder of the right log (--log)."
        )
    lines = [line for file in files for line in _lines(file)]
    return sorted(lines, key=lambda line: (line["epoch"], line["start"]))


def compare(
    log: list[dict[str, Any]], plan: EpochPlan, *, epoch: int, trained: int, replans: Sequence[PlannedEpoch] = ()
) -> list[str]:
    """Where a log differs from a plan, one sentence for each difference; empty if they agree.

    Args:
        log: from `read_log`.
        plan: the epoch's plan in a checkpoint.
        epoch: which epoch of the log to compare.
        trained: how many places of the plan were trained on when the checkpoint was written; the log must have them
            all. Places past the plan's end stand for its first samples, which complete the last step.
        replans: the epoch's later plans, in order. Each holds for the steps after the one at which it was made.
    """
    found = []
    seen = np.zeros(trained, bool)
    for line in log:
        if line["epoch"] != epoch:
            continue
        in_force = next((each.plan for each in reversed(replans) if each.step < line["step"]), plan)
        places = line["start"] + np.arange(len(line["samples"]))
        planned = in_force.indices[places % len(in_force)]
        seen[places[places < trained]] = True
        if planned.tolist() != line["samples"]:
            found.append(
                f"step {line['step']}, place {line['start']} of the plan: planned {planned.tolist()}, trained "
                f"{line['samples']}"
            )
    missing = np.flatnonzero(~seen)
    if len(missing):
        found.append(
            f"{len(missing)} of {trained} trained samples are not in the log; the first is at place {missing[0]}"
        )
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of batches. A line that cannot be read is skipped, and its samples are reported as missing."""
    for line in _values(path):
        if {"step", "epoch", "start", "samples"} <= line.keys():
            yield line


def _run_of(path: Path) -> str | None:
    """Identity of the run that a log is of; None if the log does not say."""
    return next((line["run"] for line in _values(path) if "run" in line), None)


def _values(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log that can be read."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line
