"""Hidden hints and attention transfer in real trainers: the formulas, the projections' life, the refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_sampler import AttentionTransfer, HiddenHints, SoftTargets, attach
from distill_sampler.objectives import live
from distill_sampler.objectives.hidden_hints import MODULE, projections_of, restore_projections
from distill_sampler.objectives.places import IGNORED
from tests import tiny
from tests.objectives.test_soft_targets import curriculum, weights_of
from tests.online.test_loss_weights import RATE, divisor, trainer_of

KINDS = ("Trainer", "SFTTrainer")


def teacher(**changes: Any) -> PreTrainedModel:
    return tiny.model(seed=7, hidden_size=48, attn_implementation="eager", **changes)


def formula(objective: Any, student: Any, guide: Any, projected: dict[str, Tensor], ids: Tensor, at: Tensor) -> Tensor:
    """The objective of one sample, summed over positions, the plain way."""
    asked = {"input_ids": ids, "output_hidden_states": True, "output_attentions": True}
    own, other = student(**asked), guide(**asked)
    total = torch.zeros((), dtype=torch.float64)
    for layer, hint in objective.layers.items():
        if isinstance(objective, HiddenHints):
            # states[0] is the embedding; the last entry is normalised, so these tests match inner layers
            states, hints = own.hidden_states[layer + 1][0, at], other.hidden_states[hint + 1][0, at].detach()
            states = states @ projected[str(layer)].T if projected else states
            error = (states - hints).square().mean(-1)
        else:
            rows = [output.attentions[number][0].mean(0)[at] for output, number in ((own, layer), (other, hint))]
            unit = [row / row.norm(dim=-1, keepdim=True) for row in rows]
            error = (unit[0] - unit[1].detach()).square().sum(-1)
        total = total + error.sum() / len(objective.layers)
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", [HiddenHints, AttentionTransfer])
def test_a_step_descends_the_formula(of: Any, kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    guide, layers, weight = teacher(num_hidden_layers=3), {0: 1}, 0.7
    objective, given = of(guide, layers=layers, weight=weight), curriculum(weighted=True)
    trainer = trainer_of(
        kind,
        tmp_path,
        tokenizer,
        model=tiny.model(attn_implementation="eager"),
        max_steps=1,
        gradient_accumulation_steps=2,
    )
    attach(trainer, given, objective=objective)
    seen: dict[str, Tensor] = {}
    objective.prepare(trainer.model)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    objective.withdraw(trainer.model)
    withdraw = of.withdraw

    def keep(self: Any, student: nn.Module) -> None:
        seen.update(weights_of(trainer))
        withdraw(self, student)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of, "withdraw", keep)
        trainer.train()

    student = tiny.model(attn_implementation="eager").double().eval()
    student.load_state_dict({name: value for name, value in start.items() if not name.startswith(MODULE)})
    projections = {
        name.split(".")[1]: value.double().requires_grad_() for name, value in start.items() if name.startswith(MODULE)
    }
    assert bool(projections) == (of is HiddenHints)
    guide = copy.deepcopy(guide).double()
    plan, total, tokens = given.sampler.plan, torch.zeros((), dtype=torch.float64), 0
    assert plan is not None
    for index, share in zip(plan.indices[:4], plan.weights[:4], strict=True):
        row = trainer.train_dataset[int(index)]
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        at = torch.nonzero(labels[1:] != IGNORED)[:, 0]
        logits = student(input_ids=ids).logits[0, at]
        ce = torch.nn.functional.cross_entropy(logits, labels[1:][at], reduction="sum")
        own = formula(objective, student, guide, projections, ids, at)
        total = total + float(share) * (ce + weight * own)
        tokens += len(at)
    (total / tokens / divisor(trainer)).backward()
    expected = dict(student.named_parameters()) | {f"{MODULE}.{n}.weight": value for n, value in projections.items()}
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        gradient = torch.zeros_like(value) if value.grad is None else value.grad
        torch.testing.assert_close(seen[name].double(), value.detach() - RATE * gradient, rtol=1e-4, atol=1e-6)


def test_objectives_of_one_teacher_share_its_forward_pass(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    guide, passes = teacher(), 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    trainer = trainer_of("SFTTrainer", tmp_path, tokenizer, model=tiny.model(attn_implementation="eager"), max_steps=3)
    attach(trainer, curriculum(), objective=[SoftTargets(guide), HiddenHints(guide), AttentionTransfer(guide)])
    handle = guide.get_decoder().layers[0].register_forward_hook(count)
    trainer.train()
    handle.remove()
    assert passes == 3 + 2  # and two that find what the teacher does to its logits
    logged = [line for line in trainer.state.log_history if "soft_targets" in line]
    assert len(logged) == 3
    assert all(line["hidden_hints"] > 0 and line["attention_transfer"] > 0 for line in logged)


def test_projections_resume_with_the_checkpoint_and_are_not_in_the_saved_student(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def run(folder: Path, **changes: Any) -> Any:
        trainer = trainer_of(
            "SFTTrainer",
            folder,
            tokenizer,
            max_steps=6,
            save_strategy="steps",
            save_steps=2,
            optim="adamw_torch",
            num_train_epochs=2,
        )
        attach(trainer, curriculum(), objective=HiddenHints(teacher()))
        trainer.train(**changes)
        return trainer

    def names(folder: Path) -> list[str]:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            return list(file.keys())

    whole = run(tmp_path / "whole")
    assert not [name for name, _ in whole.model.named_parameters() if MODULE in name]
    whole.save_model(str(tmp_path / "student"))
    assert not [name for name in names(tmp_path / "student") if MODULE in name]
    assert [name for name in names(tmp_path / "whole" / "checkpoint-4") if MODULE in name]
    resumed = run(tmp_path / "whole", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(resumed)[name]), name


@pytest.mark.parametrize("requested", [True, "checkpoint-1"])
def test_a_resume_with_other_projections_names_the_argument(
    requested: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def run(objective: Any, **changes: Any) -> None:
        trainer = trainer_of("Trainer", tmp_path, tokenizer, max_steps=2, save_strategy="steps", save_steps=1)
        attach(trainer, curriculum(), objective=objective)
        trainer.train(**changes)

    run(HiddenHints(teacher()))
    checkpoint = requested if requested is True else str(tmp_path / requested)
    for other in (SoftTargets(teacher()), HiddenHints(teacher(), layers={0: 0})):
        with pytest.raises(ValueError, match=r"projections of HiddenHints.*48, 32.*objective="):
            run(other, resume_from_checkpoint=checkpoint)


def test_a_weight_of_zero_changes_no_bit(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    results = []
    for objective in ((), AttentionTransfer(teacher(), weight=0.0)):
        model = tiny.model(attn_implementation="eager")
        trainer = trainer_of("SFTTrainer", tmp_path, tokenizer, model=model, max_steps=3)
        attach(trainer, curriculum(), objective=objective)
        trainer.train()
        results.append(weights_of(trainer))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda: HiddenHints(teacher(), layers={5: 0}), r"layers=.*student has 2 layers.*no layer 5"),
        (lambda: HiddenHints(teacher(), layers={"0": 0}), r"layers=.*no layer '0'"),
        (lambda: AttentionTransfer(teacher(), layers={0: -3}), r"layers=.*teacher has 2 layers.*no layer -3"),
        (lambda: HiddenHints(teacher(), projection="never"), r"projection='never'.*32 .*48.*projection='auto'"),
        (lambda: AttentionTransfer(tiny.model(attn_implementation="sdpa")), r"teacher uses 'sdpa'.*'eager'"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    objective: Any, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny.model(attn_implementation="eager")
    trainer = trainer_of("SFTTrainer", tmp_path, tokenizer, model=model, max_steps=1)
    attach(trainer, curriculum(), objective=objective())
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_projections_beside_an_adapter_resume_with_its_checkpoint(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[dict[str, Any]] = []
    withdraw = HiddenHints.withdraw
    monkeypatch.setattr(
        HiddenHints,
        "withdraw",
        lambda self, student: (learned.append(projections_of(student)), withdraw(self, student)),
    )

    def run(objective: Any = None, **changes: Any) -> Any:
        trainer = trainer_of(
            "SFTTrainer",
            tmp_path / "run",
            tokenizer,
            max_steps=4,
            num_train_epochs=2,
            save_strategy="steps",
            save_steps=2,
            optim="adamw_torch",
            peft_config=LoraConfig(target_modules=["q_proj"], r=4),
        )
        attach(trainer, curriculum(), objective=objective or HiddenHints(teacher()))
        start = projections_of(trainer.model)
        trainer.train(**changes)
        assert start == {}
        return trainer

    whole = run()
    with safe_open(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if MODULE in name]  # noqa: SIM118
    resumed = run(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, value in weights_of(whole).items():
        if "lora" in name:
            assert torch.equal(value, weights_of(resumed)[name]), name
    assert learned[0].keys() == {"1.weight"}
    assert all((learned[0][name] == learned[1][name]).all() for name in learned[0])
    with pytest.raises(ValueError, match=r"projections of HiddenHints.*48, 32.*objective="):
        run(SoftTargets(teacher()), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_projections_are_restored_into_the_same_ones_alone() -> None:
    """Checkpoints of older releases do not say which projections the run had, so nothing has compared them before."""
    guide = teacher()
    student, other, without = (tiny.model() for _ in range(3))
    HiddenHints(guide, layers={1: 0}).prepare(student)
    HiddenHints(guide, layers={0: 0}).prepare(other)
    saved = {name: value + 1 for name, value in projections_of(student).items()}
    restore_projections(student, saved)
    assert (projections_of(student)["1.weight"] == saved["1.weight"]).all()
    for model in (other, without):
        with pytest.raises(ValueError, match=r"projections of HiddenHints.*48, 32.*objective="):
            restore_projections(model, saved)


def test_projections_beside_an_adapter_are_refused_where_fsdp_does_not_save_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = trainer_of(
        "SFTTrainer", tmp_path, tokenizer, max_steps=1, peft_config=LoraConfig(target_modules=["q_proj"])
    )
    attach(trainer, curriculum(), objective=HiddenHints(teacher()))
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"hidden_hints.*FSDP.*projection='never'"):
        trainer.train()


def test_layers_are_found_by_their_number() -> None:
    assert len(live.layers_of(tiny.model(num_hidden_layers=3))) == 3


def test_layers_may_be_numbers_of_numpy() -> None:
    layers = dict(enumerate(np.linspace(-1, 0, 2).astype(int)))
    chosen = live.chosen_layers(layers, tiny.model(), teacher(), what="HiddenHints")
    assert chosen == {0: 1, 1: 0}
    assert all(type(number) is int for pair in chosen.items() for number in pair)


@pytest.mark.parametrize("layers", [{}, [0, 1], None])
@pytest.mark.parametrize("of", [HiddenHints, AttentionTransfer])
def test_layers_are_pairs(of: Any, layers: Any) -> None:
    with pytest.raises(ValueError, match=rf"{of.__name__}\(layers=.*-1: -1"):
        of(teacher(), layers=layers)


def test_a_weight_of_zero_keeps_the_projections_in_the_graph(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """DDP waits for the gradient of every parameter, whatever the objective weighs at this point of the run."""
    trainer = trainer_of("SFTTrainer", tmp_path, tokenizer, max_steps=2)
    objective = HiddenHints(teacher(), weight=lambda progress: 0.0 if progress < 0.5 else 1.0)
    attach(trainer, curriculum(), objective=objective)
    gradients = []
    step = trainer.training_step

    def noted(model: nn.Module, *args: Any) -> Any:
        loss = step(model, *args)
        gradients.append(model.get_submodule(f"{MODULE}.1").weight.grad.clone())
        return loss

    trainer.training_step = noted
    trainer.train()
    assert not gradients[0].any()
    assert gradients[1].any()


def test_attention_without_gradients_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of(
        "SFTTrainer",
        tmp_path,
        tokenizer,
        model=tiny.model(attn_implementation="eager"),
        max_steps=1,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    attach(trainer, curriculum(), objective=AttentionTransfer(teacher()))
    with pytest.raises(ValueError, match=r"AttentionTransfer.*'use_reentrant': False"):
        trainer.train()


def test_a_refused_start_leaves_the_student_as_it_was(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of("SFTTrainer", tmp_path, tokenizer, max_steps=1)
    trainer.create_optimizer()
    attach(trainer, curriculum(), objective=HiddenHints(teacher()))
    with pytest.raises(ValueError, match=r"hidden_hints.*optimizer"):
        trainer.train()
    assert not hasattr(trainer.model, MODULE)
