"""Which positions of a batch count in an objective, and with which weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill_sampler.types import Batch

IGNORED = -100
"""The label of tokens that are not trained on, as in torch's cross entropy."""


def predicting(inputs: Mapping[str, Any]) -> Tensor:
    """`[rows, width]` True at the positions whose next token is trained on.

    Raises:
        ValueError: the batch has no labels.
    """
    if "labels" not in inputs:
        raise ValueError(
            f"The batch has {', '.join(inputs)} but no labels, so it is not known which tokens an objective counts. "
            "Let the data collator return labels, or leave out objective=."
        )
    labels: Tensor = inputs["labels"]
    counted = torch.zeros_like(labels, dtype=torch.bool)
    counted[:, :-1] = labels[:, 1:] != IGNORED
    return counted


def weights_of_tokens(batch: Batch) -> Tensor:
    """`[rows, width]` float32: the loss weight of each token's sample; 1 for padding."""
    weights = torch.ones(math.prod(batch.shape))
    for start, length, weight in zip(batch.starts, batch.lengths, batch.weights, strict=True):
        weights[start : start + length] = float(weight)
    return weights.reshape(batch.shape)


def weights_of_positions(batch: Batch) -> Tensor:
    """`[rows, width]` float32: for each position, the loss weight of the sample whose token it predicts."""
    weights = weights_of_tokens(batch)
    return torch.cat([weights[:, 1:], weights.new_ones(len(weights), 1)], 1)
