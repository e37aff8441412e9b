"""The likeliest tokens in each place, taken from the logits while they exist."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from distill_sampler.reading.head import Project


class TopK:
    """An output head that keeps the `k` largest log-probabilities of every row of logits it makes.

    Args:
        project: the output head.
        k: how many to keep, at most as many as there are columns.
    """

    def __init__(self, project: Project, k: int) -> None:
        self._project = project
        self._k = k
        self._pieces: list[tuple[Tensor, Tensor]] = []

    def __call__(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        logits = self._project(hidden)
        values, ids = logits.topk(self._k, dim=1)
        self._pieces.append((ids, values - logits.logsumexp(1, keepdim=True)))
        return logits

    def stats(self) -> dict[str, Tensor]:
        """`top_ids` and `top_logprobs` of all rows so far, `[tokens, k]` each, the likeliest first."""
        if not self._pieces:
            return {"top_ids": torch.zeros(0, self._k, dtype=torch.int64), "top_logprobs": torch.zeros(0, self._k)}
        ids, logprobs = (torch.cat(pieces) for pieces in zip(*self._pieces, strict=True))
        return {"top_ids": ids, "top_logprobs": logprobs}
