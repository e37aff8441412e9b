"""Which samples are read and reported together: units of samples that share a prompt, and blocks of a few batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from distill_sampler.dataset import ScoredDataset
from distill_sampler.metrics.response import response_view
from distill_sampler.reading.batching import WORTH_SHARING
from distill_sampler.types import IntArray


def units_of(dataset: ScoredDataset, indices: IntArray, unit_tokens: int) -> IntArray:
    """`[n]` the unit of each sample. Samples of one unit share a prompt that is worth sharing, and are read together.

    Units of more than `unit_tokens` tokens are split, so that a block has work for several processes.
    """
    group, prompt = _prompts(dataset, indices)
    lengths = dataset.lengths[indices]
    members, tokens = np.bincount(group)[group], np.bincount(group, lengths)[group]
    shares = (members > 1) & ((members - 1) * prompt * WORTH_SHARING >= tokens)
    by_group = np.argsort(group, kind="stable")
    before = np.cumsum(lengths[by_group]) - lengths[by_group]
    first = np.r_[True, np.diff(group[by_group]) != 0]
    before -= np.maximum.accumulate(np.where(first, before, 0))  # tokens of its group before each sample
    piece = np.empty_like(group)
    piece[by_group] = before // unit_tokens
    keys = np.stack([group, piece, np.where(shares, -1, np.arange(len(indices)))])
    units: IntArray = np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)
    return units


def _prompts(dataset: ScoredDataset, indices: IntArray) -> tuple[IntArray, IntArray]:
    """`[n]` a number for each distinct prompt, and `[n]` how many of its tokens can be shared: all but the last, which
    predicts the first scored token."""
    numbers: dict[bytes, int] = {}
    group, length = np.empty((2, len(indices)), np.int64)
    for start in range(0, len(indices), 1024):
        for place, sample in enumerate(dataset.samples(indices[start : start + 1024]), start):
            prompt = response_view(sample).shareable
            key = hashlib.blake2b(prompt.tobytes(), digest_size=16).digest()
            group[place], length[place] = numbers.setdefault(key, len(numbers)), len(prompt)
    return group, length


def blocks_of(lengths: IntArray, units: IntArray, block_tokens: int) -> Iterator[slice]:
    """Consecutive slices of about `block_tokens` tokens that split no unit. A block is read and reported as a whole."""
    begins = np.r_[True, np.diff(units) != 0]
    block = (np.cumsum(lengths) - lengths) // block_tokens
    block = np.maximum.accumulate(np.where(begins, block, 0))
    bounds = np.r_[0, np.flatnonzero(np.diff(block)) + 1, len(block)]
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        yield slice(start, stop)
