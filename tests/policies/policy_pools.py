"""Small pools of candidates for the tests of the policies, drawn by hypothesis or made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from distill_sampler.protocols import Pool
from distill_sampler.types import EncodedColumn, EpochPlan, FloatArray, Sample


@dataclass(frozen=True)
class Score:
    """A metric that is only looked up. A group has the ratio of the sums of its two columns, as RSR does."""

    name: str
    higher_is_better: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.name, f"{self.name}_part")

    def views(self, sample: Sample) -> Sequence[Any]:
        raise NotImplementedError

    def reduce(self, sample: Sample, stats: object) -> Mapping[str, float]:
        raise NotImplementedError

    def aggregate(self, columns: Mapping[str, FloatArray]) -> float:
        assert np.isfinite([*columns.values()]).all()
        return float(columns[self.name].sum() / columns[f"{self.name}_part"].sum())


METRICS = {"up": Score("up"), "down": Score("down", higher_is_better=False)}


def encode(values: Sequence[Any]) -> EncodedColumn:
    """A column as the data set encodes it: distinct values in order of first appearance."""
    distinct = tuple(dict.fromkeys(values))
    return EncodedColumn(codes=np.array([distinct.index(value) for value in values], np.int64), values=distinct)


def make_pool(
    up: Sequence[float], down: Sequence[float] | None = None, epoch: int = 0, lengths: Any = None, **columns: Any
) -> Pool:
    """A pool with the scores `up` (higher is better) and `down` (lower is), and these columns; contents differ."""
    num = len(up)
    scores = {"up": np.array(up, np.float64), "down": np.array(up if down is None else down, np.float64)}
    for name in list(scores):
        scores[f"{name}_part"] = np.where(np.isnan(scores[name]), np.nan, 1.0)
    return Pool(
        epoch=epoch,
        metrics=METRICS,
        scores=scores,
        columns={name: encode(values) for name, values in columns.items()},
        lengths=np.arange(1, num + 1) if lengths is None else np.array(lengths),
        content_hash=np.random.default_rng(num).permutation(np.arange(num, dtype=np.uint64) << np.uint64(40)),
    )


def everything(pool: Pool) -> EpochPlan:
    return EpochPlan(indices=np.arange(len(pool.lengths)))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Ties are common, -0.0 equals 0.0, and some differ beyond float32.
SCORES = (0.0, -0.0, 1.0, -1.0, 2.5, 1.0 + 1e-12, 3e-8, -7.0)


@st.composite
def pools_and_plans(draw: st.DrawFn, min_size: int = 0) -> tuple[Pool, EpochPlan]:
    """Up to 24 samples, some or all without a score; a plan in any order, with repeats and loss weights.

    Hypothesis draws what matters to the laws; the rest comes from a seed, which is much faster.
    """
    num = draw(st.integers(1, 24))
    epoch = draw(st.integers(0, 4))
    share_unscored = draw(st.sampled_from([0.0, 0.2, 0.9, 1.0]))
    share_tied = draw(st.sampled_from([0.0, 0.5, 1.0]))
    length = draw(st.integers(min_size, 30))
    distinct = draw(st.booleans())
    source = np.random.default_rng(draw(st.integers(0, 2**32)))

    def scores() -> FloatArray:
        numbers = np.where(source.random(num) < share_tied, source.choice(SCORES, num), 3 * source.normal(size=num))
        return np.where(source.random(num) < share_unscored, np.nan, numbers)

    def column(*values: Any) -> list[Any]:
        return [values[choice] for choice in source.integers(len(values), size=num)]

    pool = make_pool(
        scores(),
        scores(),
        epoch=epoch,
        lengths=source.integers(1, 10, num),
        prompt_id=column(*"pqrs"),
        teacher=column(*"TUV"),
        domain=column("reasoning", "general"),
        correct=column(True, False, None),
        difficulty=column(1, 2.5, 4, None),
        weight=column(0, 1, 0.5),
    )
    pool = replace(pool, content_hash=source.integers(2**64, size=num, dtype=np.uint64))
    indices = source.permutation(num)[:length] if distinct else source.integers(num, size=length)
    weights = source.uniform(0.1, 4, len(indices))
    return pool, EpochPlan(indices=indices, weights=weights / weights.mean() if len(weights) else weights)
