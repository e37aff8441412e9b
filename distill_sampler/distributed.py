"""How processes share the work of scoring, and the only collectives of the library.

All processes go through the same blocks of samples. Each process reads its share of a block, with as many forward
passes as the busiest process: sharded models gather their weights in every forward pass, so all processes must take
part in each one. Then one dense sum gives every process the numbers of the whole block. With one process, nothing is
sent.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from distill_sampler.types import IntArray

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a run, and which one this is."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device of the tensors that are sent: the student's device."""

    @classmethod
    def current(cls, device: torch.device) -> Ranks:
        """The processes of torch's default process group; this one alone if there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(device=device)
        return cls(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """The processes that train a model."""
        return cls.current(next(model.parameters()).device)

    def share(self, tokens: IntArray) -> IntArray:
        """The items of a block that this process reads, in order. All processes compute the same assignment.

        Largest first, each item goes to the process with the fewest tokens so far: `tokens [9, 5, 4, 4]` on two
        processes `-> [0, 3], [1, 2]`. No process gets more than the mean plus one item.

        Args:
            tokens: `[n]` tokens to read for each item.
        """
        load = [(0, rank) for rank in range(self.world_size)]  # a heap of (tokens so far, rank)
        own: list[int] = []
        for item in np.argsort(-tokens, kind="stable").tolist():
            tokens_so_far, rank = load[0]
            heapq.heapreplace(load, (tokens_so_far + int(tokens[item]), rank))
            if rank == self.rank:
                own.append(item)
        return np.sort(np.array(own, np.int64))

    def max_over_ranks(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor([number], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    def elementwise_max(self, values: IntArray) -> IntArray:
        """The elementwise maximum of all processes' arrays, which must have the same shape."""
        if self.world_size == 1:
            return values
        tensor = torch.from_numpy(values.copy()).to(self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.cpu().numpy()

    def elementwise_sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The elementwise sum of all processes' arrays, which must have the same shape. NaN stays NaN."""
        if self.world_size == 1:
            return values
        tensor = torch.from_numpy(values).to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def gather(self, value: T) -> list[T]:
        """All processes' values, in the order of the ranks. The values are pickled."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def require_equal(self, fingerprint: str, what: str) -> None:
        """Stop the run if the processes do not hold the same thing.

        Args:
            fingerprint: hex digits that identify what this process holds.
            what: what it is, for the error message.

        Raises:
            ValueError: the fingerprints differ. Raised on every process, with all fingerprints.
        """
        if self.world_size == 1:
            return
        mine = torch.tensor([int(fingerprint[:12], 16)], device=self.device)
        gathered = [torch.zeros_like(mine) for _ in range(self.world_size)]
        dist.all_gather(gathered, mine)
        fingerprints = [f"{int(other.item()):012x}" for other in gathered]
        if len(set(fingerprints)) > 1:
            raise ValueError(
                f"The processes do not have the same {what}: "
                + ", ".join(f"rank {rank} has {other}" for rank, other in enumerate(fingerprints))
                + ". Give every process the same data in the same order, and the same curriculum."
            )
