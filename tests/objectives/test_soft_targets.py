"""Soft targets in real trainers: the gradient is the formula's, whatever the host does around it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_sampler import (
    Curriculum,
    GlobalNaturalness,
    HiddenHints,
    Shuffle,
    SoftTargets,
    WeightBySoftmax,
    attach,
)
from distill_sampler.objectives.places import IGNORED
from tests import tiny
from tests.online.test_loss_weights import RATE, divisor, trainer_of

KINDS = ("Trainer", "SFTTrainer")


def curriculum(weighted: bool = False) -> Curriculum:
    policies: list[Any] = [Shuffle()]
    if weighted:
        policies.append(WeightBySoftmax("global_naturalness", temperature=0.3))
    return Curriculum(metrics=[GlobalNaturalness()] if weighted else [], policies=policies)


def teacher(**changes: Any) -> PreTrainedModel:
    return tiny.model(seed=7, hidden_size=48, **changes)


def weights_of(trainer: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def after_one_step(trainer: Any, *, of: Curriculum, objective: SoftTargets, samples: int) -> dict[str, Tensor]:
    """The weights after one step of gradient descent on alpha T² D + (1 - alpha) CE, computed the plain way in float64
    on a copy of the student."""
    model = tiny.model().double().eval()  # not a copy: TRL patches the forward of the trainer's on the instance
    model.load_state_dict(trainer.model.state_dict())
    guide = copy.deepcopy(objective.teacher).double()
    plan, T = of.sampler.plan, objective.temperature
    assert plan is not None
    alpha = objective.share(0.0)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for index, weight in zip(plan.indices[:samples], plan.weights[:samples], strict=True):
        row = trainer.train_dataset[int(index)]
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        counted = torch.nonzero(labels[1:] != IGNORED)[:, 0]
        z, v = model(input_ids=ids).logits[0, counted], guide(input_ids=ids).logits[0, counted].detach()
        p, q = torch.softmax(v / T, -1), torch.softmax(z / T, -1)
        kl = {
            "forward": lambda p=p, q=q: (p * (p / q).log()).sum(-1),
            "reverse": lambda p=p, q=q: (q * (q / p).log()).sum(-1),
            "js": lambda p=p, q=q: sum((x * (x / ((p + q) / 2)).log()).sum(-1) / 2 for x in (p, q)),
        }[objective.divergence]()
        ce = torch.nn.functional.cross_entropy(z, labels[1:][counted], reduction="none")
        total = total + float(weight) * (alpha * T**2 * kl + (1 - alpha) * ce).sum()
        tokens += len(counted)
    (total / tokens / divisor(trainer)).backward()
    return {name: value.detach() - RATE * value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changes", "weighted", "objective"),
    [
        ({}, False, {}),
        ({"gradient_accumulation_steps": 2}, True, {"divergence": "reverse"}),
        ({"per_device_train_batch_size": 4}, False, {"divergence": "js", "temperature": 1.0, "alpha": 1.0}),
        ({"gradient_checkpointing": True}, False, {"alpha": lambda progress: 0.9 - progress / 2}),
    ],
    ids=["plain", "accumulation and weights", "js alone", "checkpointing and a schedule"],
)
def test_a_step_descends_the_formula(
    kind: str,
    changes: dict[str, Any],
    weighted: bool,
    objective: dict[str, Any],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    given, soft = curriculum(weighted), SoftTargets(teacher(), **objective)
    trainer = trainer_of(kind, tmp_path, tokenizer, max_steps=1, **changes)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    attach(trainer, given, objective=soft)
    trainer.train()
    trained = weights_of(trainer)
    trainer.model.load_state_dict(before)
    samples = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    expected = after_one_step(trainer, of=given, objective=soft, samples=samples)
    moved = 0.0
    for name, value in trained.items():
        difference = float((value - before[name]).abs().max())
        moved = max(moved, difference)
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-6)
    assert moved > 1e-4


def test_padding_free_batches_are_compared_sample_by_sample(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    results = []
    for padding_free in (False, True):
        model = tiny.model(attn_implementation="sdpa")
        trainer = trainer_of(
            "SFTTrainer", tmp_path, tokenizer, model=model, max_steps=2, padding_free=padding_free, max_length=None
        )
        attach(trainer, curriculum(), objective=SoftTargets(teacher(attn_implementation="sdpa")))
        trainer.train()
        results.append(weights_of(trainer))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_alpha_of_zero_changes_no_bit(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    results = []
    for objective in ((), SoftTargets(teacher(), alpha=0.0)):
        trainer = trainer_of(kind, tmp_path, tokenizer, max_steps=3)
        attach(trainer, curriculum(), objective=objective)
        trainer.train()
        results.append((weights_of(trainer), [line.get("loss") for line in trainer.state.log_history]))
    (plain, losses), (zero, same_losses) = results
    assert all(torch.equal(value, zero[name]) for name, value in plain.items())
    assert losses == same_losses


def test_the_divergence_is_logged_by_its_name(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of("SFTTrainer", tmp_path, tokenizer, max_steps=2)
    attach(trainer, curriculum(), objective=SoftTargets(tiny.model(), alpha=1.0))
    trainer.train()
    first, second = (line["soft_targets"] for line in trainer.state.log_history if "soft_targets" in line)
    assert first == pytest.approx(0.0, abs=1e-6)  # the teacher is the student
    assert second < 1e-4


def test_the_teacher_is_left_alone_and_evaluation_too(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    guide = teacher()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    trainer = trainer_of("SFTTrainer", tmp_path, tokenizer, max_steps=2)
    trainer.eval_dataset = trainer.train_dataset
    plain = trainer.evaluate()["eval_loss"]
    attach(trainer, curriculum(), objective=SoftTargets(guide))
    assert trainer.evaluate()["eval_loss"] == plain
    trainer.train()
    assert not guide.training
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())


def test_a_larger_vocabulary_of_padding_is_handled_and_another_vocabulary_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = trainer_of("SFTTrainer", tmp_path, tokenizer, max_steps=1)
    attach(trainer, curriculum(), objective=SoftTargets(teacher(vocab_size=tiny.VOCAB + 30)))
    trainer.train()
    trainer = trainer_of("SFTTrainer", tmp_path, tokenizer, max_steps=1)
    attach(
        trainer,
        curriculum(),
        objective=SoftTargets(
            teacher(vocab_size=tiny.VOCAB - 30, pad_token_id=None, bos_token_id=None, eos_token_id=None)
        ),
    )
    with pytest.raises(ValueError, match=r"teacher=.*different vocabularies"):
        trainer.train()


@pytest.mark.parametrize("kind", [SoftTargets, HiddenHints])
def test_a_teacher_with_a_far_larger_vocabulary_is_not_taken_for_a_padded_one(
    kind: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = trainer_of("SFTTrainer", tmp_path, tokenizer, max_steps=1)
    attach(trainer, curriculum(), objective=kind(teacher(vocab_size=tiny.VOCAB + 2000)))
    with pytest.raises(ValueError, match=r"teacher=.*different vocabularies"):
        trainer.train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": "a/model"}, "a/model"),
        ({"teacher": PreTrainedModel}, "teacher="),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": "2"}, "temperature='2'"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"alpha": 1.5}, "alpha="),
        ({"alpha": "0.5"}, "alpha=.*'0.5'"),
        ({"alpha": lambda progress: None}, "alpha=.*None"),
        ({"alpha": lambda progress: 2 * progress}, "alpha=.*progress 1.0"),
        ({"divergence": "kl"}, "divergence='kl'.*'forward'"),
    ],
)
def test_a_bad_argument_is_refused_by_its_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftTargets(**{"teacher": tiny.model(), **arguments})


@pytest.mark.parametrize("temperature", [3, np.float32(3), np.int64(3)])
def test_a_temperature_is_any_number(temperature: Any) -> None:
    kept = SoftTargets(teacher(), temperature=temperature).temperature
    assert type(kept) is float
    assert kept == 3.0


@pytest.mark.parametrize("setting", ["torch_compile", "use_liger_kernel"])
def test_settings_without_a_place_for_an_objective_are_refused(
    setting: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = trainer_of("Trainer", tmp_path, tokenizer)
    setattr(trainer.args, setting, True)
    with pytest.raises(ValueError, match=f"{setting}=True.*soft_targets"):
        attach(trainer, curriculum(), objective=SoftTargets(teacher()))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_teacher_that_is_the_student_is_refused(
    adapted: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    student = tiny.model()
    trainer = trainer_of(
        "SFTTrainer",
        tmp_path,
        tokenizer,
        model=student,
        max_steps=1,
        peft_config=LoraConfig(target_modules=["q_proj"]) if adapted else None,
    )
    trained = [name for name, value in trainer.model.named_parameters() if value.requires_grad]
    with pytest.raises(ValueError, match=r"teacher=.*shares weights.*second time"):
        attach(trainer, curriculum(), objective=SoftTargets(student))
    assert trained == [name for name, value in trainer.model.named_parameters() if value.requires_grad]
    attach(trainer, curriculum(), objective=SoftTargets(teacher()))
    trainer.train()


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "trainable_token_indices": [1]}]
)
def test_an_adapter_on_the_head_is_refused_because_its_weight_would_not_be_trained(
    settings: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    student = get_peft_model(
        tiny.model(tie_word_embeddings="q_proj" in settings["target_modules"]), LoraConfig(**settings)
    )
    trainer = trainer_of("Trainer", tmp_path, tokenizer, model=student, max_steps=1)
    attach(trainer, curriculum(), objective=SoftTargets(teacher()))
    with pytest.raises(ValueError, match=r"output head.*peft.*modules_to_save"):
        trainer.train()


def test_a_head_that_is_trained_beside_an_adapter_learns_as_without(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])  # which begins as no change
    heads = []
    for student in (tiny.model(), get_peft_model(tiny.model(), settings)):
        trainer = trainer_of("Trainer", tmp_path, tokenizer, model=student, max_steps=1)
        attach(trainer, curriculum(), objective=SoftTargets(teacher(), alpha=1.0))
        trainer.train()
        heads.append(student.get_output_embeddings().weight.detach())
    assert (heads[0] - tiny.model().lm_head.weight).norm() > 0
    torch.testing.assert_close(heads[1], heads[0])
