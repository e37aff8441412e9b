"""The score of a group of samples, whichever of them have one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from distill_sampler.types import FloatArray, IntArray, Metric


def group_score(metric: Metric, numbers: Mapping[str, FloatArray], indices: IntArray) -> float:
    """The metric's aggregate over those of some samples that have every one of its numbers; NaN if none has.

    Args:
        metric: whose score.
        numbers: `[samples]` each.
        indices: `[n]` the samples of the group.
    """
    columns = {name: numbers[name][indices] for name in metric.columns}
    known = np.all([np.isfinite(values) for values in columns.values()], axis=0)
    if not known.any():
        return math.nan
    return metric.aggregate({name: values[known] for name, values in columns.items()})
