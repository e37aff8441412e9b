"""`distill-sampler verify`: compares the sample log of a run with the plans in its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from distill_sampler.artifacts.state import read_arrays
from distill_sampler.integrations.checkpoints import FOLDER, entry_of, read_state, why_broken
from distill_sampler.integrations.sample_log import compare, read_log
from distill_sampler.serialize import unpacked
from distill_sampler.types import EpochPlan


def run(checkpoints: Sequence[Path], log: Path | None, *, to_stderr: bool = False) -> dict[str, Any]:
    """Print one line for each checkpoint. Returns whether the log agrees with all of them, and what differs in each.

    Raises:
        ValueError: a checkpoint cannot be read, or there is no log.
    """
    found: list[dict[str, Any]] = []
    for checkpoint in checkpoints:
        if not checkpoint.is_dir():
            raise ValueError(f"{checkpoint}: there is no such folder.")
        if reason := why_broken(checkpoint):
            raise ValueError(f"{checkpoint} cannot be read: {reason}.")
        entry = entry_of(read_state(checkpoint))
        if entry is None:
            raise ValueError(f"{checkpoint} was written without a curriculum, so its order is not known.")
        lines = read_log(log or checkpoint.resolve().parent / FOLDER)
        saved, progress = entry["curriculum"], entry["progress"]
        plan = EpochPlan(**unpacked(saved["plan"], read_arrays(checkpoint)))
        epoch = saved["epoch"]
        trained, of_epoch = progress["places"], entry["places_per_epoch"]
        differing = compare(lines, plan, epoch=epoch, trained=trained)
        where = f"{checkpoint}: epoch {epoch}, plan {plan.fingerprint}, {trained} of {of_epoch} samples trained"
        if of_epoch > len(plan):
            where += f" ({of_epoch - len(plan)} of them are the plan's first samples, which complete the last step)"
        if of_epoch < len(plan):
            where += f" (drop_last=True leaves out the last {len(plan) - of_epoch} of the plan)"
        found.append(
            {
                "checkpoint": checkpoint,
                "epoch": epoch,
                "plan": plan.fingerprint,
                "trained": trained,
                "of_epoch": of_epoch,
                "differences": differing,
            }
        )
        if differing:
            typer.secho(f"{where}. The log DISAGREES in {len(differing)} places", fg="red", err=to_stderr)
            for sentence in differing[:5]:
                typer.echo(f"  {sentence}", err=to_stderr)
        else:
            beyond = {line["epoch"] for line in lines} - {epoch}
            others = f"; to compare its epochs {sorted(beyond)}, give a checkpoint of each" if beyond else ""
            typer.echo(f"{where}. The log agrees{others}", err=to_stderr)
    return {"agree": not any(each["differences"] for each in found), "checkpoints": found}
