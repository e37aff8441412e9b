"""Which samples are read and reported together: units of samples that share a prompt, and blocks of a few batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distill_sampler.dataset import ScoredDataset
from distill_sampler.policies.keys import first_of_each
from distill_sampler.reading.batching import WORTH_SHARING
from distill_sampler.types import IntArray


def in_reading_order(
    dataset: ScoredDataset, indices: IntArray, *, unit_tokens: int | None
) -> tuple[IntArray, IntArray]:
    """Samples in the order in which they are read: the unit with the longest sample first, in a unit the longest first.

    Args:
        dataset: where the samples are.
        indices: `[n]` the samples, at least one.
        unit_tokens: see `units_of`. None: each sample is a unit.

    Returns:
        `[n]` the samples in order, and `[n]` the unit of each.
    """
    units = np.arange(len(indices)) if unit_tokens is None else units_of(dataset, indices, unit_tokens)
    lengths = dataset.lengths[indices]
    by_unit = np.argsort(units << 32 | (2**32 - 1 - lengths), kind="stable")
    starts = np.flatnonzero(first_of_each(units[by_unit]))
    longest = lengths[by_unit[starts]]
    order = by_unit[_reordered(starts, len(units), np.argsort(-longest, kind="stable"))]
    return indices[order], units[order]


def units_of(dataset: ScoredDataset, indices: IntArray, unit_tokens: int) -> IntArray:
    """`[n]` the unit of each sample. Samples of one unit share a prompt that is worth sharing, and are read together.

    Units of more than `unit_tokens` tokens are split, so that a block has work for several processes.
    """
    prompts = dataset.prompt_hash[indices]
    by_hash = np.argsort(prompts, kind="stable")
    starts = np.flatnonzero(first_of_each(prompts[by_hash]))
    # prompts in the order of their first appearance, and within a prompt the samples in the given order
    by_prompt = by_hash[_reordered(starts, len(prompts), np.argsort(by_hash[starts]))]
    first = first_of_each(prompts[by_prompt])
    starts = np.flatnonzero(first)
    members = np.diff(np.r_[starts, len(prompts)])
    lengths = dataset.lengths[indices][by_prompt]
    tokens = np.add.reduceat(lengths, starts)
    length_of_prompt = dataset.prompt_lengths[indices][by_prompt[starts]]
    shares = (members > 1) & ((members - 1) * length_of_prompt * WORTH_SHARING >= tokens)
    before = np.cumsum(lengths) - lengths
    before -= np.repeat(before[starts], members)  # tokens before it in its group
    begins = first | first_of_each(before // unit_tokens) | np.repeat(~shares, members)
    units = np.empty(len(prompts), np.int64)
    units[by_prompt] = np.cumsum(begins) - 1
    return units


def _reordered(starts: IntArray, n: int, order: IntArray) -> IntArray:
    """`[n]` the positions of runs that are laid end to end in another order.

    Runs that start at `[0, 2, 3]` of 5 positions, in the order `[2, 0, 1] -> [3, 4, 0, 1, 2]`.
    """
    sizes = np.diff(np.r_[starts, n])[order]
    shift = starts[order] - (np.cumsum(sizes) - sizes)
    return np.repeat(shift, sizes) + np.arange(n)


def blocks_of(lengths: IntArray, units: IntArray, block_tokens: int) -> Iterator[slice]:
    """Consecutive slices of about `block_tokens` tokens that split no unit. A block is read and reported as a whole."""
    begins = np.r_[True, np.diff(units) != 0]
    block = (np.cumsum(lengths) - lengths) // block_tokens
    block = np.maximum.accumulate(np.where(begins, block, 0))
    bounds = np.r_[0, np.flatnonzero(np.diff(block)) + 1, len(block)]
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        yield slice(start, stop)
