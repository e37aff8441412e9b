"""The callback that `attach` adds: it starts the curriculum's epochs, keeps its state in the trainer's, feeds the taps.

`on_epoch_begin` comes before the epoch's data loader is iterated, so work done there takes effect in that very epoch.
The state goes into `state.stateful_callbacks`, which is saved with `trainer_state.json` and can be read again in
`on_train_begin`.
"""

from __future__ import annotations

import logging
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
from distill_sampler.integrations.refusals import samples_per_step
from distill_sampler.integrations.resuming import Place, continue_schedule, place_in, say_what_is_lost
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
        self._steps_per_epoch = 0
        self._resumed = Place()
        self._steps_before = 0
        """Optimizer steps of the epochs before this one."""
        self._batches = 0
        """Batches of this epoch that this process has trained on."""
        self._epoch_started = 0.0
        self._planned = 0
        """Plans made before this epoch."""

    def begin(self, state: TrainerState, *, max_steps: int, steps_per_epoch: int) -> tuple[int, int]:
        """Start the run, or continue the one that the checkpoint is of.

        Args:
            state: the trainer's, with the checkpoint's entry if there is one.
            max_steps: of the whole run, as the trainer counts them now.
            steps_per_epoch: the same.

        Returns:
            The first epoch to train, and how many of its batches each process must skip.

        Raises:
            ValueError: the checkpoint has no entry of a curriculum, or one of another run.
        """
        args = self.trainer.args
        self._steps_per_epoch = steps_per_epoch
        self._resumed = Place()
        self.curriculum.keep(output_of(args), run=self.run, write=state.is_world_process_zero)
        if state.global_step == 0:
            self.curriculum.reset()
        else:
            entry = _entries(state).get(STATE_ENTRY)
            if entry is None:
                raise ValueError(
                    "This checkpoint was written without a curriculum, so the order of its epoch is not known. Start a "
                    "new run from its weights (model=<checkpoint folder>, without resume_from_checkpoint)."
                )
            progress = entry["progress"]
            self.curriculum.load_state_dict(
                entry["curriculum"], accept_changes=self._accept_changes, epoch_over=progress.get("over", False)
            )
            self.curriculum.progress(progress["places"])
            self._resumed = place = place_in(
                entry, self.curriculum.sampler, args, max_steps=max_steps, steps_per_epoch=steps_per_epoch
            )
            if state.is_world_process_zero:
                say_what_is_lost(entry, args)
            if args.max_steps <= 0:
                state.max_steps = state.global_step + max_steps - place.epoch * steps_per_epoch - place.into_epoch
        self._epoch = self._resumed.epoch
        self._steps_before = state.global_step - self._resumed.into_epoch
        self._batches = self._resumed.into_epoch * args.gradient_accumulation_steps
        return self._epoch, self._batches

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._num_epochs = state.num_train_epochs
        step = self._resumed.schedule_step
        if step is not None and _entries(state)[STATE_ENTRY]["files"]:  # else the schedule starts anew
            continue_schedule(kwargs["lr_scheduler"], step)
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
        if control.should_epoch_stop and not control.should_training_stop:
            _entries(state)[STATE_ENTRY]["progress"]["over"] = True
        self._discard_stale(args, state, control)
        self._epoch += 1
        self._steps_before = state.global_step
        self._batches = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        into_epoch = state.global_step - self._steps_before
        start = self._position(into_epoch + self.curriculum.rescore.lag)
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
        place += self.curriculum.sampler.shift
        self._batches += 1
        batch = batch_of(inputs, plan, self.curriculum.dataset, place=place, epoch=self._epoch, step=state.global_step)
        for tap in self.taps:
            tap.before(batch)
        yield
        for tap in self.taps:
            tap.after(batch)

    def _position(self, into_epoch: int) -> int:
        """How many samples of the plan are trained on after so many optimizer steps of the epoch."""
        return self.curriculum.sampler.shift + into_epoch * samples_per_step(self.trainer.args)

    def _note_progress(self, state: TrainerState) -> None:
        """Where in the plan the trainer is, and a resume continues."""
        into_epoch = state.global_step - self._steps_before
        places = self._position(into_epoch)
        self.curriculum.progress(places)
        _entries(state)[STATE_ENTRY]["progress"] = {
            "step": state.global_step,
            "epoch": self._epoch,
            "places": places,
            "over": into_epoch == self._steps_per_epoch,
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
