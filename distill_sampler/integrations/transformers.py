"""Hugging Face `Trainer` and everything built on it that leaves the order of samples to it, TRL's `SFTTrainer` first.

`attach` wires a curriculum into a trainer that has been constructed. It uses three seams and no subclass:

1. `trainer._get_train_sampler`, the trainer's one extension point for order, set on the instance;
2. a callback: `on_epoch_begin` comes before the epoch's data loader is iterated, so work done there takes effect in
   that very epoch. The curriculum's state goes into `state.stateful_callbacks`, which is saved with
   `trainer_state.json` and can be read again in `on_train_begin`;
3. `trainer.log`, wrapped on the instance, so that the curriculum's numbers travel in the trainer's own next line.
"""

from __future__ import annotations

import time
from typing import Any, Literal, cast

import torch.utils.data
import transformers
from packaging.version import Version
from rich.console import Console
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distill_sampler.curriculum import Curriculum
from distill_sampler.dataset import ScoredDataset
from distill_sampler.integrations.trl import is_sft_trainer, refuse_sft_settings, with_response_labels
from distill_sampler.summary import PREFIX

if Version(transformers.__version__) < Version("5.3"):
    raise ImportError(f"distill_sampler needs transformers 5.3 or later; {transformers.__version__} is installed.")

STATE_ENTRY = "distill_sampler"
"""Where the curriculum's state lies in `TrainerState.stateful_callbacks`."""


def attach(
    trainer: Trainer,
    curriculum: Curriculum,
    *,
    labels: str | None = "labels",
    score_end_marker: bool = False,
    unscorable: Literal["error", "drop"] = "error",
) -> None:
    """Let a curriculum decide what each epoch of this trainer trains on. Call it once, before `trainer.train()`.

    Works on the prepared `trainer.train_dataset` (after tokenisation, truncation and dropped rows), with columns like
    prompt ids and teachers still in it. What is scored is what is trained on, less end-of-turn markers; where the
    trainer trains on prompts too (`messages` without `assistant_only_loss`, `completion_only_loss=False`), the
    responses are found through the chat template, and only they are scored.

    Args:
        trainer: a `transformers.Trainer` or `trl.SFTTrainer`.
        curriculum: what to score and how to plan.
        labels: column of the prepared data set with the labels. None: every token is trained on.
        score_end_marker: score the end-of-turn marker like a token of the response. The papers do not.
        unscorable: what to do about rows without a response token: `"error"` or `"drop"` (never train on them).

    Raises:
        ValueError: the trainer's settings rule out a curriculum, the data set has no such rows or columns; the
            message names the argument and the cure.
    """
    _refuse_settings(trainer)
    rows: Any = trainer.train_dataset
    if is_sft_trainer(trainer) and labels == "labels" and "labels" in rows.column_names:
        rows, labels = with_response_labels(trainer, rows)
    dataset = ScoredDataset(
        rows,
        labels=labels,
        end_token_ids=() if score_end_marker else end_token_ids(trainer.processing_class, trainer.model),
        unscorable=unscorable,
    )
    sampler = curriculum.bind(dataset)
    callback = CurriculumCallback(trainer, curriculum)

    def get_train_sampler(train_dataset: object = None) -> torch.utils.data.Sampler[int]:
        return sampler

    trainer._get_train_sampler = get_train_sampler  # type: ignore[method-assign]
    trainer.add_callback(callback)
    _log_through(trainer, callback)


class CurriculumCallback(TrainerCallback):
    """Tells the curriculum when an epoch begins, and keeps its state in the trainer's. Made by `attach`."""

    def __init__(self, trainer: Trainer, curriculum: Curriculum) -> None:
        self.trainer = trainer
        self.curriculum = curriculum
        self.pending: dict[str, float] = {}
        """Numbers for the trainer's next line of training logs."""
        self._epoch_started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        entry = _entries(state).get(STATE_ENTRY)
        if state.global_step == 0:
            self.curriculum.reset()
        elif entry is None:
            raise ValueError(
                "This checkpoint was written without a curriculum, so the order of its epoch is not known. Start a new "
                "run from its weights (model=<checkpoint folder>, without resume_from_checkpoint)."
            )
        else:
            self.curriculum.load_state_dict(entry)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch_started = time.perf_counter()
        summaries = self.curriculum.summaries
        planned = len(summaries)
        # after a resume the state's epoch has a fraction; the epoch keeps the plan that came with the checkpoint
        epoch = int(state.epoch or 0)
        self.curriculum.start_epoch(epoch, _as_called(self.trainer), step=state.global_step)
        _entries(state)[STATE_ENTRY] = self.curriculum.state_dict()
        if len(summaries) > planned:
            self.pending.update(summaries[-1].logs())
            if state.is_world_process_zero and self.curriculum.scorer.progress:
                Console(stderr=True).print("\n", summaries[-1].table(), sep="")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.curriculum.summaries:
            seconds = self.curriculum.summaries[-1].scoring_seconds
            self.pending[f"{PREFIX}scoring_share"] = round(seconds / (time.perf_counter() - self._epoch_started), 4)


def end_token_ids(tokenizer: Any, model: nn.Module | None) -> tuple[int, ...]:
    """The tokens that end a turn, by the tokenizer, the generation configuration and the chat template.

    For ChatML models `<|im_end|>`, for Llama 3 `<|eot_id|>` and `<|end_of_text|>`, and so on: found, not listed.
    """
    found: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for source in (tokenizer, generation):
        token_ids = getattr(source, "eos_token_id", None)
        found.update([token_ids] if isinstance(token_ids, int) else token_ids or [])
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rendered = tokenizer.apply_chat_template(turn, tokenize=False)
        tail = tokenizer(rendered[rendered.rindex("b") + 1 :], add_special_tokens=False)["input_ids"]
        found.update(token for token in tail[:1] if token in tokenizer.all_special_ids)
    return tuple(sorted(found))


def _refuse_settings(trainer: Trainer) -> None:
    """One sentence for each setting under which a curriculum could not keep its promises."""
    args = trainer.args
    if "_get_train_sampler" in vars(trainer):
        raise ValueError("A sampler is already attached to this trainer. Call attach once for each trainer.")
    if type(trainer)._get_train_sampler is not Trainer._get_train_sampler:
        raise ValueError(
            f"{type(trainer).__name__} brings its own sampler, which a curriculum would replace. attach works with "
            "Trainer, SFTTrainer and subclasses that leave _get_train_sampler alone."
        )
    if trainer.train_dataset is None:
        raise ValueError("The trainer has no train_dataset to choose from. Pass train_dataset= to the trainer.")
    if isinstance(trainer.train_dataset, torch.utils.data.IterableDataset):
        raise ValueError(
            "train_dataset is an IterableDataset: its rows have no numbers, so they cannot be chosen or ordered. Load "
            "it without streaming=True, or materialise it with Dataset.from_generator."
        )
    strategy = args.train_sampling_strategy
    if strategy != "random":
        raise ValueError(
            f"train_sampling_strategy='{strategy}' and a curriculum both decide the order. Leave it at 'random' and "
            "put the order you want into the curriculum's policies."
        )
    if args.ignore_data_skip:
        raise ValueError(
            "ignore_data_skip=True would start an epoch's plan from its beginning after a resume, training some "
            "samples twice and others never. Leave it at False."
        )
    for name in ("dispatch_batches", "split_batches"):
        if getattr(args.accelerator_config, name):
            raise ValueError(
                f"accelerator_config.{name}=True deals out batches in another order than planned. Leave it at False."
            )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True restarts training with another batch size in the middle of an epoch's plan. Set "
            "per_device_train_batch_size to what fits."
        )
    if args.world_size > 1:
        raise ValueError(
            f"This run has {args.world_size} processes; attach works with one process so far. Launch it with one."
        )
    if is_sft_trainer(trainer):
        refuse_sft_settings(trainer)


def _as_called(trainer: Trainer) -> nn.Module:
    """The model as the trainer calls it in training: wrapped, with its autocast."""
    return trainer.model_wrapped


def _entries(state: TrainerState) -> dict[str, Any]:
    """What is saved with the trainer's state. (Its annotation tells of the constructor's argument, a list.)"""
    return cast("dict[str, Any]", state.stateful_callbacks)


def _log_through(trainer: Trainer, callback: CurriculumCallback) -> None:
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


__all__ = ["CurriculumCallback", "attach", "end_token_ids"]
