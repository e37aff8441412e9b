"""Gathers the output head's weights where training shards them over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


@contextmanager
def whole_head(head: nn.Module) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The full weight and bias of a linear head. ZeRO-3 and FSDP2 gather them, so every process must enter."""
    weight, bias = head.weight, head.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    if isinstance(weight, DTensor):
        yield weight.full_tensor(), bias.full_tensor() if isinstance(bias, DTensor) else bias
    elif is_deepspeed_zero3_enabled():  # type: ignore[no-untyped-call]
        import deepspeed  # type: ignore[import-untyped]

        # a weight that is tied to the embedding may be gathered already, and DeepSpeed refuses to gather it twice
        sharded = [part for part in (weight, bias) if part is not None and part.numel() == 0]
        with deepspeed.zero.GatheredParameters(sharded):
            yield weight, bias
    else:
        yield weight, bias
