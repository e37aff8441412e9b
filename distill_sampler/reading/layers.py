"""A student's layers through `torch.compile`, for passes that are long enough to make up for the compilation.

A small student on an accelerator spends most of a forward on elementwise operations between the products, and on
launching them. Compilation fuses them. All layers of a kind share one compiled function, so it takes seconds, and it
serves any number of rows and any length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from distill_sampler.reading.token_stats import compilation_allowed


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """A decoder's layers: the modules of its first list."""
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    return list(next(lists, []))


def not_compilable(decoder: nn.Module) -> str:
    """Why a decoder's layers cannot be compiled, in words; empty if they can."""
    layers = layers_of(decoder)
    if not layers:
        return f"{type(decoder).__name__} has no list of layers"
    if any("forward" in layer.__dict__ for layer in layers):
        return "something else has replaced their forward, such as hooks that move or gather weights"
    plain = (type(each.data) is torch.Tensor and each.numel() for layer in layers for each in layer.parameters())
    return "" if all(plain) else "their weights are sharded"


@contextmanager
def compiled_layers(decoder: nn.Module) -> Iterator[None]:
    """Compile the layers' forward passes inside, where `not_compilable` has no objection."""
    with ExitStack() as replaced:
        for layer in layers_of(decoder):
            layer.forward = partial(_call, layer)
            replaced.callback(layer.__dict__.pop, "forward")
        yield


def _call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with compilation_allowed():
        return _compiled(type(layer).forward)(layer, *args, **kwargs)


@cache
def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(forward, dynamic=True)
