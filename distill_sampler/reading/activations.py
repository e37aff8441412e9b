"""How alike the activations of a view's tokens are, reduced while the view is read: no activation is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_sampler.types import View

NEAR = {"near_first", "near_second"}
"""The statistics that are made here."""

_POSITIONS = 2048
"""Positions whose activations are held in float32 at a time."""


@contextmanager
def last_activations(model: nn.Module) -> Iterator[list[Tensor]]:
    """The output of the last layer's `mlp.up_proj` in each forward pass inside, `[rows, length, width]`.

    Raises:
        ValueError: the model has no module of that name.
    """
    found = [module for name, module in model.named_modules() if name.endswith("mlp.up_proj")]
    if not found:
        raise ValueError(
            f"Scas reads the activations of the last layer's mlp.up_proj, which {type(model).__name__} does not have "
            "(Phi-3 and GPT-2 call it otherwise). Use another metric for this model, such as Lark."
        )
    seen: list[Tensor] = []

    def see(module: nn.Module, args: Any, output: Tensor) -> None:
        seen[:] = [output.detach()]

    handle = found[-1].register_forward_hook(see)
    try:
        yield seen
    finally:
        handle.remove()


def nearness(activations: Tensor, view: View, start: int, *, lead: int = 0) -> dict[str, Any]:
    """For each scored token, its mean cosine with the tokens of each of the view's parts, by name of the statistic.

    The mean of cosines is the product with the mean of the unit activations, so no pair of tokens is ever made.

    Args:
        activations: `[length, width]` of the view's tokens from `start` on; what follows them is padding.
        view: with `parts`.
        start: tokens at the view's start that were read before.
        lead: states in front of the tokens' own.
    """
    assert view.parts is not None
    length = len(view.input_ids) - start
    parts = torch.from_numpy(np.asarray(view.parts[start:])).to(activations.device)
    places = [range(begin, min(begin + _POSITIONS, length)) for begin in range(0, length, _POSITIONS)]

    def unit(place: range) -> Tensor:
        some = activations[lead + place.start : lead + place.stop].float()
        return nn.functional.normalize(some, dim=-1)

    means = torch.zeros(2, activations.shape[-1], device=activations.device)
    for place in places:
        for part in (0, 1):
            means[part] += unit(place)[parts[place.start : place.stop] == part].sum(0)
    means /= torch.stack([(parts == part).sum() for part in (0, 1)]).clamp(min=1)[:, None]
    near = torch.cat([unit(place) @ means.T for place in places])[torch.from_numpy(view.scored[start:])]
    first, second = near.cpu().numpy().T
    return {"near_first": first.copy(), "near_second": second.copy()}
