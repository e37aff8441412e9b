"""Copies between the host and an accelerator that neither waits for.

On CUDA, copies to and from pinned memory run in the order of the stream, while the host goes on. Elsewhere they wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def moved(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """An array as a tensor on a device."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Copies:
    """Copies of tensors on the host, begun at once.

    Args:
        tensors: by name, all on one device.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        on_cuda = any(tensor.is_cuda for tensor in tensors.values())
        # on CUDA, torch puts the result of a copy that does not wait into pinned memory
        self._tensors = {name: tensor.to("cpu", non_blocking=on_cuda) for name, tensor in tensors.items()}
        self._end = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]
        if self._end is not None:
            self._end.record(torch.cuda.current_stream(next(iter(tensors.values())).device))

    def arrays(self) -> dict[str, Any]:
        """The tensors as arrays, when all copies have ended."""
        if self._end is not None:
            self._end.synchronize()
            # out of pinned memory, of which there is little: statistics may be kept for long
            return {name: tensor.numpy().copy() for name, tensor in self._tensors.items()}
        return {name: tensor.numpy() for name, tensor in self._tensors.items()}
