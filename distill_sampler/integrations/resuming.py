"""Where a trainer continues after a checkpoint: at the place in the plan that the checkpoint names.

The trainer itself computes the place from the number of optimizer steps taken, which is only right if every step and
every epoch had as many samples as now. The checkpoint holds the place itself, so the number of samples in a step may
change. The trainer's step count continues unchanged. The learning-rate schedule moves to the step that is the same
share of the run, counted in steps of today's length.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
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
    """Optimizer steps of this epoch that are done, counted in steps of today's length."""
    schedule_step: int | None = None
    """Step at which the learning-rate schedule continues; None: the checkpoint's own."""


def place_in(
    entry: Mapping[str, Any], sampler: DistillSampler, args: TrainingArguments, *, max_steps: int, steps_per_epoch: int
) -> Place:
    """The place that a checkpoint names. Shifts the sampler there if it is not a whole number of today's steps away.

    Args:
        entry: the curriculum's entry in the checkpoint.
        sampler: holds the checkpoint's plan.
        args: arguments of the trainer that continues.
        max_steps: optimizer steps of the whole run, as the trainer computes them now.
        steps_per_epoch: optimizer steps of an epoch, as the trainer computes them now.

    Raises:
        ValueError: `max_steps` is set, and a step now has another number of samples.
    """
    progress, per_step = entry["progress"], samples_per_step(args)
    epoch, into_epoch, position = progress["epoch"], 0, sampler.rows(progress["places"])
    over = progress["over"]
    if not over:
        into_epoch = sampler.resume_at(position) // per_step
        over = into_epoch == steps_per_epoch  # less than a step is left, which drop_last leaves out
    if over:
        epoch, into_epoch = epoch + 1, 0
    if entry["samples_per_step"] == per_step:
        return Place(epoch=epoch, into_epoch=into_epoch)
    rows = sampler.noun
    if args.max_steps > 0:
        raise ValueError(
            f"max_steps={args.max_steps} counts optimizer steps, but a step had {entry['samples_per_step']} {rows} "
            f"until this checkpoint and has {per_step} now. Set the length of the run with num_train_epochs, or make "
            f"per_device_train_batch_size × gradient_accumulation_steps × processes {entry['samples_per_step']} again."
        )
    schedule_step = epoch * steps_per_epoch + into_epoch
    if args.process_index == 0:
        where = f"at {rows[:-1]} {position} of {sampler.num_rows} of the plan of epoch {epoch}"
        logger.warning(
            "An optimizer step had %d %s until this checkpoint and has %d now. Training continues %s. The "
            "learning-rate schedule continues at its step %d of %d, the same share of the run as before.",
            entry["samples_per_step"],
            rows,
            per_step,
            f"with epoch {epoch}" if over else where,
            schedule_step,
            max_steps,
        )
    return Place(epoch=epoch, into_epoch=into_epoch, schedule_step=schedule_step)


def say_what_is_lost(entry: Mapping[str, Any], args: TrainingArguments) -> None:
    """Log what this run cannot restore from a checkpoint."""
    if entry["world_size"] != args.world_size:
        logger.warning(
            "The checkpoint was written by %d processes, and now there are %d. The order of samples continues as "
            "planned, but the random states (dropout), which are saved for each process, start anew.",
            entry["world_size"],
            args.world_size,
        )
    if not entry["files"]:
        logger.warning(
            "The checkpoint has no optimizer (save_only_model=True). The order of samples continues as planned, but "
            "the optimizer, the learning-rate schedule and the random states start anew."
        )


def continue_schedule(scheduler: Any, step: int) -> None:
    """Move a learning-rate schedule to another step.

    Only a schedule that is a function of the step can be moved: `LambdaLR`, which all of transformers' schedules are
    except those that follow the loss. For any other, a warning says that it stays where it is.
    """
    if isinstance(scheduler, LambdaLR):
        scheduler.last_epoch = step - 1
        scheduler.step()
    else:
        logger.warning(
            "The learning-rate schedule %s is not a function of the step. It cannot be moved to step %d, and continues "
            "at the checkpoint's step.",
            type(scheduler).__name__,
            step,
        )


def without_randomness(loader: Any) -> Iterator[Any]:
    """The batches of a loader, fetched without a draw from torch's random state.

    A data loader draws the seed of its workers when iteration starts. After a resume that happens a second time, when
    the random state restored from the checkpoint is already that of the next training step.
    """
    iterator = iter(loader)
    with torch.random.fork_rng(devices=[]):
        first = list(itertools.islice(iterator, 1))
    yield from first
    yield from iterator
