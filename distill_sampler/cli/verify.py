"""`distill-sampler verify`: compares the sample log of a run with the plans in its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from distill_sampler.artifacts.record import RECORD, record_of
from distill_sampler.artifacts.state import read_arrays
from distill_sampler.integrations.checkpoints import FOLDER, entry_of, read_state, why_broken
from distill_sampler.integrations.sample_log import compare, read_log
from distill_sampler.planning.planner import PlannedEpoch
from distill_sampler.serialize import unpacked
from distill_sampler.specs import parse_rescore
from distill_sampler.types import EpochPlan


def run(checkpoints: Sequence[Path], log: Path | None, *, to_stderr: bool = False) -> dict[str, Any]:
    """Print one line for each checkpoint. Returns whether the log agrees with all of them, and what differs in each.

    Samples that were trained on after the checkpoint are compared with the plan that the epoch had by then, which is in
    the run's record.

    Raises:
        ValueError: a checkpoint cannot be read, there is no log, or the log is of another run.
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
        folder = log or checkpoint.resolve().parent / FOLDER
        lines = read_log(folder, entry["run"])
        saved, progress = entry["curriculum"], entry["progress"]
        plan = EpochPlan(**unpacked(saved["plan"], read_arrays(checkpoint)))
        epoch = saved["epoch"]
        trained, of_epoch = progress["places"], entry["places_per_epoch"]
        replans, known = _later_plans(folder / RECORD.name, entry)
        beyond = sum(len(line["samples"]) for line in lines if line["epoch"] == epoch and line["step"] > known)
        lines = [line for line in lines if line["step"] <= known]
        differing = compare(lines, plan, epoch=epoch, trained=trained, replans=replans)
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
                "not_compared": beyond,
            }
        )
        if differing:
            typer.secho(f"{where}. The log DISAGREES in {len(differing)} places", fg="red", err=to_stderr)
            for sentence in differing[:5]:
                typer.echo(f"  {sentence}", err=to_stderr)
        else:
            others = {line["epoch"] for line in lines} - {epoch}
            more = f"; to compare its epochs {sorted(others)}, give a checkpoint of each" if others else ""
            typer.echo(f"{where}. The log agrees{more}", err=to_stderr)
        if beyond:
            typer.echo(
                f"  {beyond} samples that were trained after optimizer step {known} are not compared: the epoch may "
                f"have been replanned, and the run's record in {folder / RECORD.name} does not say how",
                err=to_stderr,
            )
    return {"agree": not any(each["differences"] for each in found), "checkpoints": found}


def _later_plans(record_folder: Path, entry: Mapping[str, Any]) -> tuple[list[PlannedEpoch], float]:
    """How an epoch was replanned after a checkpoint.

    Args:
        record_folder: the run's record, which may be missing, or end early because the disk was full.
        entry: the curriculum's entry in the checkpoint.

    Returns:
        The epoch's later plans, in order, and the last optimizer step whose plan is known.
    """
    epoch, step = entry["curriculum"]["epoch"], entry["progress"]["step"]
    rescore = parse_rescore(entry["curriculum"]["scores"]["origin"]["rescore"])
    record = record_of(record_folder, entry["run"])
    plans = () if record is None else record.plans
    later: list[PlannedEpoch] = []
    for planned in reversed(plans):
        if planned.step <= step:
            break
        if planned.epoch == epoch:
            later.insert(0, planned)
    if rescore.every_steps is None:
        return later, math.inf
    next_plan = max(step + 1, plans[-1].step + rescore.every_steps if plans else 0)
    return later, next_plan + rescore.lag
