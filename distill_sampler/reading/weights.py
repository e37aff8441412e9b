"""The content of a model's weights, as one hash that is the same wherever the model is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill_sampler.serialize import hash_of

_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_ADAPTER = re.compile(r"\.lora_(A|B|embedding_A|embedding_B)\.")
_STARTS_AT_ZERO = re.compile(r"\.lora_(B|embedding_A)\.")
"""The factors of a LoRA that are zero before training, so that it changes nothing."""


def content_of_weights(model: nn.Module) -> str:
    """16 hex digits: a hash of a model's weights by their names, equal for models that compute the same.

    What wraps the model for training (DDP, FSDP, `torch.compile`) does not count, and neither does a LoRA that was not
    trained yet. With FSDP all processes must call it, because each weight is gathered.

    Raises:
        ValueError: the weights are spread over the processes by DeepSpeed, so that none can be read.
    """
    untrained = _has_untrained_adapter(model)
    # one weight at a time: of a sharded model, no more must be in memory at once
    found = {name: xxhash.xxh3_128_hexdigest(_bytes_of(tensor)) for name, tensor in _parameters(model, untrained)}
    return hash_of(*(f"{name} {content}".encode() for name, content in sorted(found.items())))


def _parameters(model: nn.Module, without_adapter: bool) -> Iterator[tuple[str, Tensor]]:
    """The parameters with the names that they have in the bare model."""
    for name, parameter in _whole(model.named_parameters()):
        if ".original_module." in name or (without_adapter and _ADAPTER.search(name)):
            continue
        bare = _WRAPPERS.sub(r"\1", name)
        bare = re.sub(r"\.{2,}", ".", bare).lstrip(".").removeprefix("base_model.model.")
        yield bare.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."), parameter


def _whole(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in parameters:
        if hasattr(parameter, "ds_tensor"):
            raise ValueError(
                "scores=: DeepSpeed's ZeRO-3 spreads the student's weights over the processes, so they cannot be "
                "compared with those that the file was made with. Use ZeRO-2 or FSDP, or leave scores= out."
            )
        local = parameter.detach()
        yield name, local.full_tensor() if isinstance(local, DTensor) else local


def _has_untrained_adapter(model: nn.Module) -> bool:
    factors = [each for name, each in model.named_parameters() if _STARTS_AT_ZERO.search(name)]
    return bool(factors) and all(
        not bool(each.detach().any()) for _, each in _whole(("", factor) for factor in factors)
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    # a copy, because FSDP cannot resize memory that numpy has seen
    return tensor.reshape(-1).to("cpu", copy=True).view(torch.uint8).numpy().data
