"""From the statistics of a sample's views to a metric's numbers, with checks of the metric's contract."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from distill_sampler.protocols import Metric
from distill_sampler.reading.token_stats import EXTRAS
from distill_sampler.types import FloatArray, Missing, Sample, TokenStats

NEAR = ("near_first", "near_second")
"""Statistics that the student's reader gives for views with `parts`."""
ALWAYS = ("surprisal", "rank", "ties")
"""Statistics that every scoring pass computes."""


def reduced(metric: Metric, sample: Sample, stats: Sequence[TokenStats]) -> tuple[FloatArray, Missing]:
    """`[columns]` a metric's numbers for a sample, NaN if it has no score, and the reason.

    Raises:
        ValueError: `reduce` returned other names than the metric's `columns`.
    """
    numbers = np.full(len(metric.columns), np.nan)
    if not all(np.isfinite(stat.surprisal).all() for stat in stats):
        return numbers, Missing.NON_FINITE
    given = metric.reduce(sample, stats)
    if given is None:
        return numbers, Missing.NOT_APPLICABLE
    if set(given) != set(metric.columns):
        raise ValueError(
            f"{type(metric).__name__}.reduce returned {', '.join(map(repr, given)) or 'nothing'}, but its columns are "
            f"{', '.join(map(repr, metric.columns))}. Return exactly these, or None where the metric does not apply."
        )
    numbers[:] = [given[name] for name in metric.columns]
    return numbers, Missing.NOT_APPLICABLE if np.isnan(given[metric.name]) else Missing.NO


def columns_of(metrics: Iterable[Metric]) -> list[str]:
    """The names of all numbers that the metrics give, without repeats, in the metrics' order."""
    return list(dict.fromkeys(name for metric in metrics for name in metric.columns))


def data_columns_of(metrics: Iterable[Metric]) -> list[str]:
    """The columns of the data set that the metrics read, without repeats."""
    return list(dict.fromkeys(name for metric in metrics for name in metric.uses_columns))


def extras_of(metrics: Iterable[Metric]) -> list[str]:
    """The statistics that the metrics need besides surprisal, rank and ties.

    Raises:
        ValueError: a metric needs one that does not exist.
    """
    names: set[str] = set()
    for metric in metrics:
        for name in metric.uses_statistics:
            if name in (*EXTRAS, *NEAR):
                names.add(name)
            elif name not in ALWAYS:
                raise ValueError(
                    f"{type(metric).__name__}.uses_statistics names '{name}', which does not exist. Choose from "
                    f"{', '.join((*ALWAYS, *EXTRAS, *NEAR))}."
                )
    return sorted(names)
