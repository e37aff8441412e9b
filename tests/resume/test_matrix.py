"""The resume matrix, and the same order for any number of processes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from transformers import PreTrainedTokenizerBase

from distill_sampler import DistillSampler, EpochPlan, attach
from tests import tiny
from tests.test_attach import TRAINERS, curriculum, trained

PLACES = {
    "start": 0,
    "middle of epoch 0": 2,
    "end of epoch 0": 3,
    "middle of epoch 1": 4,
    "last step": 8,
}
"""Optimizer steps after which the run is stopped; an epoch has three, and there are three."""


def run(
    kind: str, folder: Path, tokenizer: PreTrainedTokenizerBase, resume: Path | None = None, **settings: Any
) -> tuple[Any, list[int]]:
    trainer = TRAINERS[kind](
        folder,
        tokenizer,
        model=tiny.model(attention_dropout=0.1),
        num_train_epochs=3,
        save_strategy="steps",
        save_steps=1,
        learning_rate=5e-3,
        **settings,
    )
    attach(trainer, curriculum())
    trainer.batches = []
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, trained(trainer)


def matrix(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, places: Any, **settings: Any) -> None:
    whole, order = run(kind, tmp_path / "whole", tokenizer, **settings)
    assert len(order) == 18
    for place in places:
        resume = tmp_path / "whole" / f"checkpoint-{place}" if place else None
        rest, rest_order = run(kind, tmp_path / f"rest-{place}", tokenizer, resume, **settings)
        assert rest_order == order[2 * place :]
        for left, right in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
            assert torch.equal(left, right)


def test_a_resume_trains_the_rest_of_the_epoch_and_the_epochs_after(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    matrix("Trainer", tmp_path, tokenizer, [PLACES["middle of epoch 0"], PLACES["end of epoch 0"]])


SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "2 workers": {"dataloader_num_workers": 2},
    "persistent workers": {
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_a_resume_from_any_place_under_any_setting_trains_the_same(
    settings: dict[str, Any], kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    matrix(kind, tmp_path, tokenizer, PLACES.values(), **settings)


def test_the_global_order_is_the_same_for_any_number_of_processes() -> None:
    """Four processes with one row a batch, three with … read the same 12 samples in each optimizer step."""
    plan = EpochPlan(indices=np.random.default_rng(0).permutation(72))
    sampler = DistillSampler(72)
    sampler.set_plan(plan)
    for processes in (1, 2, 3, 4):
        batches = BatchSampler(sampler, batch_size=12 // processes, drop_last=False)
        shards = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
        order = [index for step in zip(*shards, strict=True) for batch in step for index in batch]
        assert order == plan.indices.tolist()
        # resumed on that many: the trainer skips batches of each process
        for step in (1, 4):
            rest = [index for row in list(zip(*shards, strict=True))[step:] for batch in row for index in batch]
            assert rest == plan.indices[12 * step :].tolist()
