"""Hugging Face `Trainer` and everything built on it that leaves the order of samples to it, TRL's `SFTTrainer` first.

`attach` wires a curriculum into a trainer that has been constructed. It uses five seams and no subclass:

1. `trainer._get_train_sampler`, the trainer's one extension point for order, set on the instance;
2. a callback: `on_epoch_begin` comes before the epoch's data loader is iterated, so work done there takes effect in
   that very epoch. The curriculum's state goes into `state.stateful_callbacks`, which is saved with
   `trainer_state.json` and can be read again in `on_train_begin`;
3. `trainer.log`, wrapped on the instance, so that the curriculum's numbers travel in the trainer's own next line;
4. `trainer.train`, wrapped on the instance, so that a checkpoint is known to be whole before anything is loaded, and
   two runs do not write to one folder;
5. `trainer.training_step`, wrapped on the instance where batches must be told apart into their samples: for loss
   weights, for scores observed in training, for the sample log. What the plan has at a batch's place is compared with
   its tokens, so nothing travels through columns, collators or workers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch.utils.data
import transformers
from packaging.version import Version
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from distill_sampler.artifacts.run_folder import save_run
from distill_sampler.curriculum import Curriculum
from distill_sampler.dataset import ScoredDataset
from distill_sampler.distributed import Ranks
from distill_sampler.integrations.batches import batch_of
from distill_sampler.integrations.checkpoints import (
    FOLDER,
    STATE_ENTRY,
    TRAINER_STATE,
    checkpoint_to_resume,
    claimed,
    entry_of,
    new_run,
    read_state,
)
from distill_sampler.integrations.loss_weights import LossWeights
from distill_sampler.integrations.parallelism import refuse_parallelism
from distill_sampler.integrations.sample_log import SampleLog
from distill_sampler.integrations.sharding import whole_head
from distill_sampler.integrations.trl import is_sft_trainer, refuse_sft_settings, with_response_labels
from distill_sampler.planning.summary import PREFIX
from distill_sampler.reading.observer import Observer

if Version(transformers.__version__) < Version("5.3"):
    raise ImportError(f"distill_sampler needs transformers 5.3 or later; {transformers.__version__} is installed.")

logger = logging.getLogger(__name__)


def attach(
    trainer: Trainer,
    curriculum: Curriculum,
    *,
    labels: str | None = "labels",
    score_end_marker: bool = False,
    unscorable: Literal["error", "drop"] = "error",
    accept_changes: bool = False,
    sample_log: bool = False,
) -> None:
    """Let a curriculum decide what each epoch of this trainer trains on. Call it once, before `trainer.train()`.

    Works on the prepared `trainer.train_dataset` (after tokenisation, truncation and dropped rows), with columns like
    prompt ids and teachers still in it. What is scored is what is trained on, less end-of-turn markers; where the
    trainer trains on prompts too (`messages` without `assistant_only_loss`, `completion_only_loss=False`), the
    responses are found through the chat template, and only they are scored.

    When training ends, the scores and plans of the run are in its output folder (`scores.parquet`, `plans.parquet`):
    `distill-sampler report OUTPUT` draws them.

    Args:
        trainer: a `transformers.Trainer` or `trl.SFTTrainer`.
        curriculum: what to score and how to plan.
        labels: column of the prepared data set with the labels. None: every token is trained on.
        score_end_marker: score the end-of-turn marker like a token of the response. The papers do not.
        unscorable: what to do about rows without a response token: `"error"` or `"drop"` (never train on them).
        accept_changes: resume although metrics, policies or seed are not those that the checkpoint was written with.
            An epoch that was begun is trained to its end as planned; the changes take effect from the next. Another
            data set is accepted between epochs only.
        sample_log: record which samples each batch held, where the loss is computed, in the output folder
            (`distill_sampler/samples-R.jsonl`); `distill-sampler verify` compares it with the checkpoints.

    Raises:
        ValueError: the trainer's settings rule out a curriculum, the data set has no such rows or columns; the
            message names the argument and the cure.
    """
    _refuse_settings(trainer)
    args = trainer.args
    rows: Any = trainer.train_dataset
    if is_sft_trainer(trainer) and labels == "labels" and "labels" in rows.column_names:
        rows, labels = with_response_labels(trainer, rows)
    dataset = ScoredDataset(
        rows,
        labels=labels,
        end_token_ids=() if score_end_marker else end_token_ids(trainer.processing_class, trainer.model),
        unscorable=unscorable,
    )
    curriculum.use_tokenizer(trainer.processing_class)
    sampler = curriculum.bind(dataset)
    per_step = args.train_batch_size * args.world_size
    if args.world_size > 1 and curriculum.num_samples % per_step:
        logger.warning(
            "%d samples are no multiple of the %d that %d processes take at a time: accelerate completes the last "
            "batch with the first samples of the epoch. Curriculum(num_samples=%d) has that in the plan.",
            curriculum.num_samples,
            per_step,
            args.world_size,
            -(-curriculum.num_samples // per_step) * per_step,
        )
    _refuse_for(curriculum, args)
    callback = CurriculumCallback(trainer, curriculum, accept_changes=accept_changes, sample_log=sample_log)

    def get_train_sampler(train_dataset: object = None) -> torch.utils.data.Sampler[int]:
        return sampler

    trainer._get_train_sampler = get_train_sampler  # type: ignore[method-assign]
    trainer.add_callback(callback)
    _log_through(trainer, callback)
    _train_through(trainer, callback)
    if sample_log or curriculum.observe or curriculum.gives_weights:
        _step_through(trainer, callback)
    if curriculum.observe:
        _save_through(trainer, callback)


class CurriculumCallback(TrainerCallback):
    """Tells the curriculum when an epoch begins, and keeps its state in the trainer's. Made by `attach`."""

    def __init__(
        self, trainer: Trainer, curriculum: Curriculum, *, accept_changes: bool = False, sample_log: bool = False
    ) -> None:
        self.trainer = trainer
        self.curriculum = curriculum
        self.pending: dict[str, float] = {}
        """Numbers for the trainer's next line of training logs."""
        self.run = new_run()
        """Identity of the run, from its first start to its end, in every checkpoint."""
        self._accept_changes = accept_changes
        self._sample_log = sample_log
        self._log: SampleLog | None = None
        self._open = ExitStack()
        """What training has opened: hooks and files."""
        self._observer: Observer | None = None
        self._weights: LossWeights | None = None
        self._epoch = 0
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
        if state.global_step == 0:
            self.curriculum.reset()
        elif entry is None:
            raise ValueError(
                "This checkpoint was written without a curriculum, so the order of its epoch is not known. Start a new "
                "run from its weights (model=<checkpoint folder>, without resume_from_checkpoint)."
            )
        else:
            _check_position(entry, args, self._epoch, into_epoch)
            self.curriculum.load_state_dict(
                entry["curriculum"], accept_changes=self._accept_changes, epoch_over=into_epoch == 0
            )
        folder = _output(args) / FOLDER
        self.curriculum.journal = folder / "scoring.journal" if _saves(args) else None
        if self._sample_log:
            self._log = SampleLog(folder / f"samples-{args.process_index}.jsonl", step=state.global_step)
            self._open.callback(self._log.close)
        model = _as_called(self.trainer)
        if self.curriculum.gives_weights:
            self._weights = self._open.enter_context(LossWeights(model))
        if self.curriculum.observe:
            observer = Observer(
                model,
                self.curriculum.dataset,
                list(self.curriculum.metrics.values()),
                ties=self.curriculum.scorer.ties,
                whole=whole_head,
            )
            self._observer = self._open.enter_context(observer)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch_started = time.perf_counter()
        summaries = self.curriculum.summaries
        planned = self._planned = len(summaries)
        # after a resume, the begun epoch keeps the plan that came with the checkpoint
        self.curriculum.start_epoch(self._epoch, _as_called(self.trainer), step=state.global_step)
        _entries(state)[STATE_ENTRY] = {
            "run": self.run,
            "world_size": args.world_size,
            "samples_per_step": _samples_per_step(args),
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
        start = (into_epoch + self.curriculum.rescore.lag) * _samples_per_step(args)
        if self.curriculum.replan(_as_called(self.trainer), step=state.global_step, into_epoch=into_epoch, start=start):
            self.note_state(state)
            summary = self.curriculum.summaries[-1]
            self.pending.update(summary.logs())
            if state.is_world_process_zero and self.curriculum.scorer.progress:
                summary.print()
        self._note_progress(state)
        self._discard_stale(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self.curriculum.journal is not None:
            self.curriculum.journal.unlink(missing_ok=True)  # no interrupted pass is left to take up
        if self.curriculum.plans:
            try:
                save_run(self.curriculum, _output(args))
            except OSError as error:
                logger.warning("The scores and plans of the run cannot be kept for reports: %s", error)

    def finish(self) -> None:
        """Close what training has opened, however it ended."""
        self.curriculum.journal = None
        self._open.close()
        self._log = self._observer = self._weights = None

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
        if self._log is not None:
            self._log.batch(
                inputs, plan, self.curriculum.dataset, step=state.global_step + 1, epoch=self._epoch, start=place
            )
        if self._weights is None and self._observer is None:
            yield
            return
        batch = batch_of(inputs, plan, self.curriculum.dataset, place)
        if self._weights is not None:
            self._weights.expect(batch, inputs["input_ids"].shape)
        if self._observer is not None:
            self._observer.expect(batch)
        yield
        if self._weights is not None:
            self._weights.done()
        if self._observer is not None:
            self.curriculum.store.observed.write(*self._observer.take(), step=state.global_step)

    def _note_progress(self, state: TrainerState) -> None:
        """Where in the plan the trainer is: what a resume checks the trainer's own count against."""
        into_epoch = state.global_step - self._steps_before
        self.curriculum.progress(into_epoch * _samples_per_step(self.trainer.args))
        _entries(state)[STATE_ENTRY]["progress"] = {
            "step": state.global_step,
            "epoch": self._epoch,
            "into_epoch": into_epoch,
        }

    def _discard_stale(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """A checkpoint about to be written over is no longer whole: without this, a kill would leave a mixture."""
        if control.should_save and args.should_save:
            stale = _output(args) / f"checkpoint-{state.global_step}" / TRAINER_STATE
            stale.unlink(missing_ok=True)


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
    if args.world_size > 1 and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ValueError(
            f"The trainer sees {args.n_gpu} GPUs in one process and would use DataParallel. Launch the script with "
            "accelerate launch, or show it one GPU with CUDA_VISIBLE_DEVICES."
        )
    refuse_parallelism(trainer.accelerator)
    if is_sft_trainer(trainer):
        refuse_sft_settings(trainer)


def _refuse_for(curriculum: Curriculum, args: TrainingArguments) -> None:
    """One sentence for each setting under which this curriculum could not do what it is asked for."""
    for asked, what in ((curriculum.gives_weights, "loss weights"), (curriculum.observe, "observe=True")):
        if asked and args.torch_compile:
            raise ValueError(
                f"torch_compile=True traces the forward once and leaves no place in it for {what}. Leave one of the "
                "two off."
            )
    if curriculum.gives_weights and args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel=True computes the loss without logits, so the loss weights of the policies cannot be "
            "applied. Leave it off, or use SampleBySoftmax instead of WeightBySoftmax: it draws samples in proportion "
            "to what they would weigh."
        )
    if curriculum.rescore.every_steps is not None:
        # accelerate holds a batch back, and may be handing out another; workers read on
        ahead = 2 + args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2)
        steps = -(-ahead // args.gradient_accumulation_steps)
        if steps > curriculum.rescore.lag:
            raise ValueError(
                f"The data loader reads up to {steps} optimizer steps ahead (dataloader_num_workers="
                f"{args.dataloader_num_workers}), more than the lag of {curriculum.rescore.lag} from a scoring to the "
                f"steps that it changes. Declare it: Rescore(lag={steps})."
            )


def _check_position(entry: dict[str, Any], args: TrainingArguments, epoch: int, into_epoch: int) -> None:
    """The trainer will go on at the place of the plan where the checkpoint was written.

    Raises:
        ValueError: it counts other steps to an epoch than the run that wrote the checkpoint.
    """
    here = _samples_per_step(args)
    if entry["samples_per_step"] != here:
        raise ValueError(
            f"The checkpoint was written by a run that trained {entry['samples_per_step']} samples in each optimizer "
            f"step; here it would be {here}, and the trainer would go on at another place of the plan. Choose "
            "per_device_train_batch_size × gradient_accumulation_steps × processes to give the same number."
        )
    progress = entry["progress"]
    # the last step of an epoch is also the zeroth of the next
    last = into_epoch == 0 and progress["epoch"] == epoch - 1
    if not last and (progress["epoch"], progress["into_epoch"]) != (epoch, into_epoch):
        raise ValueError(
            f"The checkpoint was written at step {progress['into_epoch']} of epoch {progress['epoch']}, but the "
            f"trainer would go on at step {into_epoch} of epoch {epoch}: an epoch was ended early (should_epoch_stop), "
            "or has another number of steps now. Resume with the settings of the run that wrote it; after an epoch "
            "that was ended early the trainer cannot resume, so start a new run from the checkpoint's weights."
        )
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


def _samples_per_step(args: TrainingArguments) -> int:
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


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


def _output(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir))


def _saves(args: TrainingArguments) -> bool:
    return args.save_strategy != "no"


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


def _train_through(trainer: Trainer, callback: CurriculumCallback) -> None:
    """Look at the checkpoint before the trainer does, and hold the output folder while it trains."""
    train = trainer.train

    def train_from_whole_checkpoint(
        resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            if trial is not None or not _saves(trainer.args):
                # a search gives each trial a folder of its own
                return train(resume_from_checkpoint, trial, *args, **kwargs)
            output = _output(trainer.args)
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


def _step_through(trainer: Trainer, callback: CurriculumCallback) -> None:
    """Tell the callback of every batch, around the trainer's training on it."""
    training_step = trainer.training_step

    def told_step(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with callback.batch(inputs, trainer.args, trainer.state):
            return training_step(model, inputs, *args, **kwargs)

    trainer.training_step = told_step  # type: ignore[method-assign]


def _save_through(trainer: Trainer, callback: CurriculumCallback) -> None:
    """Have what training has shown so far in every checkpoint, whoever asked for it."""
    save_checkpoint = trainer._save_checkpoint

    def save_with_state(*args: Any, **kwargs: Any) -> Any:
        callback.note_state(trainer.state)
        return save_checkpoint(*args, **kwargs)

    trainer._save_checkpoint = save_with_state  # type: ignore[method-assign]


__all__ = ["CurriculumCallback", "attach", "end_token_ids"]
