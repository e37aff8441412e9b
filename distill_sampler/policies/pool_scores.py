"""Scores that depend on the other samples: LARK's gain within a prompt, and ASLEC's regression over the pool."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.expressions import MetricExpression
from distill_sampler.protocols import Metric, Pool
from distill_sampler.types import FloatArray, IntArray, unknown_name


@documents_fields
@dataclass(frozen=True)
class LarkGain(MetricExpression):
    """LARK's gain g = (L / ΣL) (2ρ - ΣρL / ΣL) among the candidates of a prompt (arXiv:2605.30651). Higher is better.

    ρ and L are those of the metric `Lark`. The sums are over all samples of the prompt that have them, even if they are
    no longer in the plan. The gain is large for a response that has a large share of the prompt's loss, and whose loss
    falls fast. The paper selects with `KeepByMargin(LarkGain(per="prompt_id"), per="prompt_id", k=3)`. Gains of
    different prompts are not on the same scale: compare them only within a prompt.
    """

    per: str
    """Column that tells which rows answer the same prompt."""
    metric: str = "lark"
    """Name of the `Lark` metric."""

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return (self.per,)

    def __call__(self, pool: Pool) -> FloatArray:
        loss, brier = (pool.scores[name] for name in _parts_of(self.metric, pool, 3, "LarkGain", "Lark()")[:2])
        result = np.full(len(loss), np.nan)
        rows = _scored_by_content(pool, loss, brier)
        if not len(rows):
            return result
        groups = pool.column(self.per).codes[rows]
        losses, briers = loss[rows].astype(np.float64), brier[rows].astype(np.float64)
        total, of_rho = (np.bincount(groups, numbers)[groups] for numbers in (losses, briers))  # ρL is B
        total = np.maximum(total, 1e-30)
        rho = briers / np.maximum(losses, 1e-30)
        result[rows] = losses / total * (2 * rho - of_rho / total)
        return result


@documents_fields
@dataclass(frozen=True)
class AslecCasl(MetricExpression):
    """ASLEC-CASL: naturalness minus the part that the share of first tokens explains (arXiv:2604.06834). Higher is
    better.

    Over all samples with scores, the mean log-probability is regressed on the mean over the steps' other tokens, the
    mean over their first tokens, and the share F of first tokens: M ~ β₁ M_rest + β₂ M_first + γ F + constant. The
    score is M - γ F. It reads the metric `AslecParts`. Trade-off: the score depends on the pool, so scores of two
    pools, or of two epochs, cannot be compared.
    """

    metric: str = "aslec"
    """Name of the `AslecParts` metric."""
    per: str | None = None
    """Column for whose values separate regressions are made. The authors' script fits each teacher's responses alone:
    `per="teacher"`. None: one regression over the pool, which keeps teachers comparable."""

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return () if self.per is None else (self.per,)

    def __call__(self, pool: Pool) -> FloatArray:
        names = _parts_of(self.metric, pool, 4, "AslecCasl", "AslecParts()")
        parts = [pool.scores[name] for name in names]
        result = np.full(len(parts[0]), np.nan)
        rows = _scored_by_content(pool, *parts)
        share, first, rest, mean = (numbers[rows].astype(np.float64) for numbers in parts)
        fits = np.zeros(len(rows), np.int64) if self.per is None else pool.column(self.per).codes[rows]
        for fit in np.unique(fits):
            at = fits == fit
            gamma = _regressed(np.stack([rest[at], first[at], share[at]], 1), mean[at])[2]
            result[rows[at]] = mean[at] - gamma * share[at]
        return result


def _regressed(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`[k]` the coefficients of the least-squares fit of `y [n]` by `x [n, k]` and a constant; 0 where undetermined."""
    coefficients: npt.NDArray[np.float64] = np.linalg.lstsq(x - x.mean(0), y - y.mean(), rcond=None)[0]
    return coefficients


def _scored_by_content(pool: Pool, *numbers: FloatArray) -> IntArray:
    """The samples that have all of these numbers, by content, so that sums do not depend on the order of the rows."""
    rows: IntArray = np.flatnonzero(np.all([np.isfinite(each) for each in numbers], axis=0))
    return rows[np.argsort(pool.content_hash[rows], kind="stable")]


def _parts_of(metric: str, pool: Pool, number: int, expression: str, made_by: str) -> tuple[str, ...]:
    if metric not in pool.metrics:
        raise ValueError(f"{expression}: {unknown_name('metric', metric, pool.metrics, 'that are scored')}")
    found: Metric = pool.metrics[metric]
    if len(found.columns) != number:
        raise ValueError(
            f"{expression}(metric='{metric}') reads the numbers of {made_by}, but '{metric}' is a "
            f"{type(found).__name__}. Give the name of the {made_by} among your metrics."
        )
    return tuple(found.columns)
