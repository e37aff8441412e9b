"""The one hash function that gives samples an identity and random keys. Vectorised, the same on every machine."""

from __future__ import annotations

import numpy as np

from distill_sampler.types import HashArray


def splitmix64(x: HashArray) -> HashArray:
    """A bijection of 64-bit integers that looks random (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
