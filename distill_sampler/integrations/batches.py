"""Where each sample is in a host's batch: in a padded row of its own, or end to end with others in one row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_sampler.dataset import ScoredDataset
from distill_sampler.types import Batch, EpochPlan, IntArray

_WITHOUT_TAPS = "This check is only made with sample_log=True, observe=True, weighting policies or taps of your own."


def layout(inputs: Mapping[str, Any]) -> tuple[IntArray, IntArray]:
    """`([rows], [rows])`: where each sample begins in the flattened `input_ids`, and how many tokens it has.

    The attention mask shows the padding. Without a mask, position ids that start again at 0 separate the samples of a
    single row.

    Raises:
        ValueError: the batch has no token ids.
    """
    if "input_ids" not in inputs:
        raise ValueError(
            f"The batch has {', '.join(inputs)} but no input_ids, so its samples cannot be identified. {_WITHOUT_TAPS}"
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
    inputs: Mapping[str, Any],
    plan: EpochPlan,
    dataset: ScoredDataset,
    *,
    place: int,
    stop: int | None = None,
    epoch: int,
    step: int,
) -> Batch:
    """Which samples a host's batch holds: the plan's samples from `place` on, after a comparison of their tokens.

    Args:
        inputs: the host's batch.
        plan: the epoch's plan.
        dataset: the samples with their tokens.
        place: position of the batch's first sample in the plan.
        stop: position behind its last sample; None: it is not known.
        epoch: from 0.
        step: optimizer steps taken so far.

    Raises:
        ValueError: the batch has no token ids, or holds other tokens than the planned samples.
    """
    starts, lengths = layout(inputs)
    if plan.packs is not None and stop is not None:
        # what follows completes the row to a multiple of some number of tokens
        starts, lengths = starts[: stop - place], lengths[: stop - place]
        if len(starts) < stop - place:
            raise ValueError(
                f"The batch holds {len(starts)} samples where the packs of epoch {epoch} have {stop - place} from "
                f"place {place} on. The collator must lay samples end to end, with position ids that restart."
            )
    tokens = inputs["input_ids"].cpu().numpy().reshape(-1)
    # the plan's first samples complete the last step of an epoch
    places = (place + np.arange(len(starts))) % len(plan)
    samples = plan.indices[places]
    for row, sample in enumerate(dataset.samples(samples)):
        if not np.array_equal(tokens[starts[row] : starts[row] + lengths[row]], sample.input_ids):
            raise ValueError(
                f"The batch does not hold the tokens of sample {sample.index}, which the plan of epoch {epoch} has at "
                f"place {places[row]}, so training does not follow the plan. If your own collator or data loader "
                "changes, truncates or reorders rows, do that in the data set, before attach. " + _WITHOUT_TAPS
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
