"""Where the samples of a host's batch are: padded in rows, or laid end to end in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_sampler.dataset import ScoredDataset
from distill_sampler.types import Batch, EpochPlan, IntArray

_WITHOUT_TAPS = "Leave out sample_log=True, observe=True, policies that weight, and taps of your own."


def layout(inputs: Mapping[str, Any]) -> tuple[IntArray, IntArray]:
    """`([rows], [rows])`: where the tokens of each sample begin in the flattened `input_ids`, and how many they are.

    Padding is told by the attention mask; without one, samples laid end to end by their position ids.

    Raises:
        ValueError: the batch has no token ids.
    """
    if "input_ids" not in inputs:
        raise ValueError(
            f"The batch has {', '.join(inputs)} but no input_ids, so its samples cannot be recognised. {_WITHOUT_TAPS}"
        )
    rows, width = inputs["input_ids"].shape
    first = np.arange(rows) * width
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"].cpu().numpy() != 0
        return first + mask.argmax(1), mask.sum(1).astype(np.int64)
    if "position_ids" in inputs and rows == 1:
        starts = np.flatnonzero(inputs["position_ids"][0].cpu().numpy() == 0)
        return starts, np.diff(starts, append=width)
    return first, np.full(rows, width)


def rows_of(inputs: Mapping[str, Any]) -> list[IntArray]:
    """The tokens of each sample of a batch, without padding.

    Raises:
        ValueError: the batch has no token ids.
    """
    starts, lengths = layout(inputs)
    tokens = inputs["input_ids"].cpu().numpy().reshape(-1)
    return [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def batch_of(
    inputs: Mapping[str, Any], plan: EpochPlan, dataset: ScoredDataset, *, place: int, epoch: int, step: int
) -> Batch:
    """Which samples a host's batch holds: those that the plan has from `place` on, made sure of by their tokens.

    Args:
        inputs: the host's batch.
        plan: the epoch's.
        dataset: where the samples are.
        place: position of the batch's first sample in the plan.
        epoch: from 0.
        step: optimizer steps taken so far.

    Raises:
        ValueError: the batch has no token ids, or holds other tokens than the planned samples'.
    """
    starts, lengths = layout(inputs)
    # the last step of an epoch is completed from the plan's start
    places = (place + np.arange(len(starts))) % len(plan)
    samples = plan.indices[places]
    for row, (tokens, sample) in enumerate(zip(rows_of(inputs), dataset.samples(samples), strict=True)):
        if not np.array_equal(tokens, sample.input_ids):
            raise ValueError(
                f"The batch does not hold the tokens of sample {sample.index}, which the plan of epoch {epoch} has at "
                f"place {places[row]}, so what is trained on is not what was planned. Is there a collator or a data "
                "loader of your own that changes, cuts or reorders? Do that in the data set, before attach. "
                + _WITHOUT_TAPS
            )
    return Batch(
        samples=samples,
        weights=plan.weights[places],
        starts=starts,
        lengths=lengths,
        shape=tuple(inputs["input_ids"].shape),
        place=place,
        epoch=epoch,
        step=step,
    )
