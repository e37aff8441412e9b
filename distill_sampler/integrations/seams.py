"""The six methods of a trainer that `attach` wraps, each on the instance, and why.

1. `trainer._get_train_sampler`: the trainer draws samples from the curriculum's sampler.
2. `trainer.log`: the curriculum's numbers join the trainer's next log entry.
3. `trainer.train`: the checkpoint is checked before anything is loaded, and two runs never write to one folder.
4. `trainer.training_step`: taps are called before and after the training on every batch.
5. `trainer._save_checkpoint`: every checkpoint holds the scores observed so far.
6. `trainer._init_training_state`: training continues at the place in the plan that the checkpoint names.
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
    """What the wrappers call: the callback of an attached curriculum."""

    pending: dict[str, float]
    run: str

    def finish(self) -> None: ...
    def begin(self, state: TrainerState, *, max_steps: int, steps_per_epoch: int) -> tuple[int, int]: ...
    def note_state(self, state: TrainerState) -> None: ...
    def batch(self, inputs: Any, args: TrainingArguments, state: TrainerState) -> AbstractContextManager[None]: ...


def sample_through(trainer: Trainer, sampler: torch.utils.data.Sampler[int]) -> None:
    """Make the trainer draw its samples from `sampler`, out of the data set that it has now.

    When training starts, a trainer whose data set has been replaced since raises a ValueError.
    """
    planned = trainer.train_dataset

    def get_train_sampler(train_dataset: object = None) -> torch.utils.data.Sampler[int]:
        if trainer.train_dataset is not planned:
            raise ValueError(
                "trainer.train_dataset was replaced after attach. The curriculum plans the data set that the trainer "
                "had at attach, so the wrong samples would be trained on. Set train_dataset before attach, or make a "
                "new trainer and a new curriculum for the new data set."
            )
        return sampler

    trainer._get_train_sampler = get_train_sampler  # type: ignore[method-assign]


def log_through(trainer: Trainer, callback: Follower) -> None:
    """Add the pending numbers to the trainer's next training log entry.

    A separate call of `trainer.log` would flush the running means that SFTTrainer keeps between entries.
    """
    log = trainer.log

    def log_with_curriculum(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if not any(name.startswith("eval_") for name in logs):
            logs.update(callback.pending)
            callback.pending.clear()
        log(logs, *args, **kwargs)

    trainer.log = log_with_curriculum  # type: ignore[method-assign]


def train_through(trainer: Trainer, callback: Follower) -> None:
    """Check the checkpoint before the trainer loads it, and claim the output folder while it trains."""
    train = trainer.train

    def train_from_whole_checkpoint(
        resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            if trial is not None or not saves(trainer.args):
                # a hyperparameter search gives each trial its own folder
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
    """Let the callback decide where training begins: after how many epochs, and how many batches of the next one."""
    init_training_state = trainer._init_training_state

    def init_at_the_plans_place(max_steps: int, num_update_steps_per_epoch: int, *args: Any, **kwargs: Any) -> Any:
        init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        return callback.begin(trainer.state, max_steps=max_steps, steps_per_epoch=num_update_steps_per_epoch)

    trainer._init_training_state = init_at_the_plans_place  # type: ignore[method-assign]


def step_through(trainer: Trainer, callback: Follower) -> None:
    """Wrap the training on each batch in the callback's `batch`."""
    training_step = trainer.training_step

    def step_with_taps(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with callback.batch(inputs, trainer.args, trainer.state):
            return training_step(model, inputs, *args, **kwargs)

    trainer.training_step = step_with_taps  # type: ignore[method-assign]


def save_through(trainer: Trainer, callback: Follower) -> None:
    """Bring the curriculum's state up to date before every save of a checkpoint."""
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
