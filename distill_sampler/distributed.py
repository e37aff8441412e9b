"""Who scores what, and the only collectives of the library.

Every process walks through the same blocks of samples. Of each block it reads its own share, with as many forwards as
the busiest process (sharded models gather their weights in every forward, so all must take part in each), and one
dense sum puts the numbers of the whole block on every process. With one process nothing is ever sent.
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
    """The processes of this run, and which one this is."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where tensors that are sent must lie: the student's device."""

    @classmethod
    def current(cls, device: torch.device) -> Ranks:
        """Those of torch's default process group; alone if there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(device=device)
        return cls(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Those that a student is trained by."""
        return cls.current(next(model.parameters()).device)

    def share(self, tokens: IntArray) -> IntArray:
        """Which pieces of a block this process reads, in their order. Every process finds the same shares.

        The largest piece first, each goes to the process with the fewest tokens so far: `tokens [9, 5, 4, 4]` on two
        processes `-> [0, 3], [1, 2]`. No process has more than the mean and one piece.

        Args:
            tokens: `[n]` how much there is to read of each piece.
        """
        busy = [(0, rank) for rank in range(self.world_size)]  # a heap: tokens so far, and whose
        places: list[int] = []
        for place in np.argsort(-tokens, kind="stable").tolist():
            so_far, rank = busy[0]
            heapq.heapreplace(busy, (so_far + int(tokens[place]), rank))
            if rank == self.rank:
                places.append(place)
        return np.sort(np.array(places, np.int64))

    def max_over_ranks(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor([number], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    def elementwise_max(self, values: IntArray) -> IntArray:
        """At each place the largest of the processes' numbers, in arrays of one shape."""
        if self.world_size == 1:
            return values
        tensor = torch.from_numpy(values.copy()).to(self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.cpu().numpy()

    def elementwise_sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The sum over processes of arrays of one shape. A NaN stays a NaN."""
        if self.world_size == 1:
            return values
        tensor = torch.from_numpy(values).to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of the ranks. The values are pickled."""
        if self.world_size == 1:
            return [value]
        everyones: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyones, value)
        return everyones

    def require_equal(self, fingerprint: str, what: str) -> None:
        """Stop the run if the processes do not hold the same thing.

        Raises:
            ValueError: on every process, naming which differ.
        """
        if self.world_size == 1:
            return
        mine = torch.tensor([int(fingerprint[:12], 16)], device=self.device)
        everyones = [torch.zeros_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyones, mine)
        fingerprints = [f"{int(other.item()):012x}" for other in everyones]
        if len(set(fingerprints)) > 1:
            raise ValueError(
                f"The processes do not have the same {what}: "
                + ", ".join(f"rank {rank} has {other}" for rank, other in enumerate(fingerprints))
                + ". Give every process the same data in the same order, and the same curriculum."
            )
