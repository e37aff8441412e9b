"""What goes to experiment trackers: the numbers of the taps, and the table of a plan where a tracker has tables.

Numbers need nothing here: they travel in the trainer's own log entries to any `report_to`. A table does not fit into a
log entry, so it is handed to the run of Weights & Biases or trackio, and as Markdown to TensorBoard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from distill_sampler.distributed import Ranks
from distill_sampler.planning.summary import PREFIX, EpochSummary
from distill_sampler.protocols import Tap

PLAN = f"{PREFIX}plan"
"""The table's name in a tracker."""
STEP = "train/global_step"
"""The name of the optimizer step in the trackers of a trainer."""


def numbers_of(taps: Sequence[Tap], ranks: Ranks) -> dict[str, float]:
    """The means that taps have summed since the last call, over all processes. All processes must call it."""
    numbers = {}
    for tap in taps:
        for name, sums in tap.sums().items():
            total, weight = ranks.elementwise_sum(np.array(sums))
            if weight:
                numbers[name] = total / weight
    return numbers


def trackers_of_callbacks(callbacks: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """The trackers that a trainer reports to, each by name and with what takes a table."""
    for callback in callbacks:
        match type(callback).__name__:
            case "WandbCallback" if callback._wandb is not None and callback._wandb.run is not None:
                yield "wandb", callback._wandb.run
            case "TrackioCallback" if callback._initialized:
                yield "trackio", callback._trackio
            case "TensorBoardCallback" if callback.tb_writer is not None:
                yield "tensorboard", callback.tb_writer


def show_plan(summary: EpochSummary, trackers: Iterable[tuple[str, Any]]) -> None:
    """Give the table of a plan to the trackers that have tables. Only the first process calls it.

    Args:
        summary: the plan's numbers.
        trackers: by name, the run of W&B, the run or module of trackio, or the writer of TensorBoard; others are left
            alone.
    """
    rows = summary.rows()
    if not rows:
        return
    columns: list[Any] = list(rows[0])
    data = [list(row.values()) for row in rows]
    for name, tracker in trackers:
        if name == "wandb":
            import wandb

            tracker.log({PLAN: wandb.Table(columns=columns, data=data)}, commit=False)  # with the next log entry
        elif name == "trackio":
            import pandas as pd
            import trackio

            tracker.log({PLAN: trackio.Table(dataframe=pd.DataFrame(data, columns=columns)), STEP: summary.step})
        elif name == "tensorboard":
            tracker.add_text(PLAN, _markdown(columns, data), summary.step)


def _markdown(columns: Sequence[str], data: Sequence[Sequence[str | float]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in data)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: str | float) -> str:
    return value.replace("|", "\\|") if isinstance(value, str) else f"{value:.4g}"
