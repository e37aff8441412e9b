"""The callback that `attach` adds: starts the curriculum's epochs, saves its state with the trainer's, calls the taps.

The trainer calls `on_epoch_begin` before it iterates over the epoch's data loader, so a plan made there applies to that
epoch. The curriculum's state goes into `state.stateful_callbacks`, which the trainer saves in `trainer_state.json`,
with its arrays in a file beside it (`artifacts/state.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy.typing as npt
import torch.utils.data
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distill_sampler.artifacts.manifest import Manifests
from distill_sampler.artifacts.state import as_state, content_of, read_arrays, write_arrays
from distill_sampler.curriculum import Curriculum
from distill_sampler.distributed import Ranks
from distill_sampler.integrations.batches import batch_of
from distill_sampler.integrations.checkpoints import FOLDER, STATE_ENTRY, TRAINER_STATE, new_run
from distill_sampler.integrations.live_report import LiveReport
from distill_sampler.integrations.refusals import samples_per_step
from distill_sampler.integrations.resuming import Place, continue_schedule, place_in, say_what_is_lost
from distill_sampler.integrations.sample_log import SampleLog
from distill_sampler.integrations.seams import output_of
from distill_sampler.integrations.trackers import numbers_of, show_plan, trackers_of_callbacks
from distill_sampler.objectives.hidden_hints import projections_of, restore_projections, sizes_of_projections
from distill_sampler.planning.summary import PREFIX, Logs
from distill_sampler.protocols import Tap

logger = logging.getLogger(__name__)

ABSENT = object()
"""In place of the value of an attribute that the trainer did not have of its own."""


class CurriculumCallback(TrainerCallback):
    """Tells the curriculum when an epoch begins, and saves its state with the trainer's. Made by `attach`."""

    def __init__(
        self,
        trainer: Trainer,
        curriculum: Curriculum,
        *,
        report: LiveReport,
        taps: Sequence[Tap] = (),
        accept_changes: bool = False,
        manifests: bool = True,
        logs: Logs = "few",
    ) -> None:
        self.trainer = trainer
        self.curriculum = curriculum
        self.taps = list(taps)
        """Called before and after the training on each batch."""
        self.pending: dict[str, float] = {}
        """Numbers to add to the trainer's next training log entry."""
        self.run = new_run()
        """Identity of the run. It is in every checkpoint and survives restarts."""
        self.compares = manifests
        """Whether checkpoints get manifests, and are compared with them."""
        self._manifests = Manifests(write=trainer.args.should_save)
        self.replaced: dict[str, tuple[Any, Any]] = {}
        """By name, the trainer's attributes that `attach` set, and what was there before (or `ABSENT`)."""
        self.training = False
        self._accept_changes = accept_changes
        self._report = report
        self._logs: Logs = logs
        self._open_taps = ExitStack()
        """The contexts of the open taps, with their hooks and files."""
        self._epoch = 0
        self._output = output_of(trainer.args)
        self._num_epochs: int | None = None
        self._steps_per_epoch = 0
        self._resumed = Place()
        self._steps_before = 0
        """Optimizer steps of the epochs before this one."""
        self._batches = 0
        """Batches of this epoch that this process has trained on."""
        self._epoch_started = 0.0
        self._planned = 0
        """Number of plans made before this epoch."""
        self.trained = 0
        """Samples that all processes have trained on since `trainer.train` was called."""
        self._place = 0
        """How many places of the plan have been trained on."""

    def begin(
        self, state: TrainerState, checkpoint: Path | None, output: Path, *, max_steps: int, steps_per_epoch: int
    ) -> tuple[int, int]:
        """Start a new run, or continue the checkpoint's.

        Args:
            state: the trainer's state. On a resume it holds the curriculum's entry from the checkpoint.
            checkpoint: the folder to resume from.
            output: where checkpoints and the record go: the trainer's output folder, or the one of a search's trial.
            max_steps: optimizer steps of the whole run, as the trainer computes them now.
            steps_per_epoch: optimizer steps of an epoch, as the trainer computes them now.

        Returns:
            The first epoch to train, and how many of its batches each process must skip.

        Raises:
            ValueError: the checkpoint was written without a curriculum, or with a different one.
        """
        args = self.trainer.args
        self._steps_per_epoch = steps_per_epoch
        self._resumed = Place()
        self.trained = 0
        self._output = output
        earlier = None if checkpoint is None else checkpoint.resolve().parent
        self.curriculum.keep(output, run=self.run, write=state.is_world_process_zero, earlier=earlier)
        for tap in self.taps:
            if isinstance(tap, SampleLog):
                tap.begin(output / FOLDER, self.run, earlier=None if earlier is None else earlier / FOLDER)
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
            arrays = {} if checkpoint is None else read_arrays(checkpoint)
            if "adapter" in entry:
                restore_projections(_wrapped_model(self.trainer), content_of(entry["adapter"], arrays)["projections"])
            self.curriculum.load_state_dict(
                entry["curriculum"],
                arrays,
                accept_changes=self._accept_changes,
                epoch_over=progress.get("over", False),
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
        self.training = True
        self._num_epochs = state.num_train_epochs
        step = self._resumed.schedule_step
        if step is not None and _entries(state)[STATE_ENTRY]["files"]:  # otherwise the schedule starts afresh
            continue_schedule(kwargs["lr_scheduler"], step)
        for tap in self.taps:
            self._open_taps.enter_context(tap.open(_wrapped_model(self.trainer), step=state.global_step))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._manifests.begin(Ranks.current(args.device))
        self._epoch_started = time.perf_counter()
        summaries = self.curriculum.summaries
        planned = self._planned = len(summaries)
        # after a resume inside an epoch, this keeps the checkpoint's plan
        self.curriculum.start_epoch(
            self._epoch, _wrapped_model(self.trainer), step=state.global_step, num_epochs=self._num_epochs
        )
        _entries(state)[STATE_ENTRY] = {
            "run": self.run,
            "world_size": args.world_size,
            "samples_per_step": samples_per_step(args),
            "files": _files_of_a_checkpoint(self.trainer),
        }
        self._note_progress(state)
        if args.dataloader_persistent_workers and self._epoch > 0:
            # An uninterrupted run still has its workers here. A resumed run starts new ones, and would draw their seed
            # from the random state that dropout uses.
            kwargs["train_dataloader"].base_dataloader.generator = torch.Generator().manual_seed(args.seed)
        if len(summaries) > planned:
            self._tell_of_plan(state)
        if state.is_world_process_zero:
            self._report.epoch_begins(self._output, self._epoch, self._num_epochs, step=state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.curriculum.summaries:
            seconds = sum(summary.scoring.seconds for summary in self.curriculum.summaries[self._planned :])
            self.pending[f"{PREFIX}scoring_share"] = round(seconds / (time.perf_counter() - self._epoch_started), 4)
        if control.should_epoch_stop and not control.should_training_stop:
            _entries(state)[STATE_ENTRY]["progress"]["over"] = True
        self._epoch += 1
        self._steps_before = state.global_step
        self._batches = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._manifests.begin(Ranks.current(args.device))
        if self.curriculum.sampler.handed_out == 0:
            raise ValueError(
                f"{type(self.trainer).__name__} has read a batch, but not from the plan: its data loaders do not draw "
                "from trainer._get_train_sampler. Choose before training with distill-sampler select."
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        into_epoch = state.global_step - self._steps_before
        start = self._places(into_epoch + self.curriculum.rescore.lag)
        before = self._place
        self._note_progress(state)
        self.trained += self._place - before
        model = _wrapped_model(self.trainer)
        if self.curriculum.replan(model, step=state.global_step, into_epoch=into_epoch, start=start):
            self._tell_of_plan(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._manifests.begin(Ranks.current(args.device))
        if state.is_world_process_zero:
            self.curriculum.cycle.done(self._output)
            self._report.training_ends(self._output)

    def finish(self) -> None:
        """Close the taps, whether or not training ended in an error, and wait for the last manifest."""
        self.training = False
        self._open_taps.close()
        self._manifests.wait()

    def numbers(self) -> dict[str, float]:
        """Numbers for the trainer's next training log entry. All processes must call it."""
        numbers, self.pending = self.pending, {}
        return numbers | numbers_of(self.taps, Ranks.current(self.trainer.args.device))

    def saving(self, checkpoint: Path) -> None:
        """Write the plan and the scores into a checkpoint, before the trainer does. All processes must call it.

        The arrays are a file in the checkpoint's folder. Their hashes, and everything else, are in the trainer's state,
        which the trainer writes last.
        """
        args, state, control = self.trainer.args, self.trainer.state, self.trainer.control
        if self.curriculum.observe:
            self.curriculum.merge_observed(_wrapped_model(self.trainer))
        if control.should_epoch_stop and not control.should_training_stop:  # a callback ends the epoch with this step
            _entries(state)[STATE_ENTRY]["progress"]["over"] = True
        self._manifests.saving(checkpoint, Ranks.current(args.device))
        if args.should_save:
            # A folder that is written to again is incomplete until the end. Otherwise a kill while it is saved would
            # leave old and new files that look complete.
            (checkpoint / TRAINER_STATE).unlink(missing_ok=True)
            sampler = self.curriculum.sampler
            arrays: dict[str, npt.NDArray[Any]] = {}
            # of the plan as it is now: packs that are planned anew hold other numbers of samples
            _entries(state)[STATE_ENTRY]["places_per_epoch"] = sampler.places(sampler.shift + len(sampler))
            _entries(state)[STATE_ENTRY]["curriculum"] = self.curriculum.state_dict(arrays)
            sizes = sizes_of_projections(_wrapped_model(self.trainer))
            _entries(state)[STATE_ENTRY]["projections"] = sizes
            if hasattr(self.trainer.model, "peft_config"):  # whose checkpoint holds nothing but the adapter
                projections = projections_of(_wrapped_model(self.trainer))
                _entries(state)[STATE_ENTRY]["adapter"] = as_state({"projections": projections}, arrays)
            write_arrays(arrays, checkpoint)

    def saved(self, checkpoint: Path) -> None:
        """This process has written its files of a checkpoint."""
        if self.compares:
            self._manifests.saved(checkpoint)

    @contextmanager
    def batch(self, inputs: Any, args: TrainingArguments, state: TrainerState) -> Iterator[None]:
        """Identify the samples of a batch, and call the taps before and after the training on it."""
        sampler = self.curriculum.sampler
        assert sampler.plan is not None
        # accelerate gives the batches to the processes in turn
        row = (self._batches * args.world_size + args.process_index) * args.train_batch_size + sampler.shift
        self._batches += 1
        batch = batch_of(
            inputs,
            sampler.plan,
            self.curriculum.dataset,
            place=sampler.places(row),
            stop=sampler.places(row + args.train_batch_size),
            epoch=self._epoch,
            step=state.global_step,
        )
        for tap in self.taps:
            tap.before(batch)
        yield
        for tap in self.taps:
            tap.after(batch)

    def _tell_of_plan(self, state: TrainerState) -> None:
        """The newest plan's numbers go into the next log entry, its table to the terminal and to trackers."""
        summary = self.curriculum.summaries[-1]
        self.pending.update(summary.logs(self._logs))
        if state.is_world_process_zero:
            show_plan(summary, trackers_of_callbacks(self.trainer.callback_handler.callbacks))
            if self.curriculum.scorer.progress:
                summary.print()

    def _places(self, into_epoch: int) -> int:
        """How many places of the plan have been trained on after `into_epoch` optimizer steps of the epoch."""
        sampler = self.curriculum.sampler
        return sampler.places(sampler.shift + into_epoch * samples_per_step(self.trainer.args))

    def _note_progress(self, state: TrainerState) -> None:
        """Put the trainer's place in the plan into its state. A resume continues there."""
        into_epoch = state.global_step - self._steps_before
        places = self._places(into_epoch)
        self._place = places
        self.curriculum.progress(places)
        _entries(state)[STATE_ENTRY]["progress"] = {
            "step": state.global_step,
            "epoch": self._epoch,
            "places": places,
            "over": into_epoch == self._steps_per_epoch,
        }


def _files_of_a_checkpoint(trainer: Trainer) -> list[str]:
    """The files that each of the trainer's checkpoints must have besides weights and trainer state.

    If one is missing, the trainer resumes without a warning, with a new optimizer or a different random state. Files
    whose names depend on the backend (DeepSpeed, FSDP) are not listed.
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


def _wrapped_model(trainer: Trainer) -> nn.Module:
    """The model as the trainer calls it in training: wrapped (DDP, DeepSpeed, FSDP) and under its autocast."""
    return trainer.model_wrapped


def _entries(state: TrainerState) -> dict[str, Any]:
    """The callbacks' states by name, saved with the trainer's state. (The annotation of transformers says list.)"""
    return cast("dict[str, Any]", state.stateful_callbacks)
