"""Packs through real trainers: what is trained is what was planned, and no sample sees another."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from distill_sampler import Curriculum, Shuffle, attach
from tests import tiny
from tests.test_attach import RecordedTrainer, arguments, curriculum, sft_trainer, trained

PACK = 240
"""Two or three of the toy samples, which have 72 to 106 tokens."""


def plain_trainer(output: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Any:
    return RecordedTrainer(
        model=changes.pop("model", None) or tiny.model(),
        processing_class=tokenizer,
        train_dataset=tiny.tokenised(tiny.candidates(), tokenizer),
        data_collator=DataCollatorWithFlattening(),
        args=TrainingArguments(**arguments(output, **changes)),
    )


TRAINERS = {"Trainer": plain_trainer, "SFTTrainer": sft_trainer}


def packs_planned(attached: Curriculum) -> list[tuple[int, ...]]:
    """The packs of all epochs, each completed from its start to whole optimizer steps."""
    packs = []
    for plan in attached.plans:
        assert plan.packs is not None
        of_epoch = [tuple(plan.indices[start:stop].tolist()) for start, stop in pairwise(plan.packs)]
        packs += [of_epoch[row % len(of_epoch)] for row in range(len(attached.sampler))]
    return packs


SETTINGS: dict[str, dict[str, Any]] = {
    "one pack a batch": {"per_device_train_batch_size": 1},
    "two packs, accumulated": {"gradient_accumulation_steps": 2},
    "workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "num_train_epochs": 3},
    "the last left out": {"dataloader_drop_last": True},
}


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_the_packs_trained_are_the_packs_planned(
    settings: dict[str, Any], kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = TRAINERS[kind](tmp_path, tokenizer, **settings)
    attached = curriculum(policies=[Shuffle()])
    attach(trainer, attached, pack_to=PACK, pack_window=8)
    trainer.train()
    packs = packs_planned(attached)
    assert trained(trainer) == [sample for pack in packs for sample in pack]
    size = trainer.args.per_device_train_batch_size
    assert len(trainer.batches) * size == len(packs) == trainer.args.num_train_epochs * len(attached.sampler)
    lengths = attached.dataset.lengths
    assert max(lengths[list(pack)].sum() for pack in packs) <= PACK
    assert len(packs) < 12 * trainer.args.num_train_epochs
    assert "curriculum/pack_fill" in trainer.state.log_history[0]


class FirstGradients(TrainerCallback):
    """Notes the gradients of the first optimizer step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.gradients = [parameter.grad.clone() for parameter in kwargs["model"].parameters()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_the_step_of_packs_is_the_sum_over_its_samples_one_by_one(
    kind: str, attention: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = TRAINERS[kind](
        tmp_path,
        tokenizer,
        model=tiny.model(attn_implementation=attention),
        gradient_accumulation_steps=2,
        max_grad_norm=0,
        max_steps=1,
    )
    seen = FirstGradients()
    trainer.add_callback(seen)
    attached = curriculum(policies=[Shuffle()])
    attach(trainer, attached, pack_to=PACK)
    trainer.train()
    (logged,) = (line["loss"] for line in trainer.state.log_history if "loss" in line)
    model = tiny.model(attn_implementation=attention)
    loss, tokens = torch.zeros(()), 0
    for index in trained(trainer):
        row = trainer.train_dataset[index]
        input_ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        loss += cross_entropy(model(input_ids=input_ids).logits[0, :-1], labels, reduction="sum")
        tokens += int((labels != -100).sum())
    (loss / tokens).backward()
    assert logged == pytest.approx(loss.item() / tokens, rel=1e-5, abs=1e-4)  # logged with four digits
    for found, parameter in zip(seen.gradients, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-6)
