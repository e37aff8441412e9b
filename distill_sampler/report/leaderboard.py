"""Which teacher suits the student, and how sure that is: group scores with a bootstrap over prompts.

Prompts are drawn, not samples: the responses to one prompt rise and fall together, and every teacher gets the same
draw, so that two teachers are compared on the prompts that they share (Efron, 1979; paired as in Koehn, 2004).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.correlation import spearman
from distill_sampler.policies.keys import best_first, starts
from distill_sampler.types import BoolArray, Column, FloatArray, HashArray, IntArray, Metric

FEW_PROMPTS = 100
"""Below this a teacher's score is worth a warning; the paper of RSR takes 200 (arXiv:2601.14249)."""
MAX_DOMAINS = 8
"""Domains with a leaderboard of their own: the largest ones."""
DOMAIN_PROMPTS = 10
"""Below this a domain has none."""
TOLD_TIES = 2
"""Teachers that cannot be told apart from the first are explained one by one up to this many, then named."""
_CONFIDENCE = 1.96
_DRAWS = 1000
_DOMAIN_DRAWS = 200
_WORK = 300_000_000
"""Samples that are looked at in all draws together: very large data gets fewer draws, and needs fewer."""


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


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """Teachers, best first, and what can be said about that order."""

    metric: str
    higher_is_better: bool
    lines: Sequence[TeacherLine]
    prompts: int
    verdict: Sequence[str]
    """Sentences: who is first, why, and from whom the first cannot be told apart."""
    warnings: Sequence[str]
    draws: int


def leaderboard(
    *,
    metrics: Mapping[str, Metric],
    metric: str,
    numbers: Mapping[str, FloatArray],
    teachers: Column,
    groups: IntArray,
    num_tokens: IntArray,
    content_hash: HashArray | None = None,
    correct: Column | None = None,
    among: BoolArray | None = None,
    shared_only: bool = False,
    draws: int | None = None,
    seed: int = 0,
) -> Leaderboard:
    """Rank teachers by a metric's group score. Samples without a teacher, or without that score, take no part.

    Args:
        metrics: what is shown, by name.
        metric: the one that ranks.
        numbers: every column of the metrics, `[samples]` each.
        teachers: who wrote each sample.
        groups: `[samples]` which prompt each answers.
        num_tokens: `[samples]` response tokens.
        content_hash: `[samples]` breaks ties of the choice; left out: the sample's place does.
        correct: verdicts, if there are any.
        among: `[samples]` True where a sample may take part; left out: all may.
        shared_only: compare on the prompts that every teacher answered.
        draws: of the bootstrap; None: 1000, fewer for very large data. 0: no intervals.
        seed: of the draws.

    Raises:
        ValueError: no sample has a score, or no prompt is shared.
    """
    ranking = metrics[metric]
    every = dict.fromkeys(name for item in metrics.values() for name in item.columns)
    asked = np.ones(len(num_tokens), bool) if among is None else among
    usable: BoolArray = asked & np.all([np.isfinite(numbers[name]) for name in ranking.columns], axis=0)
    unscored = int(asked.sum() - usable.sum())
    codes = teachers.codes
    unnamed = np.zeros_like(usable)
    if None in teachers.values:
        unnamed = usable & (codes == list(teachers.values).index(None))
    places = np.flatnonzero(usable & ~unnamed)
    if not len(places):
        raise ValueError(f"No sample has a {metric}: there is nothing to rank.")
    if shared_only:
        places = places[_shared(codes[places], groups[places])]
        if not len(places):
            raise ValueError("No prompt was answered by every teacher; leave --shared-prompts out.")
    if content_hash is None:
        content_hash = np.arange(len(codes), dtype=np.uint64)

    # rows in order of teacher, so that a teacher is a slice; prompts numbered from 0 among those that are left
    order = places[np.argsort(codes[places], kind="stable")]
    codes, rows = codes[order], {name: numbers[name][order] for name in every}
    _, groups = np.unique(groups[order], return_inverse=True)
    num_prompts = int(groups.max()) + 1
    goodness = rows[metric] if ranking.higher_is_better else -rows[metric]
    winners = best_first(goodness, content_hash[order], groups)
    chosen = np.zeros(len(order))
    chosen[winners[starts(groups[winners])]] = 1.0
    bounds = np.flatnonzero(np.r_[True, codes[1:] != codes[:-1], True])
    slices = [slice(start, stop) for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    part_names = [name for name in ranking.columns if name != metric]
    partial = {item.name for item in metrics.values() if not all(np.isfinite(rows[n]).all() for n in item.columns)}

    def group_score(item: Metric, taken: Mapping[str, FloatArray]) -> float:
        own = {name: taken[name] for name in item.columns}
        if item.name in partial:  # not the one that ranks: it has no number for some of these samples
            known = np.all([np.isfinite(values) for values in own.values()], axis=0)
            if not known.any():
                return math.nan
            own = {name: values[known] for name, values in own.items()}
        return item.aggregate(own)

    def figures(part: slice, picked: IntArray | None) -> list[float]:
        """Every number of a line, for a teacher's rows, or for those drawn among them."""
        if picked is not None and not len(picked):
            return [math.nan] * (len(metrics) + len(part_names) + 1)
        taken = {name: values[part] if picked is None else values[part][picked] for name, values in rows.items()}
        wins = chosen[part] if picked is None else chosen[part][picked]
        return [
            *(group_score(item, taken) for item in metrics.values()),
            *(float(taken[name].mean(dtype=float)) for name in part_names),
            float(wins.sum()) / num_prompts,
        ]

    if draws is None:
        draws = int(np.clip(_WORK // len(order), 50, _DRAWS))
    values = np.array([figures(part, None) for part in slices])  # [teachers, figures]
    drawn = _bootstrap(slices, groups, num_prompts, draws, seed, figures)  # [draws, teachers, figures]
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0) if draws else (values, values)

    place = list(metrics).index(metric)
    sign = -1 if ranking.higher_is_better else 1
    ranked = np.argsort(sign * values[:, place], kind="stable")
    names = [str(teachers.values[code]) for code in codes[bounds[:-1]]]
    badness = sign * drawn[:, :, place]
    ties = _ties(badness, ranked)
    verdicts = None if correct is None else _verdicts(correct, order)
    lines = []
    for t in ranked.tolist():
        estimates = [Estimate(value=v, low=a, high=b) for v, a, b in zip(values[t], low[t], high[t], strict=True)]
        own = slices[t]
        known = verdicts[own][~np.isnan(verdicts[own])] if verdicts is not None else np.empty(0)
        lines.append(
            TeacherLine(
                teacher=names[t],
                samples=own.stop - own.start,
                prompts=len(np.unique(groups[own])),
                tokens=float(num_tokens[order][own].mean()),
                scores=dict(zip(metrics, estimates, strict=False)),
                parts=dict(zip(part_names, estimates[len(metrics) :], strict=False)),
                chosen=estimates[-1],
                correct=float(known.mean()) if len(known) else None,
                tied=t in ties,
            )
        )
    tokens = num_tokens[order]
    return Leaderboard(
        metric=metric,
        higher_is_better=ranking.higher_is_better,
        lines=lines,
        prompts=num_prompts,
        verdict=_verdict(
            lines, metric, part_names, sign * drawn[:, :, place], sign * values[:, place], ranked, num_prompts
        ),
        warnings=_warnings(lines, metric, rows[metric], tokens, num_prompts, int(unnamed.sum()), unscored),
        draws=draws,
    )


def rank_teachers(
    scores: Scores,
    *,
    metric: str | None = None,
    epoch: int | None = None,
    among: BoolArray | None = None,
    shared: bool = False,
    draws: int | None = None,
) -> Leaderboard | None:
    """The leaderboard of a scores file, or of some of its samples; None if it does not name teachers."""
    teachers = scores.column(scores.teacher, epoch=epoch)
    if teachers is None:
        return None
    groups = scores.codes(scores.group, epoch=epoch)
    samples = scores.integers("sample", epoch=epoch)
    tokens = scores.integers("num_tokens", epoch=epoch)
    assert samples is not None
    board = leaderboard(
        metrics=scores.metrics,
        metric=scores.metric(metric).name,
        numbers=scores.numbers(epoch=epoch),
        teachers=teachers,
        groups=samples if groups is None else groups,
        num_tokens=samples * 0 if tokens is None else tokens,
        content_hash=scores.hashes(epoch=epoch),
        correct=scores.column(scores.correct, epoch=epoch),
        among=among,
        shared_only=shared,
        draws=draws,
    )
    if mixed := scores.mixed_prompts(epoch=epoch):
        sentence = (
            f"{len(mixed):,} values of '{scores.group}' stand for different prompts each ('{mixed[0]}' is one): their "
            "responses are compared as if they answered one question. Give every prompt an id of its own, or score "
            "again with another --group-column."
        )
        board = replace(board, warnings=[sentence, *board.warnings])
    return board


def rank_domains(
    scores: Scores, *, metric: str | None = None, epoch: int | None = None, shared: bool = False
) -> dict[str, Leaderboard]:
    """A leaderboard for each of the largest domains, largest first; empty where there is no choice of them."""
    domains, teachers = scores.column(scores.domain, epoch=epoch), scores.column(scores.teacher, epoch=epoch)
    groups = scores.codes(scores.group, epoch=epoch)
    scored = np.isfinite(scores.numbers(epoch=epoch)[scores.metric(metric).name])
    found: dict[str, Leaderboard] = {}
    if domains is None or teachers is None or len(domains.values) < 2:
        return found
    sizes = np.bincount(domains.codes[scored], minlength=len(domains.values))
    for code in np.argsort(-sizes, kind="stable")[:MAX_DOMAINS].tolist():
        among = scored & (domains.codes == code)
        prompts = among.sum() if groups is None else len(np.unique(groups[among]))
        if domains.values[code] is None or prompts < DOMAIN_PROMPTS or len(np.unique(teachers.codes[among])) < 2:
            continue
        board = rank_teachers(scores, metric=metric, epoch=epoch, among=among, shared=shared, draws=_DOMAIN_DRAWS)
        assert board is not None
        found[str(domains.values[code])] = board
    return found if len(found) > 1 else {}


def tell_domains(board: Leaderboard, by_domain: Mapping[str, Leaderboard]) -> str:
    """Whether the first teacher is the first everywhere, in a sentence."""
    first = board.lines[0].teacher
    firsts = {domain: own.lines[0].teacher for domain, own in by_domain.items()}
    if set(firsts.values()) == {first}:
        return f"{first} is first in each of {len(firsts)} domains."
    told = []
    for domain, own in by_domain.items():
        near = any(line.tied and line.teacher == first for line in own.lines)
        told.append(f"{firsts[domain]} in {domain}" + (f" (not to be told apart from {first})" if near else ""))
    return f"By domain, the first is {', '.join(told)}."


def _shared(codes: IntArray, groups: IntArray) -> BoolArray:
    """`[n]` whether the row's prompt was answered by every teacher."""
    _, codes = np.unique(codes, return_inverse=True)
    _, groups = np.unique(groups, return_inverse=True)
    num_teachers = int(codes.max()) + 1
    pairs = np.unique(groups.astype(np.int64) * num_teachers + codes)
    answered = np.bincount(pairs // num_teachers, minlength=int(groups.max()) + 1)
    result: BoolArray = (answered == num_teachers)[groups]
    return result


def _bootstrap(
    slices: Sequence[slice],
    groups: IntArray,
    num_prompts: int,
    draws: int,
    seed: int,
    figures: Callable[[slice, IntArray | None], list[float]],
) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    places = [np.arange(part.stop - part.start) for part in slices]
    result = []
    for _ in range(draws):
        times = np.bincount(rng.integers(num_prompts, size=num_prompts), minlength=num_prompts)
        result.append([figures(p, np.repeat(at, times[groups[p]])) for p, at in zip(slices, places, strict=True)])
    return np.array(result).reshape(draws, len(slices), len(figures(slices[0], None)))


def _ties(badness: npt.NDArray[np.float64], ranked: IntArray) -> set[int]:
    """Teachers whose difference to the first has an interval that holds 0. `badness` is `[draws, teachers]`."""
    if not len(badness):
        return set()
    apart = badness - badness[:, ranked[:1]]
    return {t for t in ranked[1:].tolist() if not np.nanquantile(apart[:, t], 0.025) > 0}


def _verdict(
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


def _warnings(
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


def _verdicts(correct: Column, order: IntArray) -> npt.NDArray[np.float64]:
    """`[samples]` 1, 0, or NaN without a verdict."""
    values = [float(v) if isinstance(v, (bool, int, float)) and v in (0, 1) else math.nan for v in correct.values]
    return np.array(values)[correct.codes[order]]
