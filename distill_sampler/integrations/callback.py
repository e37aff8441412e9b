"""The callback that `attach` adds: it starts the curriculum's epochs, keeps its state in the trainer's, feeds the taps.

`on_epoch_begin` comes before the epoch's data loader is iterated, so work done there takes effect in that very epoch.
The state goes into `state.stateful_callbacks`, which is saved with `trainer_state.json` and can be read again in
`on_train_begin`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch.utils.data
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distill_sampler.curriculum import Curriculum
from distill_sampler.integrations.batches import batch_of
from distill_sampler.integrations.checkpoints import STATE_ENTRY, TRAINER_STATE, new_run
from distill_sampler.integrations.refusals import check_position, samples_per_step
from distill_sampler.integrations.seams import output_of
from distill_sampler.planning.summary import PREFIX
from distill_sampler.protocols import Tap

logger = logging.getLogger(__name__)


class CurriculumCallback(TrainerCallback):
    """Tells the curriculum when an epoch begins, and keeps its state in the trainer's. Made by `attach`."""

    def __init__(
        self, trainer: Trainer, curriculum: Curriculum, *, taps: Sequence[Tap] = (), accept_changes: bool = False
    ) -> None:
        self.trainer = trainer
        self.curriculum = curriculum
        self.taps = list(taps)
        """What rides on the batches of training."""
        self.pending: dict[str, float] = {}
        """Numbers for the trainer's next line of training logs."""
        self.run = new_run()
        """Identity of the run, from its first start to its end, in every checkpoint."""
        self._accept_changes = accept_changes
        self._open = ExitStack()
        """What taps have opened: hooks and files."""
        self._epoch = 0
        self._num_epochs: int | None = None
        self._steps_before = 0
        """Optimizer steps of the epochs before this one."""
        self._batches = 0
        """Batches of this epoch that this process has trained on."""
        self._epoch_started = 0.0
        self._planned = 0
        """Plans made before this epoch."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        entry = _entries(state).get(STATE_ENTRY)
        steps_per_epoch = max(1, -(-len(kwargs["train_dataloader"]) // args.gradient_accumulation_steps))
        # what the trainer makes of it; on_epoch_begin counts on from here
        self._epoch, into_epoch = divmod(state.global_step, steps_per_epoch)
        self._steps_before = state.global_step - into_epoch
        self._batches = into_epoch * args.gradient_accumulation_steps
        self._num_epochs = math.ceil(state.max_steps / steps_per_epoch) if state.max_steps > 0 else None
        self.curriculum.keep(output_of(args), run=self.run, write=state.is_world_process_zero)
        if state.global_step == 0:
            self.curriculum.reset()
        elif entry is None:
            raise ValueError(
                "This checkpoint was written without a curriculum, so the order of its epoch is not known. Start a new "
                "run from its weights (model=<checkpoint folder>, without resume_from_checkpoint)."
            )
        else:
            check_position(entry, args, self._epoch, into_epoch)
            self.curriculum.load_state_dict(
                entry["curriculum"], accept_changes=self._accept_changes, epoch_over=into_epoch == 0
            )
            self.curriculum.progress(entry["progress"]["places"])
        for tap in self.taps:
            self._open.enter_context(tap.open(_as_called(self.trainer), step=state.global_step))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch_started = time.perf_counter()
        summaries = self.curriculum.summaries
        planned = self._planned = len(summaries)
        # after a resume, the begun epoch keeps the plan that came with the checkpoint
        self.curriculum.start_epoch(
            self._epoch, _as_called(self.trainer), step=state.global_step, num_epochs=self._num_epochs
        )
        _entries(state)[STATE_ENTRY] = {
            "run": self.run,
            "world_size": args.world_size,
            "samples_per_step": samples_per_step(args),
            "places_per_epoch": len(self.curriculum.sampler),
            "files": _files_of_a_checkpoint(self.trainer),
        }
        self.note_state(state)
        self._note_progress(state)
        if args.dataloader_persistent_workers and self._epoch > 0:
            # A run that was not interrupted still has its workers here. One that was makes new ones, and their seed
            # would be drawn from the random state that dropout draws from.
            kwargs["train_dataloader"].base_dataloader.generator = torch.Generator().manual_seed(args.seed)
        if len(summaries) > planned:
            self.pending.update(summaries[-1].logs())
            if state.is_world_process_zero and self.curriculum.scorer.progress:
                summaries[-1].print()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.curriculum.summaries:
            seconds = sum(summary.scoring.seconds for summary in self.curriculum.summaries[self._planned :])
            self.pending[f"{PREFIX}scoring_share"] = round(seconds / (time.perf_counter() - self._epoch_started), 4)
        self._discard_stale(args, state, control)
        self._epoch += 1
        self._steps_before = state.global_step
        self._batches = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        into_epoch = state.global_step - self._steps_before
        start = (into_epoch + self.curriculum.rescore.lag) * samples_per_step(args)
        self._note_progress(state)
        if self.curriculum.replan(_as_called(self.trainer), step=state.global_step, into_epoch=into_epoch, start=start):
            self.note_state(state)
            summary = self.curriculum.summaries[-1]
            self.pending.update(summary.logs())
            if state.is_world_process_zero and self.curriculum.scorer.progress:
                summary.print()
        self._discard_stale(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.curriculum.cycle.done()
        try:
            self.curriculum.save_run(output_of(args))
        except OSError as error:
            logger.warning("scores.parquet and plans.parquet cannot be written: %s", error)

    def finish(self) -> None:
        """Close what the taps have opened, however training ended."""
        self._open.close()

    def note_state(self, state: TrainerState) -> None:
        """Put plan and scores where the next checkpoint takes them from. All processes take part."""
        self.curriculum.merge_observed(_as_called(self.trainer))
        _entries(state)[STATE_ENTRY]["curriculum"] = self.curriculum.state_dict()

    @contextmanager
    def batch(self, inputs: Any, args: TrainingArguments, state: TrainerState) -> Iterator[None]:
        """Around the training on one batch: whose it is, what its samples weigh, and what is seen of them."""
        plan = self.curriculum.sampler.plan
        assert plan is not None
        # accelerate deals the batches out to the processes one by one
        place = (self._batches * args.world_size + args.process_index) * args.train_batch_size
        self._batches += 1
        batch = batch_of(inputs, plan, self.curriculum.dataset, place=place, epoch=self._epoch, step=state.global_step)
        for tap in self.taps:
            tap.before(batch)
        yield
        for tap in self.taps:
            tap.after(batch)

    def _note_progress(self, state: TrainerState) -> None:
        """Where in the plan the trainer is: what a resume checks the trainer's own count against."""
        into_epoch = state.global_step - self._steps_before
        places = into_epoch * samples_per_step(self.trainer.args)
        self.curriculum.progress(places)
        _entries(state)[STATE_ENTRY]["progress"] = {
            "step": state.global_step,
            "epoch": self._epoch,
            "into_epoch": into_epoch,
            "places": places,
        }

    def _discard_stale(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """A checkpoint about to be written over is no longer whole: without this, a kill would leave a mixture."""
        if control.should_save and args.should_save:
            stale = output_of(args) / f"checkpoint-{state.global_step}" / TRAINER_STATE
            stale.unlink(missing_ok=True)


def _files_of_a_checkpoint(trainer: Trainer) -> list[str]:
    """What the trainer's checkpoints have besides weights and trainer state, as far as it is the same everywhere.

    The trainer goes on without a word if they are missing, with another optimizer or other dropout.
    """
    args = trainer.args
    if args.save_only_model:
        return []
    if args.save_on_each_node and args.world_size > 1:
        return ["scheduler.pt"]
    several = args.world_size > 1
    files = [f"rng_state_{rank}.pth" for rank in range(args.world_size)] if several else ["rng_state.pth"]
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        files += ["optimizer.pt", "scheduler.pt"]
    return files


def _as_called(trainer: Trainer) -> nn.Module:
    """The model as the trainer calls it in training: wrapped, with its autocast."""
    return trainer.model_wrapped


def _entries(state: TrainerState) -> dict[str, Any]:
    """What is saved with the trainer's state. (Its annotation tells of the constructor's argument, a list.)"""
    return cast("dict[str, Any]", state.stateful_callbacks)
