"""The verdict on the order of teachers, in sentences: who is first, why, and how certain that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distill_sampler.correlation import spearman
from distill_sampler.types import FloatArray, IntArray

FEW_PROMPTS = 100
"""A teacher with fewer prompts causes a warning. The RSR paper uses 200 (arXiv:2601.14249)."""
EXPLAINED_TIES = 2
"""Of the teachers that cannot be told apart from the first, at most this many get a sentence of their own."""
_CONFIDENCE = 1.96


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval over prompts of the same kind."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, kw_only=True)
class TeacherLine:
    """One line of the leaderboard."""

    teacher: str
    samples: int
    prompts: int
    tokens: float
    """Mean number of response tokens."""
    scores: Mapping[str, Estimate]
    """By metric: the metric's own group score."""
    parts: Mapping[str, Estimate]
    """By column: the mean of the numbers that the ranking metric is made of (rank and surprisal)."""
    chosen: Estimate
    """Share of the prompts for which this teacher has the best response."""
    correct: float | None
    """Share of correct responses, among those for which that is known; None if it is known for none."""
    tied: bool
    """Whether it cannot be told apart from the first teacher."""


def verdict_of(
    lines: Sequence[TeacherLine],
    metric: str,
    parts: Sequence[str],
    drawn: npt.NDArray[np.float64],
    values: npt.NDArray[np.float64],
    ranked: IntArray,
    num_prompts: int,
) -> list[str]:
    """Who is first, why, and how certain that is.

    Args:
        lines: the leaderboard, best teacher first.
        metric: the metric that ranks.
        parts: columns that the metric is made of (rank and surprisal).
        drawn: `[draws, teachers]` group scores of the bootstrap, negated if higher is better.
        values: `[teachers]` group scores, negated if higher is better.
        ranked: `[teachers]` numbers of the teachers, best first.
        num_prompts: number of prompts.
    """
    title = metric.replace("_", " ")
    first, *others = lines
    if not others:
        return [f"There is only one teacher, {first.teacher}, so there is nothing to compare."]
    tied = [(place, line) for place, line in enumerate(others, 1) if line.tied]
    lead = f"{first.teacher} is first by {title}, {_with_interval(first.scores[metric])}"
    if tied:
        lead += f", but cannot be told apart from {_joined([line.teacher for _, line in tied])}."
    elif len(drawn):
        lead += ": every other teacher is behind by more than chance explains."
    else:
        lead += "."
    sentences = [lead]
    if len(parts) == 2:
        sentences.append(_why_first(first, others, *parts))
    for place, line in tied[:EXPLAINED_TIES]:
        differences = drawn[:, ranked[place]] - drawn[:, ranked[0]]
        difference = values[ranked[place]] - values[ranked[0]]
        low, high = np.nanquantile(differences, [0.025, 0.975])
        sentences.append(
            f"{line.teacher} is {difference:.3f} behind on these {num_prompts:,} prompts. On similar prompts, the "
            f"difference may be {low:+.3f} to {high:+.3f} (95 %). "
            + _prompts_needed(difference, differences, num_prompts)
        )
    return sentences


def _joined(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _with_interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} (95 %: {estimate.low:.3f} to {estimate.high:.3f})"


def _prompts_needed(difference: float, differences: npt.NDArray[np.float64], num_prompts: int) -> str:
    """How many more prompts would tell two teachers apart, if the measured difference is real."""
    spread = float(np.nanstd(differences))
    needed = num_prompts * (_CONFIDENCE * spread / max(abs(difference), 1e-12)) ** 2 - num_prompts
    if needed > 1000 * num_prompts:
        return "For practical purposes the two are equal."
    digits = 10 ** max(math.floor(math.log10(max(needed, 1))) - 1, 0)
    more = max(math.ceil(needed / digits) * digits, 1)
    return f"About {more:,} more prompts would tell the two apart, if the difference is real."


def _why_first(first: TeacherLine, others: Sequence[TeacherLine], rank: str, surprisal: str) -> str:
    """Which half of the ratio puts the first teacher first, compared with the mean of the others."""
    own_rank, own_surprisal = first.parts[rank].value, first.parts[surprisal].value
    rest_rank = float(np.mean([line.parts[rank].value for line in others]))
    rest_surprisal = float(np.mean([line.parts[surprisal].value for line in others]))
    by_rank, by_surprisal = math.log(rest_rank / own_rank), math.log(own_surprisal / max(rest_surprisal, 1e-12))
    ranks = f"(mean rank {own_rank:.2f}, the others {rest_rank:.2f})"
    surprisals = f"({own_surprisal:.3f} nats a token, the others {rest_surprisal:.3f})"
    if by_rank > 0 and by_surprisal > 0:
        return f"Why: its tokens surprise the student more {surprisals}, yet the student ranks them higher {ranks}."
    if by_rank >= by_surprisal:
        return (
            f"Why: the student ranks its tokens higher {ranks}, which outweighs that they surprise the student less "
            f"{surprisals}."
        )
    return (
        f"Why: its tokens surprise the student more {surprisals}, which outweighs that the student ranks them lower "
        f"{ranks}."
    )


def warnings_of(
    lines: Sequence[TeacherLine],
    metric: str,
    scores: FloatArray,
    tokens: IntArray,
    num_prompts: int,
    unnamed: int,
    unscored: int,
) -> list[str]:
    """What to be careful about: samples left out, few or different prompts, and length.

    Args:
        lines: the leaderboard, best teacher first.
        metric: the metric that ranks.
        scores: `[samples]` scores of the ranked samples.
        tokens: `[samples]` their numbers of response tokens.
        num_prompts: number of prompts.
        unnamed: samples without a teacher.
        unscored: samples without a score.
    """
    warnings = []
    if unscored:
        warnings.append(
            f"{unscored:,} responses have no {metric.replace('_', ' ')} (too long for the student, or without a token "
            "to score); they are not ranked."
        )
    if unnamed:
        warnings.append(f"{unnamed:,} responses do not name their teacher; they are not ranked.")
    few = [line for line in lines if line.prompts < FEW_PROMPTS]
    if few:
        counts = ", ".join(f"{line.teacher} ({line.prompts})" for line in few)
        if len(few) == len(lines):
            low, high = min(line.prompts for line in few), max(line.prompts for line in few)
            counts = f"{low}{'' if low == high else f' to {high}'} for each teacher"
        warnings.append(
            f"Few prompts: {counts}. The paper ranks teachers on 200; below {FEW_PROMPTS} the order is a guess."
        )
    prompts = [line.prompts for line in lines]
    if min(prompts) < 0.9 * max(prompts):
        warnings.append(
            f"Teachers answered different prompts (from {min(prompts):,} to {max(prompts):,} of {num_prompts:,}), and "
            "prompts differ in difficulty. --shared-prompts compares only on prompts that all teachers answered."
        )
    if (tokens != tokens[0]).any():
        correlation = spearman(scores, tokens)
        if abs(correlation) > 0.5:
            warnings.append(
                f"Length confound: the score is correlated with the response's length (Spearman {correlation:+.2f} "
                "over samples), so part of the order may be due to length alone."
            )
    if len(lines) >= 4:
        order = spearman(range(len(lines)), [line.tokens for line in lines])
        if abs(order) > 0.9:
            length = "longest" if order < 0 else "shortest"
            warnings.append(f"Length confound: ranking teachers by the {length} responses gives nearly the same order.")
    return warnings
