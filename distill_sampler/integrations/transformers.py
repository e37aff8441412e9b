"""Hugging Face's `Trainer` and its subclasses that leave the order of samples to it, above all TRL's `SFTTrainer`.

`attach` connects a curriculum to a trainer that has been constructed: a sampler, a callback (`callback.py`), a few
methods wrapped on the instance (`seams.py`), and taps on the batches where they are needed. There is no subclass, and
no extra column passes through collators or workers: the samples of a batch are identified by their tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import numpy as np
from transformers import Trainer

from distill_sampler.curriculum import Curriculum
from distill_sampler.dataset import ScoredDataset
from distill_sampler.integrations.callback import ABSENT, CurriculumCallback
from distill_sampler.integrations.checkpoints import STATE_ENTRY
from distill_sampler.integrations.live_report import LiveReport
from distill_sampler.integrations.loss_weights import LossWeights
from distill_sampler.integrations.objectives import refuse_shared_weights, set_up
from distill_sampler.integrations.observed_scores import ObservedScores
from distill_sampler.integrations.own_order import has_own_loader, load_as_transformers
from distill_sampler.integrations.packs import (
    Overlong,
    SeparateSamples,
    fitted,
    pack_through,
    packing_of,
    refuse_packed,
)
from distill_sampler.integrations.refusals import (
    refuse_for,
    refuse_for_objectives,
    refuse_second_host,
    refuse_settings,
    samples_per_step,
)
from distill_sampler.integrations.responses import with_response_labels
from distill_sampler.integrations.sample_log import SampleLog
from distill_sampler.integrations.seams import (
    begin_through,
    best_through,
    load_through,
    log_through,
    loss_through,
    prepare_through,
    sample_through,
    save_through,
    step_through,
    train_through,
)
from distill_sampler.integrations.trl import dropped_rows, is_sft_trainer, source_rows
from distill_sampler.integrations.versions import BeginsInLoop, prepared_rows, truncation_mode
from distill_sampler.planning.summary import Logs
from distill_sampler.protocols import Objective, Tap
from distill_sampler.sources.templates import end_token_ids
from distill_sampler.truncation import UNKNOWN, cut_responses
from distill_sampler.watch import set_timeout

logger = logging.getLogger(__name__)


def attach(
    trainer: Trainer,
    curriculum: Curriculum,
    *,
    labels: str | None = "labels",
    score_end_marker: bool = False,
    unscorable: Literal["error", "drop"] = "error",
    score_whole_text: bool = False,
    accept_changes: bool = False,
    sample_log: bool = False,
    objective: Objective | Sequence[Objective] = (),
    manifests: bool = True,
    logs: Logs = "few",
    pack_to: int | Literal["max_length"] | None = None,
    batch_tokens: int | None = None,
    pack_window: int | None = None,
    pack_balance: int = 1,
    pack_overlong: Overlong = "refuse",
    report_every: int | None = None,
    prompt_column: str | None = None,
    replace_sampler: bool = False,
) -> None:
    """Let a curriculum decide what each epoch of this trainer trains on. Call it once, before `trainer.train()`.

    The curriculum works on the prepared `trainer.train_dataset` (after tokenisation, truncation and dropped rows),
    which still has columns such as prompt ids and teachers. What is scored is the response, as far as it is trained on,
    without end-of-turn markers. How the response is found depends on the data (see `sources.templates`):

    - a conversation (`messages`, or prompt and completion as messages): with the chat template;
    - a completion that is text: it is the response, without what a chat template wrote around it;
    - a single text (`text`, or tokens that are all labelled): the assistant's turns, between the chat template's
      markers.

    A token that begins in the prompt belongs to the prompt. `SFTTrainer` applies no chat template to a prompt and a
    completion that are text, so they are scored without one; `distill-sampler score` wraps them as a conversation
    unless `--plain` is given.

    Each epoch is a whole number of optimizer steps. If the plan is shorter, its first samples complete the last step;
    with `dataloader_drop_last=True`, the incomplete step is left out instead. The first table says how many samples
    that concerns. So any number of processes trains on the same samples in each step, as long as a step has the same
    number of them (`per_device_train_batch_size` × `gradient_accumulation_steps` × processes).

    Every scoring pass and every plan is kept in the output folder as it is made (`distill_sampler/record/`). When
    training ends, they are also written there as tables (`scores.parquet`, `plans.parquet`). `distill-sampler report
    OUTPUT` draws them at any time.

    Args:
        trainer: a `transformers.Trainer` or `trl.SFTTrainer`.
        curriculum: what to score and how to plan.
        labels: column of the prepared data set with the labels. None: every token is trained on.
        score_end_marker: score the end-of-turn marker like a token of the response. The papers do not.
        unscorable: what to do with rows that have no response token: `"error"`, or `"drop"` (never train on them).
        score_whole_text: score all of a row, with its prompt, where every token is trained on and nothing shows which
            of them are the response. By default such rows are refused.
        accept_changes: resume although metrics, policies or seed differ from the checkpoint's. An epoch that has begun
            is trained to its end as planned, and the changes take effect from the next epoch. Another data set is only
            accepted between epochs.
        sample_log: record which samples each batch held, where the loss is computed, in the output folder
            (`distill_sampler/samples-R.jsonl`); `distill-sampler verify` compares it with the checkpoints.
        objective: what training minimises beside the trainer's own loss, such as `SoftTargets(teacher)`; one, or
            several that are added one after the other.
        manifests: write the hashes of its files into each checkpoint, in a thread beside training, and compare a
            checkpoint with them before it is resumed from, so that one with a damaged file is passed over. False: do
            neither; files that are missing or cut off are noticed all the same.
        logs: which numbers of each plan go into the trainer's log, to any `report_to`. `"few"`: the mean score of the
            candidates and of the plan, the share of each teacher, the age of the scores, and the share of the epoch's
            time that scoring took; `"all"`: also counts, and what scoring cost. W&B, trackio and TensorBoard get the
            plan's table by teacher too.
        pack_to: lay the samples of each epoch's plan end to end in packs of at most so many tokens, each a row of
            training; `"max_length"`: `SFTConfig`'s. `per_device_train_batch_size` counts packs then. An epoch has a
            constant number of packs: a plan that fills more is cut behind the last one, and one that fills fewer goes
            on with its first packs. The table of each plan says how full they are, and what was cut. None: every sample
            has a row of its own.
        batch_tokens: for trainers that pad: make each batch of as many samples of like length as have at most so many
            tokens with their padding. `per_device_train_batch_size` must be 1. Epochs are as with `pack_to`.
        pack_window: from how many samples of the plan a pack is filled; no sample is trained more places than that from
            where it was planned. 1: strictly in the plan's order.
            None: 64, and with `batch_tokens` 1024, as batches need more samples to find like lengths among.
        pack_balance: sort so many packs in a row by the cost of their attention (the sum of their squared lengths), so
            that processes which train on neighbouring packs in one step finish at the same time. Give a few times the
            number of packs of a step. 1: packs stay in the plan's order.
        pack_overlong: what to do with samples that have more tokens than a pack: `"refuse"`; `"truncate"` keeps their
            first tokens; `"split"` makes several samples of each, which are scored and chosen on their own.
        report_every: write the report (`report.html` in the output folder) after the plan of every so many epochs, and
            when training ends. A page that is open reloads itself. None: write none; `distill-sampler report OUTPUT`
            makes one at any time.
        prompt_column: name of a column to make, for policies and reports, which is the same for responses to the same
            prompt: those with the same tokens before the response. For trainers that have dropped the columns of the
            data. None: the data set has the columns that the policies name.
        replace_sampler: whether the plan may take the place of a sampler or data loader of the trainer's own. False:
            such a trainer is refused, unless it hands on those of transformers with its present settings.

    Raises:
        ValueError: the trainer's settings rule out a curriculum, or the data set lacks rows or columns; the message
            names the argument and the cure.
    """
    if logs not in get_args(Logs):
        raise ValueError(f"logs={logs!r}: choose 'few' or 'all'.")
    refuse_settings(trainer, replace_sampler=replace_sampler)
    refuse_second_host(curriculum)
    report = LiveReport(curriculum, report_every)
    args = trainer.args
    before = dict(vars(trainer))
    trained_rows: Any = prepared_rows(trainer) if is_sft_trainer(trainer) else trainer.train_dataset
    refuse_packed(trained_rows)
    packing = packing_of(trainer, pack_to, batch_tokens, pack_window, pack_balance)
    source = source_rows(trained_rows)
    taps: list[Tap] = []
    if packing is not None:
        trained_rows, source = fitted(trained_rows, packing.capacity, pack_overlong)
    end_tokens = end_token_ids(trainer.processing_class, trainer.model)
    rows, labels, tokens_cut = with_response_labels(
        trainer, trained_rows, labels, score_whole_text=score_whole_text, end_token_ids=end_tokens
    )
    dataset = ScoredDataset(
        rows, labels=labels, end_token_ids=() if score_end_marker else end_tokens, unscorable=unscorable
    )
    dataset.source_rows = source
    if prompt_column is not None:
        dataset.add_column(prompt_column, [f"{prompt:016x}" for prompt in dataset.prompt_hash.tolist()])
    if is_sft_trainer(trainer):
        dataset.dropped = dropped_rows(trainer)
        limits = [args.max_length] if args.max_length else []  # type: ignore[attr-defined]  # of SFTConfig
        if packing is not None and pack_overlong == "truncate":
            limits.append(packing.capacity)
        cut = cut_responses(
            dataset,
            max_length=min(limits) if limits else None,
            end_token_ids=end_tokens,
            truncation_mode=truncation_mode(args),
        )
        unknown = np.where(cut, UNKNOWN, 0)
        dataset.tokens_cut = unknown if tokens_cut is None else np.where(tokens_cut == UNKNOWN, unknown, tokens_cut)
    curriculum.use_tokenizer(trainer.processing_class)
    objectives, objective_taps, teachers = set_up(objective, dataset, trainer.processing_class)
    refuse_shared_weights(trainer.model, teachers)
    refuse_for_objectives(objectives, args)
    sampler = curriculum.bind(dataset, applies_weights=True, observes=True, packing=packing, teachers=teachers)
    sampler.in_whole_steps(samples_per_step(args), cut=args.dataloader_drop_last)
    refuse_for(curriculum, args)
    if sample_log:
        taps.append(SampleLog(rank=args.process_index, world_size=args.world_size))
    if curriculum.planner.gives_weights:
        taps.append(LossWeights())
    if curriculum.observe:
        taps.append(ObservedScores(curriculum, objective_taps))
    taps += objective_taps
    if packing is not None and not packing.padded:
        taps.append(SeparateSamples(trainer, teachers))
    trainer.train_dataset = trained_rows
    callback = CurriculumCallback(
        trainer,
        curriculum,
        taps=taps,
        accept_changes=accept_changes,
        manifests=manifests,
        logs=logs,
        report=report,
    )
    sample_through(trainer, sampler)
    if has_own_loader(trainer):
        load_as_transformers(trainer)
    if packing is not None:
        pack_through(trainer, packing)
    begin_through(trainer, callback)
    trainer.add_callback(callback)
    log_through(trainer, callback)
    train_through(trainer, callback)
    load_through(trainer)
    save_through(trainer, callback)
    best_through(trainer, callback)
    if taps:
        step_through(trainer, callback)
    if objective_taps:
        loss_through(trainer, objective_taps)
        prepare_through(trainer, objectives)
    set_timeout(args.ddp_timeout)
    curriculum.driven_by = type(trainer).__name__
    callback.replaced = {
        name: (value, before.get(name, ABSENT))
        for name, value in vars(trainer).items()
        if before.get(name, ABSENT) is not value
    }


def detach(trainer: Trainer) -> Curriculum:
    """Undo `attach`: the trainer draws its samples, logs and saves as before, from the data set that it had.

    What the run knows stays in the curriculum (`history`, `samples`, `plot`) and in the output folder. In a notebook,
    call it before another curriculum is attached to the same trainer.

    Returns:
        The curriculum. It can be attached again, which starts a new run.

    Raises:
        ValueError: nothing is attached to the trainer, it is training, or something else has wrapped its methods since.
    """
    callbacks = trainer.callback_handler.callbacks
    attached = [each for each in callbacks if isinstance(each, CurriculumCallback)]
    if not attached:
        raise ValueError("detach(trainer): no curriculum is attached to this trainer.")
    (callback,) = attached
    if callback.training:
        raise ValueError("detach(trainer): the trainer is training. Detach after train() has returned.")
    for name, (ours, _) in callback.replaced.items():
        if callable(ours) and vars(trainer).get(name) is not ours:
            raise ValueError(
                f"detach(trainer): trainer.{name} was replaced after attach, so it cannot be restored. Undo that "
                "first, or make a new trainer."
            )
    for name, (_, old) in callback.replaced.items():
        if old is ABSENT:
            vars(trainer).pop(name, None)
        else:
            setattr(trainer, name, old)
    for each in [each for each in callbacks if isinstance(each, (CurriculumCallback, BeginsInLoop))]:
        trainer.remove_callback(each)
    cast("dict[str, Any]", trainer.state.stateful_callbacks).pop(STATE_ENTRY, None)
    callback.curriculum.driven_by = None
    return callback.curriculum


__all__ = ["CurriculumCallback", "attach", "detach", "end_token_ids"]
