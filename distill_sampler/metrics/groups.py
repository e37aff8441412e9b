"""The score of a group of samples, of which some may have no score."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from distill_sampler.protocols import Metric
from distill_sampler.types import FloatArray, IntArray


def group_score(metric: Metric, numbers: Mapping[str, FloatArray], indices: IntArray) -> float:
    """The metric's aggregate over the samples that have all of its numbers; NaN if no sample has.

    Args:
        metric: the metric.
        numbers: by column, `[samples]` each.
        indices: `[n]` the samples of the group.
    """
    columns = {name: numbers[name][indices] for name in metric.columns}
    known = np.all([np.isfinite(values) for values in columns.values()], axis=0)
    if not known.any():
        return math.nan
    return metric.aggregate({name: values[known] for name, values in columns.items()})
