"""The methods of a trainer that `attach` wraps, each on the instance, and why.

1. `trainer._get_train_sampler`: the trainer draws samples from the curriculum's sampler.
2. `trainer.log`: the curriculum's numbers join the trainer's next log entry, and the last counts what was trained.
3. `trainer.train`: the checkpoint is checked before anything is loaded, and two runs never write to one folder.
4. `trainer._load_from_checkpoint`, `_load_optimizer_and_scheduler`, `_load_scaler`: a checkpoint that fails to load is
   passed over. The random state is tried there too, because the trainer loads it only after training has begun.
5. `trainer.training_step`: taps are called before and after the training on every batch.
6. `trainer._save_checkpoint`: every checkpoint holds the plan and the scores, and gets a manifest.
7. `trainer._load_best_model`: the best checkpoint is compared with its manifest.
8. `trainer._init_training_state`: training continues at the place in the plan that the checkpoint names.
9. `trainer.compute_loss`: objectives look at each training batch and add to its loss.
10. `trainer._get_dataloader`: the trainer reads packs (`packs.py`).
"""

from __future__ import annotations

import os
import random
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch.utils.data
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from transformers import Trainer, TrainerState, TrainingArguments

from distill_sampler.distributed import Ranks
from distill_sampler.integrations.checkpoints import (
    Claim,
    Readers,
    Unloadable,
    checkpoint_to_resume,
    claimed,
    entry_of,
    last_whole,
    new_run,
    read_state,
    why_damaged,
)
from distill_sampler.integrations.versions import BEGINS_ANYWHERE, BeginsInLoop, deactivate_neftune
from distill_sampler.objectives.hidden_hints import require_sizes_of_projections
from distill_sampler.objectives.places import IGNORED
from distill_sampler.protocols import Objective, ObjectiveTap

FAILURES = (Exception, CheckpointException)
"""What saving and loading may raise. The error of FSDP's checkpoints is not an `Exception`."""


class Follower(Protocol):
    """What the wrappers call: the callback of an attached curriculum."""

    run: str
    compares: bool
    trained: int

    def finish(self) -> None: ...
    def begin(
        self, state: TrainerState, checkpoint: Path | None, output: Path, *, max_steps: int, steps_per_epoch: int
    ) -> tuple[int, int]: ...
    def saving(self, checkpoint: Path) -> None: ...
    def saved(self, checkpoint: Path) -> None: ...
    def numbers(self) -> Mapping[str, float]: ...
    def batch(self, inputs: Any, args: TrainingArguments, state: TrainerState) -> AbstractContextManager[None]: ...


def sample_through(trainer: Trainer, sampler: torch.utils.data.Sampler[Any]) -> None:
    """Make the trainer draw its samples from `sampler`, out of the data set that it has now.

    When training starts, a trainer whose data set has been replaced since raises a ValueError.
    """
    planned = trainer.train_dataset

    def get_train_sampler(train_dataset: object = None) -> torch.utils.data.Sampler[Any]:
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
        # the trainer's own entries, which every process makes: the numbers are gathered from all of them
        if {"loss", "train_runtime"} & logs.keys():
            logs.update(callback.numbers())
        if "train_samples_per_second" in logs:  # the trainer counts the candidates
            logs["train_samples_per_second"] = round(callback.trained / logs["train_runtime"], 3)
        log(logs, *args, **kwargs)

    trainer.log = log_with_curriculum  # type: ignore[method-assign]


def train_through(trainer: Trainer, callback: Follower) -> None:
    """Check the checkpoint before the trainer loads it, and claim the output folder while it trains."""
    train = trainer.train

    def train_from_whole_checkpoint(
        resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            if trial is not None:  # of a hyperparameter search: a run of its own, in a folder of its own
                callback.run = Ranks.current(trainer.args.device).gather(new_run())[0]
                return train(resume_from_checkpoint, trial, *args, **kwargs)
            output = output_of(trainer.args)
            unloadable: dict[Path, str] = {}
            with claimed(output, write=trainer.is_world_process_zero()) as claim:
                while True:
                    readers = readers_of(trainer.args, compare=callback.compares)
                    checkpoint = checkpoint_to_resume(resume_from_checkpoint, output, claim.run, readers, unloadable)
                    callback.run = _run_of(checkpoint, readers)
                    entry = None if checkpoint is None else entry_of(read_state(checkpoint))
                    if entry is not None and "projections" in entry and trainer.model is not None:
                        require_sizes_of_projections(trainer.model, entry["projections"])
                    claim.take_over(callback.run)
                    try:
                        return train(None if checkpoint is None else str(checkpoint), trial, *args, **kwargs)
                    except Unloadable as error:
                        if checkpoint is None:  # nothing was loaded: the trainer failed to prepare
                            raise (error.__cause__ or error) from None
                        unloadable[checkpoint] = str(error)
                        if loads_together(trainer):
                            raise _offered_instead(checkpoint, claim, unloadable) from error
                        if trainer.neftune_noise_alpha is not None:  # the trainer will attach it again
                            deactivate_neftune(trainer)
        finally:
            callback.finish()

    trainer.train = train_from_whole_checkpoint  # type: ignore[method-assign]


def _run_of(checkpoint: Path | None, readers: Readers) -> str:
    """Identity of the run that a checkpoint is of, or of a new one."""
    state = {} if checkpoint is None else read_state(checkpoint)
    readers.ranks.require_equal(f"{state.get('global_step', 0):012x}", "checkpoint to resume from")
    return readers.ranks.gather((entry_of(state) or {}).get("run") or new_run())[0]


def _offered_instead(checkpoint: Path, claim: Claim, unloadable: dict[Path, str]) -> ValueError:
    """What to say where one process cannot tell the others that it failed: they wait for it inside of the loading."""
    found, _ = last_whole(checkpoint.parent, claim.run, unloadable=unloadable)
    return ValueError(
        f"{checkpoint} cannot be resumed from: {unloadable[checkpoint]}. "
        + (f"Resume from {found} with resume_from_checkpoint={str(found)!r}." if found else "No other one is whole.")
    )


def load_through(trainer: Trainer) -> None:
    """Have an error in the loading of a checkpoint raised as `Unloadable`, and on all processes."""
    load_optimizer = trainer._load_optimizer_and_scheduler

    def load_optimizer_and_try_random_state(checkpoint: str | None) -> None:
        load_optimizer(checkpoint)
        with random_state_kept():
            trainer._load_rng_state(checkpoint)

    trainer._load_optimizer_and_scheduler = load_optimizer_and_try_random_state  # type: ignore[method-assign]
    loaders = ["_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler"]
    if trainer.is_deepspeed_enabled and BEGINS_ANYWHERE:
        loaders.append("_prepare_for_training")  # DeepSpeed loads in there
    for name in loaders:
        setattr(trainer, name, _loading(trainer, getattr(trainer, name)))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random state afterwards, also after an error."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


def _loading(trainer: Trainer, load: Callable[..., Any]) -> Callable[..., Any]:
    def load_or_say_on_all(*args: Any, **kwargs: Any) -> Any:
        result, failure, reason = None, None, ""
        try:
            result = load(*args, **kwargs)
        except (Unloadable, MemoryError, torch.OutOfMemoryError):
            raise
        except FAILURES as error:
            failure, reason = error, f"loading it failed with {_short(error)}"
        if not loads_together(trainer):
            reason = next(filter(None, Ranks.current(trainer.args.device).gather(reason)), "")
        if reason:
            raise Unloadable(reason) from failure
        return result

    return load_or_say_on_all


def _short(error: BaseException) -> str:
    where = ""
    if isinstance(error, CheckpointException) and error.failures:  # its text is a traceback
        rank, (error, _) = next(iter(error.failures.items()))
        where = f" on process {rank}"
    return textwrap.shorten(f"{type(error).__name__}{where}: {error}", 200, placeholder=" …")


def loads_together(trainer: Trainer) -> bool:
    """Whether processes wait for each other inside of the loading, so that one which fails cannot tell the others."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def begin_through(trainer: Trainer, callback: Follower) -> None:
    """Let the callback decide where training begins: after how many epochs, and how many batches of the next one."""
    if not BEGINS_ANYWHERE:
        trainer.add_callback(BeginsInLoop(trainer, callback))
        return
    init_training_state = trainer._init_training_state

    def init_at_the_plans_place(
        max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume_from_checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)
        checkpoint = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        output = Path(trainer._get_output_dir(trial))
        return callback.begin(
            trainer.state, checkpoint, output, max_steps=max_steps, steps_per_epoch=num_update_steps_per_epoch
        )

    trainer._init_training_state = init_at_the_plans_place  # type: ignore[method-assign]


def step_through(trainer: Trainer, callback: Follower) -> None:
    """Wrap the training on each batch in the callback's `batch`."""
    training_step = trainer.training_step

    def step_with_taps(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with callback.batch(inputs, trainer.args, trainer.state):
            return training_step(model, inputs, *args, **kwargs)

    trainer.training_step = step_with_taps  # type: ignore[method-assign]


def loss_through(trainer: Trainer, objectives: Sequence[ObjectiveTap]) -> None:
    """Let objectives see each batch of training and add to its loss, normalised as the trainer normalises its own."""
    compute_loss = trainer.compute_loss

    def compute_with_objectives(
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        def host_loss() -> Any:
            return compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )

        if not model.training:
            return host_loss()
        labels = inputs.get("labels")
        for objective in objectives:
            objective.expect(inputs, progress=trainer.state.global_step / max(trainer.state.max_steps, 1))
        result = host_loss()
        loss = result[0] if return_outputs else result
        tokens = num_items_in_batch
        scale: Any = 1.0
        if tokens is None:
            assert labels is not None
            tokens = (labels[:, 1:] != IGNORED).sum().clamp(min=1)
        elif trainer.args.average_tokens_across_devices:
            scale = trainer.accelerator.num_processes
        for objective in objectives:
            loss = objective.added_to(loss, scale=scale / tokens)
        return (loss, *result[1:]) if return_outputs else loss

    trainer.compute_loss = compute_with_objectives  # type: ignore[method-assign]


def prepare_through(trainer: Trainer, objectives: Sequence[Objective]) -> None:
    """Let objectives add modules of their own to the student when training starts, and remove them when it ends.

    When training starts, a trainer whose optimizer was created before, without these modules, raises a ValueError; so
    does one that creates its student later (`model_init`).
    """
    train = trainer.train

    def train_with_additions(*args: Any, **kwargs: Any) -> Any:
        model = trainer.model
        assert model is not None
        before = len(list(model.parameters()))
        try:
            for objective in objectives:
                objective.prepare(model)
            added = len(list(model.parameters())) > before
            if added and trainer.is_fsdp_enabled and hasattr(model, "peft_config"):
                raise ValueError(
                    f"objective={objectives[0].name}: FSDP's checkpoints of an adapter do not hold the projections, so "
                    "a resume would lose them. Use DDP or DeepSpeed, train the whole student, or match layers of the "
                    "same width with projection='never'."
                )
            if added and trainer.model_init is not None:
                raise ValueError(
                    f"objective={objectives[0].name}: model_init= creates another student when training starts, which "
                    "lacks the projections. Give the trainer model= instead."
                )
            if added and trainer.optimizer is not None:
                raise ValueError(
                    f"objective={objectives[0].name}: the trainer already has an optimizer (optimizers=, or it was "
                    "trained before), which lacks the projections. Let a new trainer create its own optimizer."
                )
            return train(*args, **kwargs)
        finally:
            for objective in objectives:
                objective.withdraw(model)

    trainer.train = train_with_additions  # type: ignore[method-assign]


def save_through(trainer: Trainer, callback: Follower) -> None:
    """Tell the callback of every save of a checkpoint, whoever asked for it."""
    save_checkpoint = trainer._save_checkpoint

    def save_with_state(model: nn.Module, trial: Any = None, *args: Any, **kwargs: Any) -> Any:
        checkpoint = Path(trainer._get_output_dir(trial)) / f"checkpoint-{trainer.state.global_step}"
        try:
            callback.saving(checkpoint)
            result = save_checkpoint(model, trial, *args, **kwargs)
        except FAILURES as error:
            error.add_note(_after_a_failed_save(checkpoint, callback.run))
            raise
        callback.saved(checkpoint)
        return result

    trainer._save_checkpoint = save_with_state  # type: ignore[method-assign]


def _after_a_failed_save(checkpoint: Path, run: str) -> str:
    """What to do where a checkpoint cannot be saved: the note on the trainer's or torch's error."""
    output = checkpoint.parent
    free = f"The disk of {output} has {shutil.disk_usage(output).free / 1e6:,.0f} MB left. " if output.is_dir() else ""
    found, _ = last_whole(output, run, Readers(compare=False))
    instead = (
        f"The last whole checkpoint is {found}. Continue from it with trainer.train(resume_from_checkpoint=True)."
        if found
        else "No checkpoint of this run is whole, so it must start from the beginning."
    )
    return f"{checkpoint} could not be saved. {free}{instead}"


def best_through(trainer: Trainer, callback: Follower) -> None:
    """Compare the best checkpoint with its manifest before its weights become the model's.

    Raises:
        ValueError: when training ends, if it is damaged.
    """
    load_best_model = trainer._load_best_model

    def load_what_was_saved() -> None:
        best = Path(str(trainer.state.best_model_checkpoint))
        if reason := why_damaged(best, readers_of(trainer.args, compare=callback.compares)):
            raise ValueError(
                f"load_best_model_at_end=True: {best} cannot be loaded: {reason}. Training itself has ended: load "
                "another checkpoint, or train on from the last with load_best_model_at_end=False."
            )
        load_best_model()

    trainer._load_best_model = load_what_was_saved  # type: ignore[method-assign]


def readers_of(args: TrainingArguments, *, compare: bool) -> Readers:
    """Who looks at the checkpoints of a trainer."""
    ranks, on_node = Ranks.current(args.device), None
    if args.save_on_each_node and ranks.world_size > 1:
        size = os.environ.get("LOCAL_WORLD_SIZE")
        on_node = Ranks(rank=args.local_process_index, world_size=int(size)) if size else Ranks()
    return Readers(ranks=ranks, sharing=on_node, compare=compare)


def output_of(args: TrainingArguments) -> Path:
    """The trainer's output folder."""
    return Path(str(args.output_dir))
