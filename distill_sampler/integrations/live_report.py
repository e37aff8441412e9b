"""The page of a run that is written anew while it trains (`report_every`)."""

from __future__ import annotations

import logging
from pathlib import Path

from distill_sampler.curriculum import Curriculum
from distill_sampler.report.page import write_report
from distill_sampler.report.pictures import require_plotly
from distill_sampler.types import is_whole

logger = logging.getLogger(__name__)

REPORT = "report.html"
"""Name of the page in the output folder."""


class LiveReport:
    """Writes the page. Only the process that writes for the run calls its methods.

    Args:
        curriculum: the run.
        every: after the plan of every so many epochs; None: never.

    Raises:
        ValueError: `every` is not a positive number, or plotly is not installed.
    """

    def __init__(self, curriculum: Curriculum, every: int | None) -> None:
        if every is not None:
            if not is_whole(every) or every < 1:
                raise ValueError(f"report_every={every!r}: give a number of epochs, at least 1, or None.")
            require_plotly(f"report_every={every}")
        self._curriculum = curriculum
        self._every = every

    def epoch_begins(self, folder: Path, epoch: int, num_epochs: int | None, *, step: int) -> None:
        """Write the page after the plan of an epoch, if it is time. It reloads itself.

        Args:
            folder: the run's output folder.
            epoch: the epoch, from 0.
            num_epochs: epochs of the whole run, if that is known.
            step: optimizer steps taken so far.
        """
        if self._every is not None and epoch % self._every == 0:
            of = f" of {num_epochs}" if num_epochs else ""
            self._write(folder, f"Epoch {epoch + 1}{of} begins, at optimizer step {step}.")

    def training_ends(self, folder: Path) -> None:
        """Write the page for the last time."""
        if self._every is not None:
            self._write(folder, "")

    def _write(self, folder: Path, live: str) -> None:
        """Write the page. A failure does not stop training."""
        try:
            write_report(self._curriculum.cycle.scores(), folder / REPORT, live=live)
        except (OSError, ValueError) as error:
            logger.warning("report_every=%s: the report was not written: %s", self._every, error)
