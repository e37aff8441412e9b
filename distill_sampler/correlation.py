"""Rank correlation."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def spearman(left: npt.ArrayLike, right: npt.ArrayLike) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; NaN if one side is constant."""
    a, b = _mid_ranks(np.asarray(left)), _mid_ranks(np.asarray(right))
    if a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def _mid_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    result: npt.NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return result
