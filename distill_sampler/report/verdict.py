"""What can be said about the order of teachers, in sentences: who is first, why, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distill_sampler.correlation import spearman
from distill_sampler.types import FloatArray, IntArray

FEW_PROMPTS = 100
"""Below this a teacher's score is worth a warning; the paper of RSR takes 200 (arXiv:2601.14249)."""
TOLD_TIES = 2
"""Teachers that cannot be told apart from the first are explained one by one up to this many, then named."""
_CONFIDENCE = 1.96


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and where it would lie, in 95 of 100 cases, for other prompts of the same kind."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
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
    """Share of the prompts for which this teacher's response is the best."""
    correct: float | None
    """Share of its responses with a verdict that are correct."""
    tied: bool
    """It cannot be told apart from the first."""


def verdict_of(
    lines: Sequence[TeacherLine],
    metric: str,
    parts: Sequence[str],
    drawn: npt.NDArray[np.float64],
    values: npt.NDArray[np.float64],
    ranked: IntArray,
    num_prompts: int,
) -> list[str]:
    title = metric.replace("_", " ")
    first, *others = lines
    if not others:
        return [f"There is one teacher, {first.teacher}; a second one gives something to compare."]
    tied = [(place, line) for place, line in enumerate(others, 1) if line.tied]
    lead = f"{first.teacher} is first by {title}, {_told(first.scores[metric])}"
    if tied:
        lead += f", but cannot be told apart from {_listed([line.teacher for _, line in tied])}."
    elif len(drawn):
        lead += ": every other teacher is behind by more than chance explains."
    else:
        lead += "."
    said = [lead]
    if len(parts) == 2:
        said.append(_because(first, others, *parts))
    for place, line in tied[:TOLD_TIES]:
        apart = drawn[:, ranked[place]] - drawn[:, ranked[0]]
        difference = values[ranked[place]] - values[ranked[0]]
        low, high = np.nanquantile(apart, [0.025, 0.975])
        said.append(
            f"{line.teacher} is {difference:.3f} behind on these {num_prompts:,} prompts; on others like them it may "
            f"be anything from {low:+.3f} to {high:+.3f} (95 %). {_more(difference, apart, num_prompts)}"
        )
    return said


def _listed(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _told(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} (95 %: {estimate.low:.3f} to {estimate.high:.3f})"


def _more(difference: float, apart: npt.NDArray[np.float64], num_prompts: int) -> str:
    """How many more prompts would tell two teachers apart, if the difference is what it looks like."""
    spread = float(np.nanstd(apart))
    needed = num_prompts * (_CONFIDENCE * spread / max(abs(difference), 1e-12)) ** 2 - num_prompts
    if needed > 1000 * num_prompts:
        return "For practical purposes the two are equal."
    digits = 10 ** max(math.floor(math.log10(max(needed, 1))) - 1, 0)
    more = max(math.ceil(needed / digits) * digits, 1)
    return f"About {more:,} more prompts would tell the two apart, if that difference is real."


def _because(first: TeacherLine, others: Sequence[TeacherLine], rank: str, surprisal: str) -> str:
    """Which half of the ratio puts the first teacher first, against the mean of the others."""
    own_rank, own_surprisal = first.parts[rank].value, first.parts[surprisal].value
    rest_rank = float(np.mean([line.parts[rank].value for line in others]))
    rest_surprisal = float(np.mean([line.parts[surprisal].value for line in others]))
    by_rank, by_surprisal = math.log(rest_rank / own_rank), math.log(own_surprisal / max(rest_surprisal, 1e-12))
    ranks = f"(mean rank {own_rank:.2f}, the others {rest_rank:.2f})"
    surprisals = f"({own_surprisal:.3f} nats a token, the others {rest_surprisal:.3f})"
    if by_rank > 0 and by_surprisal > 0:
        return (
            f"Why: its tokens surprise the student more {surprisals}, and yet stand higher among the student's own "
            f"guesses {ranks}."
        )
    if by_rank >= by_surprisal:
        return (
            f"Why: its tokens stand higher among the student's own guesses {ranks}, which outweighs that they surprise "
            f"the student less {surprisals}."
        )
    return (
        f"Why: its tokens surprise the student more {surprisals}, which outweighs that they stand lower among the "
        f"student's own guesses {ranks}."
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
    said = []
    if unscored:
        said.append(
            f"{unscored:,} responses have no {metric.replace('_', ' ')} (too long for the student, or without a token "
            "to score); they are not ranked."
        )
    if unnamed:
        said.append(f"{unnamed:,} responses do not say who wrote them; they are not ranked.")
    few = [line for line in lines if line.prompts < FEW_PROMPTS]
    if few:
        which = ", ".join(f"{line.teacher} ({line.prompts})" for line in few)
        if len(few) == len(lines):
            fewest, most = (pick(line.prompts for line in few) for pick in (min, max))
            which = f"{fewest}{'' if fewest == most else f' to {most}'} for each teacher"
        said.append(f"Few prompts: {which}. The paper ranks teachers on 200; below {FEW_PROMPTS} the order is a guess.")
    counts = [line.prompts for line in lines]
    if min(counts) < 0.9 * max(counts):
        said.append(
            f"Teachers answered different prompts (from {min(counts):,} to {max(counts):,} of {num_prompts:,}), and "
            "prompts differ in difficulty; --shared-prompts compares on those that all answered."
        )
    if len(np.unique(tokens)) > 1:
        across = spearman(scores, tokens)
        if abs(across) > 0.5:
            said.append(
                f"Length confound: the score goes with the response's length (Spearman {across:+.2f} over samples), so "
                "part of the order may be length alone."
            )
    if len(lines) >= 4:
        order = spearman(range(len(lines)), [line.tokens for line in lines])
        if abs(order) > 0.9:
            which = "longest" if order < 0 else "shortest"
            said.append(f"Length confound: ranking teachers by the {which} responses gives nearly the same order.")
    return said
