"""The hash of a student's weights: the same wherever the weights are, another when one of them changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from distill_sampler.reading.weights import content_of_weights
from tests import tiny

BARE = content_of_weights(tiny.model())


class Wrapper(nn.Module):
    """As DDP wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def adapted(**changes: Any) -> Any:
    return get_peft_model(tiny.model(), LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, **changes}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny.model(),
        lambda: Wrapper(tiny.model()),
        lambda: torch.compile(tiny.model(), backend="eager"),
        lambda: Wrapper(torch.compile(tiny.model(), backend="eager")),
        lambda: adapted(target_modules="all-linear"),
        lambda: adapted(target_modules=["q_proj", "embed_tokens"]),
        lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        lambda: Wrapper(adapted(target_modules="all-linear")),
    ],
    ids=["same", "DDP", "compiled", "DDP of compiled", "LoRA", "LoRA of embeddings", "saved modules", "DDP of LoRA"],
)
def test_what_wraps_a_model_does_not_count(make: Callable[[], Any]) -> None:
    assert content_of_weights(make()) == BARE


def test_every_weight_counts() -> None:
    for name, _ in tiny.model().named_parameters():
        changed = tiny.model()
        changed.get_parameter(name).data.flatten()[-1] += 1e-3
        assert content_of_weights(changed) != BARE, name
    assert content_of_weights(tiny.model().bfloat16()) != BARE


@pytest.mark.parametrize("factor", ["lora_B", "lora_embedding_A"])
def test_an_adapter_that_was_trained_counts(factor: str) -> None:
    model = adapted(target_modules=["q_proj", "embed_tokens"])
    (trained,) = [each for name, each in model.named_parameters() if factor in name][:1]
    trained.data.flatten()[0] = 1e-3
    assert content_of_weights(model) != BARE


def test_reading_the_weights_changes_nothing() -> None:
    model = tiny.model()
    before = copy.deepcopy(model.state_dict())
    content_of_weights(model)
    assert all(bool((each == before[name]).all()) for name, each in model.state_dict().items())
    model.lm_head.weight.untyped_storage().resize_(0)  # as FSDP does
