"""Where a trainer continues after a checkpoint: at the place of the plan that the checkpoint names.

The trainer computes it from the number of optimizer steps taken, which is right as long as every step and every epoch
was as long as they are now. The checkpoint has the place itself, so the number of samples in a step may change. The
trainer's step count goes on as it is; only the learning-rate schedule counts by the steps that the run would have
taken so far had they always been as long as now, and so keeps its share of the run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from distill_sampler.integrations.refusals import samples_per_step
from distill_sampler.planning.sampler import DistillSampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where training continues."""

    epoch: int = 0
    into_epoch: int = 0
    """Optimizer steps of this epoch that count as taken, in steps as long as they are now."""
    schedule_step: int | None = None
    """Step at which the learning-rate schedule continues; None: the one that the checkpoint has."""


def place_in(
    entry: Mapping[str, Any], sampler: DistillSampler, args: TrainingArguments, *, max_steps: int, steps_per_epoch: int
) -> Place:
    """The place that a checkpoint names. Shifts the sampler to it if today's steps do not come to it.

    Args:
        entry: the checkpoint's.
        sampler: with the checkpoint's plan.
        args: of the trainer that continues.
        max_steps: of the whole run, as the trainer counts them now.
        steps_per_epoch: the same.

    Raises:
        ValueError: the trainer is to stop after a number of steps, and steps are longer or shorter now.
    """
    progress, per_step = entry["progress"], samples_per_step(args)
    epoch, into_epoch, position = progress["epoch"], 0, progress["places"]
    over = progress["over"]
    if not over:
        into_epoch = sampler.resume_at(position) // per_step
        over = into_epoch == steps_per_epoch  # the rest is less than a step, and drop_last leaves it out
    if over:
        epoch, into_epoch = epoch + 1, 0
    if entry["samples_per_step"] == per_step:
        return Place(epoch=epoch, into_epoch=into_epoch)
    if args.max_steps > 0:
        raise ValueError(
            f"max_steps={args.max_steps} counts optimizer steps, but they had {entry['samples_per_step']} samples "
            f"until this checkpoint and have {per_step} now. Say with num_train_epochs how long to train, or choose "
            "per_device_train_batch_size × gradient_accumulation_steps × processes to give "
            f"{entry['samples_per_step']} again."
        )
    schedule_step = epoch * steps_per_epoch + into_epoch
    if args.process_index == 0:
        where = f"at sample {position} of {sampler.num_samples} of the plan of epoch {epoch}"
        logger.warning(
            "Until this checkpoint, optimizer steps had %d samples, now they have %d. Training continues %s. The "
            "schedule of the learning rate continues at its step %d of %d, the same share of the run as before.",
            entry["samples_per_step"],
            per_step,
            f"with epoch {epoch}" if over else where,
            schedule_step,
            max_steps,
        )
    return Place(epoch=epoch, into_epoch=into_epoch, schedule_step=schedule_step)


def say_what_is_lost(entry: Mapping[str, Any], args: TrainingArguments) -> None:
    """Log what a checkpoint does not have for this run."""
    if entry["world_size"] != args.world_size:
        logger.warning(
            "The checkpoint was written by %d processes, now there are %d: the order of samples goes on as planned, "
            "but random states (dropout) were saved for each process and start anew.",
            entry["world_size"],
            args.world_size,
        )
    if not entry["files"]:
        logger.warning(
            "The checkpoint has no optimizer (save_only_model=True): the order of samples goes on as planned, but the "
            "optimizer, its schedule and random states start anew."
        )


def continue_schedule(scheduler: Any, step: int) -> None:
    """Move a learning-rate schedule to another step.

    Schedules that are a function of the step can be moved (`LambdaLR`: all of transformers', but those that follow
    the loss, which have no use for it). Of others that is said.
    """
    if isinstance(scheduler, LambdaLR):
        scheduler.last_epoch = step - 1
        scheduler.step()
    else:
        logger.warning(
            "%s is no function of the step. It cannot be moved to step %d and continues where the checkpoint has it.",
            type(scheduler).__name__,
            step,
        )
