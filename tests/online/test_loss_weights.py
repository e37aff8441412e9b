"""Weights of samples in the loss: exactly the weighted sum of the tokens' losses, however the host gets there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from distill_sampler import (
    Curriculum,
    EpochPlan,
    GlobalNaturalness,
    Scorer,
    Shuffle,
    SortBy,
    WeightBySoftmax,
    attach,
)
from distill_sampler.integrations.loss_weights import LossWeights
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import Batch
from tests import tiny

POLICIES = [WeightBySoftmax("global_naturalness", temperature=0.3), Shuffle()]
RATE = 0.1


def trainer_of(kind: str, output: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Any:
    """A trainer of plain gradient descent, so that the weights move by the gradient itself."""
    extra = {name: changes.pop(name) for name in ("model", "peft_config") if name in changes}
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1e9,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    model = extra.pop("model", None) or tiny.model()
    if kind == "SFTTrainer":
        config = SFTConfig(**{"bf16": False, "gradient_checkpointing": False, "loss_type": "nll", **settings})
        return SFTTrainer(
            model=model, processing_class=tokenizer, train_dataset=tiny.candidates(2), args=config, **extra
        )
    return Trainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=tiny.tokenised(tiny.candidates(2), tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        args=TrainingArguments(**settings),
    )


def weighted(policies: Any = POLICIES) -> Curriculum:
    return Curriculum(metrics=[GlobalNaturalness()], policies=policies, scorer=Scorer(progress=False))


def divisor(trainer: Any) -> int:
    """By what the host divides the gradient. Accelerate divides by the number of accumulation steps that it is told,
    and transformers 5.2 to 5.5 tell it theirs, although their loss is a mean of the whole step's tokens already."""
    return int(trainer.accelerator.gradient_accumulation_steps)


def reference(trainer: Any, curriculum: Curriculum, *, per_step: int, dft: bool = False) -> list[torch.Tensor]:
    """The definition, by hand: each step descends Σ w · loss(token) / tokens, over the samples of the step."""
    model = tiny.model()
    plan = curriculum.plans[0]
    for start in range(0, len(plan), per_step):
        total, tokens = torch.zeros(()), 0
        for index, weight in zip(
            plan.indices[start : start + per_step], plan.weights[start : start + per_step], strict=True
        ):
            row = trainer.train_dataset[int(index)]
            labels = torch.tensor(row["labels"])[1:]
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
            if dft:
                losses = losses * (-losses).exp().detach()
            total = total + float(weight) * losses.sum()
            tokens += int((labels != -100).sum())
        (total / tokens / divisor(trainer)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None
    return list(model.parameters())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Trainer", {}),
        ("Trainer", {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}),
        ("Trainer", {"gradient_checkpointing": True}),
        ("SFTTrainer", {}),
        ("SFTTrainer", {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}),
        ("SFTTrainer", {"padding_free": True, "max_length": None}),
        ("SFTTrainer", {"loss_type": "dft"}),
        ("SFTTrainer", {"dataloader_num_workers": 2, "gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_training_descends_the_weighted_loss(
    kind: str, changes: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = trainer_of(kind, tmp_path, tokenizer, **changes)
    curriculum = weighted()
    attach(trainer, curriculum)
    trainer.train()
    assert np.ptp(curriculum.plans[0].weights) > 0.5
    args = trainer.args
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    expected = reference(trainer, curriculum, per_step=per_step, dft=changes.get("loss_type") == "dft")
    for ours, theirs in zip(trainer.model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_the_weighted_step_does_not_depend_on_batch_size_and_accumulation(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = []
    for size, accumulation in ((6, 1), (3, 2), (2, 3), (1, 6)):
        trainer = trainer_of(
            kind,
            tmp_path,
            tokenizer,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        if divisor(trainer) > 1:
            pytest.skip("without a curriculum, too, a step of this transformers depends on the accumulation steps")
        attach(trainer, weighted())
        trainer.train()
        found.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=2e-6)


@dataclass(frozen=True)
class OnesInTheEnd(Policy):
    """Weights while the trainer is set up, all one when it trains."""

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        weights = np.linspace(0.5, 1.5, len(plan)) if pool.dry_run else np.ones(len(plan))
        return EpochPlan(indices=plan.indices, weights=weights)


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_weights_of_one_change_no_bit(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    runs = []
    for policies in ([Shuffle(), OnesInTheEnd()], [Shuffle()]):
        trainer = trainer_of(kind, tmp_path, tokenizer)
        curriculum = weighted(policies)
        attach(trainer, curriculum)
        trainer.train()
        runs.append((trainer, curriculum))
    (ours, first), (stock, second) = runs
    assert (first.planner.gives_weights, second.planner.gives_weights) == (True, False)
    assert (first.plans[0].weights == 1).all()
    assert first.plans[0] == second.plans[0]
    assert [line.get("loss") for line in ours.state.log_history] == [
        line.get("loss") for line in stock.state.log_history
    ]
    for left, right in zip(ours.model.parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_loss_weights_work_with_adapters(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """One step on one sample: the update is the weight's multiple."""
    order = SortBy("global_naturalness")
    moves = []
    for policies in ([POLICIES[0], order], [order]):
        torch.manual_seed(0)
        trainer = trainer_of(
            "SFTTrainer",
            tmp_path,
            tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
            per_device_train_batch_size=1,
            learning_rate=1e-4,
            max_steps=1,
        )
        curriculum = weighted(policies)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        attach(trainer, curriculum)
        trainer.train()
        after = dict(trainer.model.named_parameters())
        moves.append((curriculum, {name: after[name].detach() - old for name, old in before.items()}))
    (curriculum, ours), (_, stock) = moves
    weight = float(curriculum.plans[0].weights[0])
    assert weight > 1.5
    for name, moved in ours.items():
        torch.testing.assert_close(moved, weight * stock[name], rtol=2e-2, atol=1e-8)


def test_the_first_token_of_a_sample_has_the_weight_of_its_sample() -> None:
    """Padded on the left, it is predicted from a place that is nobody's."""
    model = tiny.model()
    rows, weights = [[5, 6, 7, 8], [9, 10]], [0.5, 1.5]
    tokens = torch.tensor([rows[0], [11, 11, *rows[1]]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    batch = Batch(
        samples=np.array([0, 1]),
        weights=np.array(weights),
        starts=np.array([0, 6]),
        lengths=np.array([4, 2]),
        shape=(2, 4),
        place=0,
        epoch=0,
        step=0,
    )

    def losses() -> torch.Tensor:
        labels = tokens.where(mask == 1, -100)[:, 1:]
        logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")

    tap = LossWeights()
    with tap.open(model, step=0):
        tap.before(batch)
        losses().sum().backward()
        tap.after(batch)
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    (torch.tensor(weights)[:, None] * losses()).sum().backward()
    for gradient, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"torch_compile": True},
        {"use_liger_kernel": True},
        {"loss_type": "chunked_nll"},  # the default of TRL 1.7 to 1.14
    ],
)
def test_settings_under_which_weights_cannot_be_applied_are_refused(
    changes: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = trainer_of("Trainer", tmp_path, tokenizer)
    for name, value in changes.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=next(iter(changes))):
        attach(trainer, weighted())


def test_a_loss_that_bypasses_the_logits_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    class PullsOnTheWeightsAlone(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return sum(parameter.square().sum() for parameter in model.parameters())

    trainer = trainer_of("Trainer", tmp_path, tokenizer)
    trainer.__class__ = PullsOnTheWeightsAlone
    attach(trainer, weighted())
    with pytest.raises(ValueError, match=r"does not depend on the logits.*SampleBySoftmax"):
        trainer.train()


def test_a_collator_that_changes_tokens_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of("Trainer", tmp_path, tokenizer)
    collate = trainer.data_collator

    def cut(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: values[:, :-3] for name, values in collate(rows).items()}

    trainer.data_collator = cut
    attach(trainer, weighted())
    with pytest.raises(ValueError, match="does not hold the tokens of sample"):
        trainer.train()
