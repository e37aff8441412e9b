"""Metric expressions: a column, or several metrics combined, usable wherever a policy takes the name of a metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.keys import descending_bits, first_of_each, sort_by
from distill_sampler.protocols import Metric, Pool
from distill_sampler.types import EncodedColumn, FloatArray


@runtime_checkable
class MetricExpression(Protocol):
    """A score computed from other scores. Calling it gives `[samples]` numbers; higher is better, NaN: no score."""

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        """Names of the metrics it reads from the pool."""
        return ()

    @property
    def uses_columns(self) -> tuple[str, ...]:
        """Names of the data set's columns it reads from the pool."""
        return ()

    def __call__(self, pool: Pool) -> FloatArray: ...


@documents_fields
@dataclass(frozen=True)
class Column(MetricExpression):
    """A numeric column of the data set as a score: `SortBy(Column("difficulty", higher_is_better=False))`.

    Numbers and booleans (True counts as 1) are scores. A sample without a value has no score.
    """

    name: str
    """The column."""
    higher_is_better: bool = True
    """Whether samples with larger values are better."""

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return (self.name,)

    def values(self, pool: Pool) -> npt.NDArray[np.float64]:
        """`[samples]` the column's numbers as they are; NaN where a sample has none.

        Raises:
            ValueError: the column holds something else than numbers.
        """
        return numbers_of(pool.column(self.name), self.name)

    def __call__(self, pool: Pool) -> FloatArray:
        values = self.values(pool)
        return values if self.higher_is_better else -values


@documents_fields
@dataclass(frozen=True, init=False, repr=False)
class RankAverage(MetricExpression):
    """The mean of a sample's ranks by several metrics, which does not depend on the metrics' units.

    Each metric ranks the samples of the pool that have every score, from near 0 (worst) to near 1 (best). Equal scores
    share the mean of their ranks. A sample that lacks one of the scores gets none. Trade-off: ranks do not show how
    much better one sample is than the next. This is Borda's count in the form of Dwork et al. (2001).
    """

    metrics: tuple[str | MetricExpression, ...]
    """Names of the metrics, or expressions."""
    weights: tuple[float, ...] | None
    """How much each metric counts, in the same order. None: all equally."""

    def __init__(self, *metrics: str | MetricExpression, weights: Sequence[float] | None = None) -> None:
        if not metrics:
            raise ValueError("RankAverage(): name at least one metric.")
        if weights is not None and (
            len(weights) != len(metrics) or not all(0 <= weight < math.inf for weight in weights) or not sum(weights)
        ):
            raise ValueError(
                f"RankAverage(weights={weights}): give one weight for each of the {len(metrics)} metrics, none "
                f"negative and not all zero."
            )
        object.__setattr__(self, "metrics", metrics)
        object.__setattr__(self, "weights", None if weights is None else tuple(weights))

    def __repr__(self) -> str:
        weights = "" if self.weights is None else f", weights={self.weights}"
        return f"RankAverage({', '.join(map(repr, self.metrics))}{weights})"

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return metric_names(*self.metrics)

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return column_names(*self.metrics)

    def __call__(self, pool: Pool) -> FloatArray:
        goodness = [pool.goodness(metric) for metric in self.metrics]
        scored = np.flatnonzero(~np.any(np.isnan(goodness), axis=0))
        result = np.full(len(pool.content_hash), np.nan)
        if len(scored):
            ranks = [rank_shares(numbers[scored]) for numbers in goodness]
            result[scored] = np.average(ranks, axis=0, weights=self.weights)
        return result


@documents_fields
@dataclass(frozen=True, init=False, repr=False)
class Lexicographic(MetricExpression):
    """Rank by the first metric; use each next one only where all metrics before it tie.

    Useful if the first metrics have few distinct values (correct or not, a count). A sample that lacks one of the
    scores gets none.
    """

    metrics: tuple[str | MetricExpression, ...]
    """Names of the metrics, or expressions, the most important first."""

    def __init__(self, *metrics: str | MetricExpression) -> None:
        if not metrics:
            raise ValueError("Lexicographic(): name at least one metric.")
        object.__setattr__(self, "metrics", metrics)

    def __repr__(self) -> str:
        return f"Lexicographic({', '.join(map(repr, self.metrics))})"

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return metric_names(*self.metrics)

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return column_names(*self.metrics)

    def __call__(self, pool: Pool) -> FloatArray:
        goodness = [pool.goodness(metric) for metric in self.metrics]
        scored = np.flatnonzero(~np.any(np.isnan(goodness), axis=0))
        first, *then = (descending_bits(numbers[scored]) for numbers in goodness)
        order = sort_by(first, *((bits, shift) for bits in then for shift in (32, 0)))
        better = np.any([first_of_each(bits[order]) for bits in (first, *then)], axis=0)
        result = np.full(len(pool.content_hash), np.nan)
        result[scored[order]] = -np.cumsum(better, dtype=np.float64)  # [-1, -1, -2, ...] from the best down
        return result


def metric_names(*metrics: str | MetricExpression) -> tuple[str, ...]:
    """The names of all metrics that these names and expressions read, each once.

    Raises:
        ValueError: one of them is neither.
    """
    _require_names(metrics)
    names = [name for metric in metrics for name in ((metric,) if isinstance(metric, str) else metric.uses_metrics)]
    return tuple(dict.fromkeys(names))


def column_names(*metrics: str | MetricExpression | None) -> tuple[str, ...]:
    """The names of all columns of the data set that these expressions read, each once.

    Raises:
        ValueError: one of them is neither the name of a metric nor an expression.
    """
    given = [metric for metric in metrics if metric is not None]
    _require_names(given)
    names = [name for metric in given if not isinstance(metric, str) for name in metric.uses_columns]
    return tuple(dict.fromkeys(names))


def _require_names(metrics: Sequence[Any]) -> None:
    for metric in metrics:
        if isinstance(metric, Metric):
            raise ValueError(
                f"A policy takes the name of a metric, not the metric itself: write '{metric.name}', and put the "
                "metric into Curriculum(metrics=[…])."
            )
        if not isinstance(metric, (str, MetricExpression)) or isinstance(metric, type):
            given = getattr(metric, "__name__", None) or repr(metric)
            raise ValueError(
                "A policy takes the name of a metric, such as 'rank_surprisal_ratio', or an expression, such as "
                f"RankAverage('rank_surprisal_ratio', 'global_naturalness'), but was given {given}."
            )


def numbers_of(column: EncodedColumn, name: str) -> npt.NDArray[np.float64]:
    """`[samples]` the numbers of a numeric column of the data set; NaN where a sample has none.

    Raises:
        ValueError: the column holds something else than numbers.
    """
    distinct = np.asarray(column.values)
    if distinct.dtype.kind not in "biuf":  # a missing value among them, or no numbers at all
        distinct = np.array([_number(value, name) for value in column.values])
    numbers = distinct.astype(np.float64)
    numbers[~np.isfinite(numbers)] = np.nan
    result: npt.NDArray[np.float64] = numbers[column.codes]
    return result


def raw_scores(metric: str | Column, pool: Pool) -> FloatArray:
    """`[samples]` a metric's scores or a column's numbers as they are, whichever direction is better."""
    return pool.scores[metric] if isinstance(metric, str) else metric.values(pool)


def rank_shares(numbers: FloatArray) -> npt.NDArray[np.float64]:
    """`[n]` mid-ranks divided by n, in (0, 1), highest for the largest: `[7, 9, 7, 8] -> [.25, .875, .25, .625]`."""
    order = np.argsort(numbers, kind="stable")
    in_order = numbers[order]
    edges = np.r_[np.flatnonzero(np.r_[True, in_order[1:] != in_order[:-1]][: len(order)]), len(order)]
    ranks = np.empty(len(order))
    ranks[order] = np.repeat((edges[1:] + edges[:-1]) / 2, np.diff(edges)) / max(len(order), 1)
    return ranks


def _number(value: Any, column: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, (bool, int, float, np.number, np.bool_)):
        return float(value)
    raise ValueError(
        f"Column('{column}') holds {value!r}, which is no number. Convert the column to numbers, or name another one."
    )
