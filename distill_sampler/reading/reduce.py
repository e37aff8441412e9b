"""From the statistics of a sample's views to its numbers, with the metric's contract checked on the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from distill_sampler.protocols import Metric
from distill_sampler.reading.token_stats import EXTRAS
from distill_sampler.types import FloatArray, Missing, Sample, TokenStats

ALWAYS = ("surprisal", "rank", "ties")
"""Statistics that every pass gives."""


def reduced(metric: Metric, sample: Sample, stats: Sequence[TokenStats]) -> tuple[FloatArray, Missing]:
    """`[columns]` a metric's numbers for a sample, NaN where it has none, and why.

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
    """Every number that the metrics give, once each, in their order."""
    return list(dict.fromkeys(name for metric in metrics for name in metric.columns))


def data_columns_of(metrics: Iterable[Metric]) -> list[str]:
    """The columns of the data set that the metrics read, once each."""
    return list(dict.fromkeys(name for metric in metrics for name in metric.uses_columns))


def extras_of(metrics: Iterable[Metric]) -> list[str]:
    """The statistics that metrics need besides surprisal, rank and ties.

    Raises:
        ValueError: a metric asks for one that does not exist.
    """
    names: set[str] = set()
    for metric in metrics:
        for name in metric.uses_statistics:
            if name in EXTRAS:
                names.add(name)
            elif name not in ALWAYS:
                raise ValueError(
                    f"{type(metric).__name__}.uses_statistics names '{name}'; there are "
                    f"{', '.join((*ALWAYS, *EXTRAS))}."
                )
    return sorted(names)
