"""The wrappers around a trainer's methods, all of them set on the instance.

1. `trainer._get_train_sampler` is the trainer's one extension point for order.
2. `trainer.log`: the curriculum's numbers travel in the trainer's own next line.
3. `trainer.train`: a checkpoint is known to be whole before anything is loaded, and two runs never write to one folder.
4. `trainer.training_step`: taps hear of every batch, before its forward and after its backward pass.
5. `trainer._save_checkpoint`: what training has shown so far is in every checkpoint.
6. `trainer._init_training_state`: training continues at the place of the plan that the checkpoint names.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch.utils.data
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments

from distill_sampler.distributed import Ranks
from distill_sampler.integrations.checkpoints import checkpoint_to_resume, claimed, entry_of, new_run, read_state


class Follower(Protocol):
    """What the wrappers tell: the callback of an attached curriculum."""

    pending: dict[str, float]
    run: str

    def finish(self) -> None: ...
    def begin(self, state: TrainerState, *, max_steps: int, steps_per_epoch: int) -> tuple[int, int]: ...
    def note_state(self, state: TrainerState) -> None: ...
    def batch(self, inputs: Any, args: TrainingArguments, state: TrainerState) -> AbstractContextManager[None]: ...


def sample_through(trainer: Trainer, sampler: torch.utils.data.Sampler[int]) -> None:
    """Have the trainer draw its samples from this sampler, out of the data set that it has now.

    Raises:
        ValueError: when training starts, if the trainer has another data set by then.
    """
    planned = trainer.train_dataset

    def get_train_sampler(train_dataset: object = None) -> torch.utils.data.Sampler[int]:
        if trainer.train_dataset is not planned:
            raise ValueError(
                "trainer.train_dataset was replaced after attach. The curriculum plans the data set that it was "
                "attached to, so other samples would be trained on. Give the trainer its data set before attach, or "
                "make a new trainer and a new curriculum for this one."
            )
        return sampler

    trainer._get_train_sampler = get_train_sampler  # type: ignore[method-assign]


def log_through(trainer: Trainer, callback: Follower) -> None:
    """Add the pending numbers to the trainer's next line of training logs.

    A call of our own would flush the running means that SFTTrainer keeps between lines.
    """
    log = trainer.log

    def log_with_curriculum(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if not any(name.startswith("eval_") for name in logs):
            logs.update(callback.pending)
            callback.pending.clear()
        log(logs, *args, **kwargs)

    trainer.log = log_with_curriculum  # type: ignore[method-assign]


def train_through(trainer: Trainer, callback: Follower) -> None:
    """Look at the checkpoint before the trainer does, and hold the output folder while it trains."""
    train = trainer.train

    def train_from_whole_checkpoint(
        resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            if trial is not None or not saves(trainer.args):
                # a search gives each trial a folder of its own
                return train(resume_from_checkpoint, trial, *args, **kwargs)
            output = output_of(trainer.args)
            with claimed(output, write=trainer.is_world_process_zero()) as claim:
                checkpoint = checkpoint_to_resume(resume_from_checkpoint, output, claim.run)
                step = 0
                callback.run = new_run()
                if checkpoint is not None:
                    state = read_state(checkpoint)
                    step = state["global_step"]
                    callback.run = (entry_of(state) or {}).get("run") or callback.run
                Ranks.current(trainer.args.device).require_equal(f"{step:012x}", "checkpoint to resume from")
                claim.take_over(callback.run)
                return train(None if checkpoint is None else str(checkpoint), trial, *args, **kwargs)
        finally:
            callback.finish()

    trainer.train = train_from_whole_checkpoint  # type: ignore[method-assign]


def begin_through(trainer: Trainer, callback: Follower) -> None:
    """Have the callback say where training begins: after how many epochs, and batches of the next one."""
    init_training_state = trainer._init_training_state

    def init_at_the_plans_place(max_steps: int, num_update_steps_per_epoch: int, *args: Any, **kwargs: Any) -> Any:
        init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        return callback.begin(trainer.state, max_steps=max_steps, steps_per_epoch=num_update_steps_per_epoch)

    trainer._init_training_state = init_at_the_plans_place  # type: ignore[method-assign]


def step_through(trainer: Trainer, callback: Follower) -> None:
    """Tell the callback of every batch, around the trainer's training on it."""
    training_step = trainer.training_step

    def step_with_taps(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with callback.batch(inputs, trainer.args, trainer.state):
            return training_step(model, inputs, *args, **kwargs)

    trainer.training_step = step_with_taps  # type: ignore[method-assign]


def save_through(trainer: Trainer, callback: Follower) -> None:
    """Have what training has shown so far in every checkpoint, whoever asked for it."""
    save_checkpoint = trainer._save_checkpoint

    def save_with_state(*args: Any, **kwargs: Any) -> Any:
        callback.note_state(trainer.state)
        return save_checkpoint(*args, **kwargs)

    trainer._save_checkpoint = save_with_state  # type: ignore[method-assign]


def output_of(args: TrainingArguments) -> Path:
    """The trainer's output folder."""
    return Path(str(args.output_dir))


def saves(args: TrainingArguments) -> bool:
    """Whether the trainer writes checkpoints."""
    return args.save_strategy != "no"
