"""How a run goes, from its scores and plans: curves of samples, means, teachers' shares, ages of scores, by epoch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.types import EncodedColumn, FloatArray, IntArray

MAX_CURVES = 40
"""At most this many samples get a curve: half of them those that moved most, the others drawn at random."""
MAX_TEACHERS = 12
"""At most this many teachers are told apart: those with the most samples."""


def progress(
    scores: Scores,
    *,
    metric: str | None = None,
    seed: int = 0,
    teachers: tuple[IntArray, list[str]] | None = None,
) -> dict[str, Any]:
    """The numbers of a run by epoch, ready for JSON. Lists have one entry for each of `epochs`; None: not known.

    Args:
        scores: the scores of a run.
        metric: the metric to follow. By default the Rank-Surprisal Ratio if it was scored.
        seed: draws the samples that have a curve.
        teachers: `[samples]` codes and their names. By default the teachers with the most samples first.

    Raises:
        ValueError: there is no such metric.
    """
    ranking = scores.metric(metric)
    plans = scores.plans()
    epochs = sorted({*scores.epochs, *plans})
    samples = scores.integers("sample")
    assert samples is not None
    codes, names = teachers or _most_frequent(scores.column(scores.teacher), len(samples))
    by_epoch = np.stack([scores.numbers(epoch=epoch)[ranking.name] for epoch in epochs])  # [epochs, samples]
    row = np.full(int(samples.max(initial=-1)) + 1, -1, np.int64)
    row[samples] = np.arange(len(samples))
    chosen = {epoch: row[plan[plan < len(row)]] for epoch, plan in plans.items()}
    shares = [np.bincount(codes[chosen[e]], minlength=len(names)).tolist() if e in chosen else None for e in epochs]
    curves = _with_curves(by_epoch, seed)
    return {
        "metric": ranking.name,
        "better": "higher" if ranking.higher_is_better else "lower",
        "epochs": epochs,
        "teachers": names,
        "candidates": [_mean(values) for values in by_epoch],
        "chosen": [
            _mean(values[chosen[e]]) if e in chosen else None for e, values in zip(epochs, by_epoch, strict=True)
        ],
        "shares": shares if len(names) > 1 else [],
        "ages": _ages(scores, epochs, len(row)),
        "curves": [
            {
                "sample": int(samples[place]),
                "teacher": int(codes[place]),
                "values": [round(float(v), 4) if math.isfinite(v) else None for v in by_epoch[:, place]],
            }
            for place in curves.tolist()
        ],
    }


def _most_frequent(teachers: EncodedColumn | None, size: int) -> tuple[IntArray, list[str]]:
    """`[samples]` codes of the teachers, most samples first, and their names. Those beyond the limit become one."""
    if teachers is None:
        return np.zeros(size, np.int64), ["all"]
    order = np.argsort(-np.bincount(teachers.codes, minlength=len(teachers.values)), kind="stable")
    new = np.empty(len(order), np.int64)
    new[order] = np.minimum(np.arange(len(order)), MAX_TEACHERS)
    names = [str(teachers.values[code]) for code in order[:MAX_TEACHERS].tolist()]
    return new[teachers.codes], names + ["others"] * (len(order) > MAX_TEACHERS)


def _with_curves(by_epoch: FloatArray, seed: int) -> IntArray:
    """The samples to draw: those that moved most between the first and the last epoch, and random ones."""
    if len(by_epoch) < 2:
        return np.zeros(0, np.int64)
    moved = np.abs(by_epoch[-1] - by_epoch[0])
    known = np.flatnonzero(np.isfinite(moved))
    if len(known) <= MAX_CURVES:
        return known
    most = known[np.argsort(-moved[known], kind="stable")[: MAX_CURVES // 2]]
    others = np.setdiff1d(known, most)
    drawn = np.random.default_rng(seed).choice(others, MAX_CURVES - len(most), replace=False)
    return np.sort(np.concatenate([most, drawn]))


def _ages(scores: Scores, epochs: list[int], size: int) -> list[dict[str, float] | None]:
    """For each epoch, how many optimizer steps ago its samples' scores were measured: median, largest, never."""
    if not {"epoch", "step"} <= set(scores.names):
        return [None] * len(epochs)
    table = scores.load(["epoch", "sample", "step"])
    epoch_of, sample, step = (np.asarray(table[name].to_numpy(), np.int64) for name in ("epoch", "sample", "step"))
    made_at: dict[int, int] = {}
    if scores.record is not None:
        plans = scores.record.plans
        made_at = {epoch: plans.of(number).step for epoch, number in scores.record.last_plans().items()}
    found: list[dict[str, float] | None] = []
    for epoch in epochs:
        known = np.flatnonzero((epoch_of <= epoch) & (step >= 0))
        if not len(known):
            found.append(None)
            continue
        measured = np.full(size, -1, np.int64)
        measured[sample[known]] = step[known]  # a later row replaces an earlier one
        ages = max(made_at.get(epoch, 0), int(step[known].max())) - measured[measured >= 0]
        found.append({"median": float(np.median(ages)), "max": int(ages.max())})
    return found


def _mean(values: FloatArray) -> float | None:
    finite = values[np.isfinite(values)]
    return round(float(finite.mean(dtype=np.float64)), 4) if len(finite) else None
