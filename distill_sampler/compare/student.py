"""What costs time: the student scores the candidates, trains on a plan, and reads the held-out responses."""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments, set_seed

from distill_sampler.compare.arms import GROUP, TEACHER
from distill_sampler.compare.budget import given
from distill_sampler.compare.candidates import Candidates
from distill_sampler.compare.measures import HUMAN, Answer
from distill_sampler.curriculum import Curriculum
from distill_sampler.dataset import ScoredDataset
from distill_sampler.field_docs import documents_fields
from distill_sampler.integrations.transformers import attach
from distill_sampler.metrics import GlobalNaturalness
from distill_sampler.protocols import Metric
from distill_sampler.reading.reduce import columns_of
from distill_sampler.reading.scorer import Scorer
from distill_sampler.types import EpochPlan, FloatArray, IntArray


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Training:
    """How every arm is trained: all weights, AdamW, a constant learning rate after a warm-up."""

    learning_rate: float = 5e-5
    """Peak learning rate."""
    batch_size: int = 4
    """Samples of a batch on each process."""
    accumulation: int = 1
    """Batches in an optimizer step."""
    warmup_steps: int = 3
    """Steps until the learning rate is reached."""
    bf16: bool = True
    """Multiply in bfloat16 (autocast); weights stay float32."""

    def step(self, processes: int) -> int:
        """Samples in an optimizer step."""
        return self.batch_size * self.accumulation * processes

    def autocast(self, model: Any) -> AbstractContextManager[Any]:
        """The context in which the student computes outside of its trainer."""
        device = next(model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16) if self.bf16 else nullcontext()


def scores_of(
    model: Any, dataset: ScoredDataset, metrics: Sequence[Metric], rows: IntArray, training: Training
) -> tuple[dict[str, FloatArray], int, float]:
    """The metrics' numbers of some rows, NaN elsewhere; tokens read; seconds."""
    columns = {name: np.full(len(dataset), np.nan, np.float32) for name in columns_of(metrics)}
    tokens, started = 0, time.perf_counter()
    was_training = model.training
    model.eval()
    with training.autocast(model):
        for scored in Scorer(progress=False).score(model, dataset, list(metrics), rows):
            tokens += scored.tokens
            for name, values in scored.columns.items():
                columns[name][scored.indices] = values
    model.train(was_training)
    return columns, tokens, time.perf_counter() - started


def train(
    model: Any,
    tokenizer: Any,
    dataset: ScoredDataset,
    plan: EpochPlan,
    training: Training,
    *,
    seed: int,
    optimizers: tuple[Any, Any] = (None, None),
) -> tuple[float, int, tuple[Any, Any]]:
    """Train on a plan with transformers' `Trainer`. Returns seconds, optimizer steps, and optimizer and schedule.

    Args:
        model: the student; it is changed.
        tokenizer: pads the batches.
        dataset: what the plan's indices refer to.
        plan: a whole number of optimizer steps.
        training: the settings.
        seed: of dropout and of the curriculum.
        optimizers: those of an earlier round, which go on.
    """
    set_seed(seed)
    rows: Any = dataset.rows
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            optimizers=optimizers,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=training.batch_size,
                gradient_accumulation_steps=training.accumulation,
                learning_rate=training.learning_rate,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=training.warmup_steps,
                bf16=training.bf16,
                use_cpu=next(model.parameters()).device.type == "cpu",
                seed=seed,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
        )
        trainer.remove_callback(PrinterCallback)
        curriculum = Curriculum(metrics=[], policies=[given(plan)], scorer=Scorer(progress=False), seed=seed)
        attach(trainer, curriculum, manifests=False)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        planned = curriculum.sampler.plan
        assert planned is not None, "it was trained on"
        assert np.array_equal(planned.indices, plan.indices), "a plan of whole steps is trained as it is"
        assert trainer.state.global_step * training.step(trainer.args.world_size) == len(plan), (
            "every sample was trained on"
        )
        schedule = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        steps = trainer.state.global_step
        # the model without autocast around its forward pass
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        trainer.accelerator.free_memory()
        del trainer
    gc.collect()
    return seconds, steps, (optimizer, schedule)


def give_back_memory() -> None:
    """Return freed memory to the system. glibc's allocator keeps gigabytes of what a student and its optimizer took."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def read(model: Any, candidates: Candidates, rows: IntArray, training: Training) -> tuple[list[Answer], float]:
    """The losses of held-out responses and of the human solutions to their prompts, in the data's order; seconds."""
    metric = GlobalNaturalness()
    found, _, seconds = scores_of(model, candidates.dataset, [metric], rows, training)
    losses = -found[metric.name]
    prompts, teachers = candidates.dataset.column(GROUP), candidates.dataset.column(TEACHER)
    correct = candidates.dataset.column("correct")
    answers = [
        Answer(
            prompt=str(prompts.values[prompts.codes[row]]),
            teacher=str(teachers.values[teachers.codes[row]]),
            correct=_verdict(correct.values[correct.codes[row]]),
            loss=float(losses[row]),
        )
        for row in rows.tolist()
    ]
    if candidates.human is not None:
        wanted = {answer.prompt for answer in answers}
        names = candidates.human.column(GROUP)
        own = np.flatnonzero([str(names.values[code]) in wanted for code in names.codes])
        found, _, more = scores_of(model, candidates.human, [metric], own, training)
        seconds += more
        for row in own.tolist():
            name = str(names.values[names.codes[row]])
            answers.append(Answer(prompt=name, teacher=HUMAN, correct=True, loss=-float(found[metric.name][row])))
    return answers, seconds


def _verdict(value: Any) -> bool | None:
    return None if value is None else bool(value)
