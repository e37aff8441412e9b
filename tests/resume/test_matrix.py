"""The resume matrix, and the same order for any number of processes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from transformers import PreTrainedTokenizerBase

from distill_sampler import DistillSampler, EpochPlan, Scorer, attach
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


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("length", [144, 143, 121, 25])
def test_the_global_order_is_the_same_for_any_number_of_processes(length: int, cut: bool) -> None:
    """Four processes with three rows a batch, three with four … read the same 24 samples in each optimizer step."""
    plan = EpochPlan(indices=np.random.default_rng(0).permutation(length))
    sampler = DistillSampler(length)
    sampler.in_whole_steps(24, cut=cut)
    sampler.set_plan(plan)
    steps = length // 24 if cut else -(-length // 24)
    expected = [*plan.indices, *plan.indices[: max(0, 24 * steps - length)]][: 24 * steps]
    for processes in (1, 2, 3, 4):
        for accumulation in (1, 2):
            batches = BatchSampler(sampler, batch_size=24 // processes // accumulation, drop_last=cut)
            shards = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
            assert {len(shard) for shard in shards} == {steps * accumulation}
            dealt = list(zip(*shards, strict=True))
            assert [index for row in dealt for batch in row for index in batch] == expected
            # resumed on that many: the trainer skips batches of each process
            for step in (0, 1, steps):
                rest = [index for row in dealt[step * accumulation :] for batch in row for index in batch]
                assert rest == expected[24 * step :]


LAYOUTS = [(4, 1), (2, 2), (1, 4)]
"""Batch size and accumulation: four samples in each optimizer step."""


@pytest.mark.parametrize("cut", [False, True], ids=["completed", "cut"])
@pytest.mark.parametrize(("batch", "accumulation"), LAYOUTS)
def test_an_epoch_is_the_same_whole_steps_in_every_layout(
    batch: int,
    accumulation: int,
    cut: bool,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A plan of six samples in steps of four: completed by its first two, or cut to its first four."""
    trainer = TRAINERS["Trainer"](
        tmp_path,
        tokenizer,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        dataloader_drop_last=cut,
    )
    attached = curriculum(scorer=Scorer(progress=True))
    attach(trainer, attached)
    trainer.train()
    epochs = [plan.indices.tolist() for plan in attached.plans]
    assert [len(epoch) for epoch in epochs] == [6, 6]
    assert trained(trainer) == [index for epoch in epochs for index in (epoch[:4] if cut else [*epoch, *epoch[:2]])]
    assert trainer.state.global_step == (2 if cut else 4)
    assert attached.times_trained().sum() == (8 if cut else 16)
    assert np.bincount(trained(trainer), minlength=18).tolist() == attached.times_trained().tolist()
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("leaves out the last 2 of 6 samples" if cut else "completed by 2 from its start") == 1


def test_an_epoch_without_a_whole_step_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = TRAINERS["Trainer"](tmp_path, tokenizer, per_device_train_batch_size=8, dataloader_drop_last=True)
    with pytest.raises(ValueError, match=r"epoch of 6 samples has no whole optimizer step of 8.*dataloader_drop_last"):
        attach(trainer, curriculum())
