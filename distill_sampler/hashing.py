"""The hash function behind samples' identities and random keys. Vectorised, and the same on every machine."""

from __future__ import annotations

import numpy as np

from distill_sampler.types import HashArray, IntArray


def splitmix64(x: HashArray) -> HashArray:
    """A bijection of 64-bit integers whose values look random (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def content_uniform(input_ids: IntArray, seed: int) -> float:
    """A uniform number in [0, 1) that depends only on a sequence of tokens and a seed.

    Args:
        input_ids: `[length]` the tokens.
        seed: a different seed gives a different number.
    """
    with np.errstate(over="ignore"):
        position = np.arange(len(input_ids), dtype=np.uint64)
        content = splitmix64(splitmix64(input_ids.astype(np.uint64)) + position).sum(dtype=np.uint64)
        drawn = splitmix64(np.array([content ^ splitmix64(np.array([seed], np.uint64))[0]]))[0]
    return float(drawn >> np.uint64(40)) / 2**24  # as many bits as a float32 holds
