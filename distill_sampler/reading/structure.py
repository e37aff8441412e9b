"""The parts of a causal language model of transformers, inside whatever the host has wrapped around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def unwrap(model: nn.Module) -> Any:
    """The language model inside DDP, DeepSpeed and `torch.compile` wrappers.

    Raises:
        ValueError: there is none with an output head.
    """
    inner: Any = model
    # tested on the class, because some wrappers (DeepSpeed's engine) forward attributes to the model inside
    while not hasattr(type(inner), "get_output_embeddings"):
        parts = dict(inner.named_children())
        wrapped = parts.get("module", parts.get("_orig_mod"))
        if wrapped is None:
            break
        inner = wrapped
    if not callable(getattr(inner, "get_output_embeddings", None)):  # peft's adapters forward it
        raise ValueError(
            f"{type(model).__name__} is not a causal language model of transformers: it has no output head "
            "(get_output_embeddings), so there is nothing to score with."
        )
    if inner.get_output_embeddings() is None:
        raise ValueError(
            f"{type(inner).__name__} has no output head. Load the student with AutoModelForCausalLM, not AutoModel."
        )
    return inner


def decoder_of(student: Any) -> nn.Module:
    """The module that makes the hidden states which a causal language model's output head reads.

    For some architectures, transformers before 5.0 gives the whole model.
    """
    decoder: Any = student.get_decoder()
    whole = callable(getattr(decoder, "get_output_embeddings", None)) and decoder.get_output_embeddings() is not None
    inner: nn.Module = decoder.base_model if whole else decoder
    return inner


@contextmanager
def forward_of(head: nn.Module, forward: Any) -> Iterator[None]:
    """Replace a module's `forward` on the instance, so that hooks that gather sharded weights still run."""
    before = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which the active autocast rounds the factors of products; None if autocast is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
