"""A log of the samples that were trained on, recorded where the loss is computed, and its comparison with a plan.

Each process R writes one file, `samples-R.jsonl`, with a line for each batch that went through the model:

    {"step": 7, "epoch": 1, "start": 4, "samples": [12, 3]}

These are the optimizer step that the batch was for (from 1), the epoch, the place of its first sample in the epoch's
plan, and its samples, identified by their tokens.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from distill_sampler.protocols import Tap
from distill_sampler.serialize import write_atomically
from distill_sampler.types import Batch, EpochPlan

logger = logging.getLogger(__name__)


class SampleLog(Tap):
    """Writes the log of one process.

    Args:
        path: the file. On a resume, lines of steps after the checkpoint's are removed: those steps are trained again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1
        self._writable = True

    @contextmanager
    def open(self, model: Any, *, step: int) -> Iterator[None]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(self._path) if line["step"] <= step] if step else []
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._writable = True
        try:
            yield
        finally:
            os.close(self._file)

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


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of all processes' logs, in the order of the epochs and of the plan.

    Raises:
        ValueError: there is no log.
    """
    files = sorted(folder.glob("samples-*.jsonl"))
    if not files:
        raise ValueError(
            f"There is no sample log in {folder}. Record one with attach(trainer, curriculum, sample_log=True)."
        )
    lines = [line for file in files for line in _lines(file)]
    return sorted(lines, key=lambda line: (line["epoch"], line["start"]))


def compare(log: list[dict[str, Any]], plan: EpochPlan, *, epoch: int, trained: int) -> list[str]:
    """Where a log differs from a plan, one sentence for each difference; empty if they agree.

    Args:
        log: from `read_log`.
        plan: the epoch's plan.
        epoch: which epoch of the log to compare.
        trained: how many places of the plan were trained on when the checkpoint was written; the log must have them
            all. Places past the plan's end stand for its first samples, which complete the last step.
    """
    found = []
    seen = np.zeros(trained, bool)
    for line in log:
        if line["epoch"] != epoch:
            continue
        places = line["start"] + np.arange(len(line["samples"]))
        planned = plan.indices[places % len(plan)]
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
    """The lines of a log that can be read. Any other is skipped, and the comparison reports its samples as missing."""
    if not path.exists():
        return
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"step", "epoch", "start", "samples"} <= line.keys():
            yield line
