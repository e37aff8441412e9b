"""`distill-sampler verify`: compares the sample log of a run with the plans in its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from distill_sampler.artifacts.record import RECORD, Record, names, record_of
from distill_sampler.integrations.checkpoints import (
    FOLDER,
    curriculum_of,
)
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
        entry, arrays = curriculum_of(checkpoint)
        folder = log or checkpoint.resolve().parent / FOLDER
        lines = read_log(folder, entry["run"])
        saved, progress = entry["curriculum"], entry["progress"]
        if saved["plan"] is None:
            raise ValueError(f"{checkpoint} was written before the first epoch was planned. Give a later one.")
        plan = EpochPlan(**unpacked(saved["plan"], arrays))
        epoch = saved["epoch"]
        trained, of_epoch = progress["places"], entry["places_per_epoch"]
        record = record_of(folder / RECORD.name, entry["run"])
        missing = {} if record is None else record.missing_plans()
        replans, known = _later_plans(record, missing, entry)
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
                "missing_plans": {names("plan", [number]): list(epochs) for number, epochs in missing.items()},
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
        for number, epochs in missing.items():
            typer.echo(f"  {_lacks(record, number, epochs)}. This comparison does not need it", err=to_stderr)
    return {"agree": not any(each["differences"] for each in found), "checkpoints": found}


def _later_plans(
    record: Record | None, missing: Mapping[int, Sequence[int]], entry: Mapping[str, Any]
) -> tuple[list[PlannedEpoch], float]:
    """How an epoch was replanned after a checkpoint.

    Args:
        record: the run's record, which may be missing, or end early because the disk was full.
        missing: the plans that were deleted from it, by number, and the epochs that they may have been of.
        entry: the curriculum's entry in the checkpoint.

    Returns:
        The epoch's later plans, in order, and the last optimizer step whose plan is known.

    Raises:
        ValueError: one of them was deleted.
    """
    epoch, step = entry["curriculum"]["epoch"], entry["progress"]["step"]
    rescore = parse_rescore(entry["curriculum"]["scores"]["origin"]["rescore"])
    plans = () if record is None else record.plans
    later: list[PlannedEpoch] = []
    for planned in reversed(plans):
        if planned.step <= step:
            break
        if planned.epoch == epoch:
            later.insert(0, planned)
    if rescore.every_steps is None:
        return later, math.inf
    for number, epochs in missing.items():
        if epoch in epochs and number >= entry["curriculum"]["plans"]:
            raise ValueError(f"{_lacks(record, number, epochs)}, so what was trained cannot be compared with it.")
    next_plan = max(step + 1, plans[-1].step + rescore.every_steps if plans else 0)
    return later, next_plan + rescore.lag


def _lacks(record: Record | None, number: int, epochs: Sequence[int]) -> str:
    of = f"epoch {epochs[0]}" if len(epochs) == 1 else f"one of the epochs {epochs[0]} to {epochs[-1]}"
    return f"{record} lacks {names('plan', [number])}, a plan of {of}"
