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

from distill_sampler.reading.structure import forward_of
from distill_sampler.reading.token_stats import compilation_allowed

_VARIANTS = 64
"""How many compiled versions of a layer's forward may exist. All students of a process share them, because transformers
gives the layers of most models one `forward`; a model needs one to four. Beyond that, torch compiles no more."""


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """A decoder's layers: the modules of its first list, each once."""
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    return list(dict.fromkeys(next(lists, [])))


def not_compilable(decoder: nn.Module) -> str:
    """Why a decoder's layers cannot be compiled, in words; empty if they can."""
    layers = layers_of(decoder)
    if not layers:
        return f"{type(decoder).__name__} has no list of layers"
    replaced = (layer.__dict__["forward"] for layer in layers if "forward" in layer.__dict__)
    if any(getattr(each, "func", None) is not _call for each in replaced):
        return "something else has replaced their forward, such as hooks that move or gather weights"
    plain = (type(each.data) is torch.Tensor and each.numel() for layer in layers for each in layer.parameters())
    return "" if all(plain) else "their weights are sharded"


@contextmanager
def compiled_layers(decoder: nn.Module) -> Iterator[None]:
    """Compile the layers' forward passes inside, where `not_compilable` has no objection."""
    from torch._dynamo import config  # only here: it takes a second

    settings: dict[str, Any] = {
        "skip_nnmodule_hook_guards": False,  # a hook that is added later must be called
        "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit": _VARIANTS,
    }
    with ExitStack() as inside:
        inside.enter_context(config.patch(settings))
        for layer in layers_of(decoder):
            inside.enter_context(forward_of(layer, partial(_call, layer)))
        yield


def _call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    from torch._dynamo.exc import TorchDynamoException

    try:
        with compilation_allowed():
            return _compiled(type(layer).forward)(layer, *args, **kwargs)
    except TorchDynamoException as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"Scorer(compile_layers=True): {type(layer).__name__} cannot be compiled ({reason}). Leave it out."
        ) from error


@cache
def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(forward, dynamic=True)
