"""Which teacher suits the student, and how certain that is: group scores with a bootstrap over prompts.

The bootstrap draws prompts, not samples, because the scores of the responses to one prompt vary together. All teachers
get the same draw, so two teachers are compared on the prompts that they share (Efron, 1979; paired as in Koehn, 2004).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.policies.keys import best_first_order, first_of_each, num_distinct, num_distinct_in, renumbered
from distill_sampler.protocols import Metric
from distill_sampler.report.verdict import Estimate, TeacherLine, verdict_of, warnings_of
from distill_sampler.truncation import cut_sentence
from distill_sampler.types import BoolArray, EncodedColumn, FloatArray, HashArray, IntArray

MAX_DOMAINS = 8
"""At most this many domains get their own leaderboard: the largest ones."""
DOMAIN_PROMPTS = 10
"""A domain needs this many prompts to get its own leaderboard."""
_DRAWS = 1000
_DOMAIN_DRAWS = 200
_WORK = 300_000_000
"""At most this many samples are read in all draws together. Very large data gets fewer draws, and needs fewer."""


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """Teachers, best first, with conclusions and warnings."""

    metric: str
    higher_is_better: bool
    lines: Sequence[TeacherLine]
    prompts: int
    verdict: Sequence[str]
    """Sentences: who is first, why, and which teachers cannot be told apart from the first."""
    warnings: Sequence[str]
    draws: int


def leaderboard(
    *,
    metrics: Mapping[str, Metric],
    metric: str,
    numbers: Mapping[str, FloatArray],
    teachers: EncodedColumn,
    groups: IntArray,
    num_tokens: IntArray,
    content_hash: HashArray | None = None,
    correct: EncodedColumn | None = None,
    cut: BoolArray | None = None,
    among: BoolArray | None = None,
    shared_only: bool = False,
    draws: int | None = None,
    seed: int = 0,
) -> Leaderboard:
    """Rank teachers by a metric's group score. Samples without a teacher or without that score are left out.

    Args:
        metrics: the metrics to show, by name.
        metric: name of the metric that ranks.
        numbers: every column of the metrics, `[samples]` each.
        teachers: the teacher of each sample.
        groups: `[samples]` the prompt of each sample, as a number.
        num_tokens: `[samples]` number of response tokens.
        content_hash: `[samples]` breaks ties between responses to a prompt. By default the sample's number does.
        correct: whether each response is correct, if that is known.
        cut: `[samples]` True where truncation cut off the response. A whole one is the best of its prompt before these.
        among: `[samples]` True for the samples to compare. By default all.
        shared_only: compare only on the prompts that every teacher answered.
        draws: number of bootstrap draws. None: 1000, fewer for very large data. 0: no intervals.
        seed: seed of the draws.

    Raises:
        ValueError: no sample has a score, or no prompt is shared.
    """
    ranking = metrics[metric]
    columns = dict.fromkeys(name for item in metrics.values() for name in item.columns)
    requested = np.ones(len(num_tokens), bool) if among is None else among
    usable: BoolArray = requested & np.all([np.isfinite(numbers[name]) for name in ranking.columns], axis=0)
    unscored = int(requested.sum() - usable.sum())
    codes = teachers.codes
    unnamed = np.zeros_like(usable)
    if None in teachers.values:
        unnamed = usable & (codes == list(teachers.values).index(None))
    selected = np.flatnonzero(usable & ~unnamed)
    if not len(selected):
        raise ValueError(f"No sample has a {metric}: there is nothing to rank.")
    if shared_only:
        selected = selected[_shared(codes[selected], groups[selected])]
        if not len(selected):
            raise ValueError("No prompt was answered by every teacher. Leave out --shared-prompts.")
    if content_hash is None:
        content_hash = np.arange(len(codes), dtype=np.uint64)

    # sort rows by teacher, so that each teacher is a slice; number the remaining prompts from 0
    order = selected[np.argsort(codes[selected], kind="stable")]
    codes, rows = codes[order], {name: numbers[name][order] for name in columns}
    groups = renumbered(groups[order])
    num_prompts = int(groups.max()) + 1
    goodness = rows[metric] if ranking.higher_is_better else -rows[metric]
    by_prompt = best_first_order(goodness, content_hash[order], groups, last=None if cut is None else cut[order])
    is_best = np.zeros(len(order))  # 1 for the best response of each prompt
    is_best[by_prompt[first_of_each(groups[by_prompt])]] = 1.0
    bounds = np.flatnonzero(np.r_[True, codes[1:] != codes[:-1], True])
    slices = [slice(start, stop) for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    part_names = [name for name in ranking.columns if name != metric]
    incomplete = {item.name for item in metrics.values() if not all(np.isfinite(rows[n]).all() for n in item.columns)}

    def group_score(item: Metric, values: Mapping[str, FloatArray]) -> float:
        own = {name: values[name] for name in item.columns}
        if item.name in incomplete:  # some samples lack this metric (never the one that ranks)
            scored = np.all([np.isfinite(column) for column in own.values()], axis=0)
            if not scored.any():
                return math.nan
            own = {name: column[scored] for name, column in own.items()}
        return item.aggregate(own)

    def figures(teacher: slice, drawn: IntArray | None) -> list[float]:
        """Every number of a line, from all of a teacher's rows, or from those that were drawn."""
        if drawn is not None and not len(drawn):
            return [math.nan] * (len(metrics) + len(part_names) + 1)
        values = {name: v[teacher] if drawn is None else v[teacher][drawn] for name, v in rows.items()}
        best = is_best[teacher] if drawn is None else is_best[teacher][drawn]
        return [
            *(group_score(item, values) for item in metrics.values()),
            *(float(values[name].mean(dtype=float)) for name in part_names),
            float(best.sum()) / num_prompts,
        ]

    if draws is None:
        draws = int(np.clip(_WORK // len(order), 50, _DRAWS))
    values = np.array([figures(teacher, None) for teacher in slices])  # [teachers, figures]
    drawn = _bootstrap(slices, groups, num_prompts, draws, seed, figures)  # [draws, teachers, figures]
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0) if draws else (values, values)

    column = list(metrics).index(metric)
    sign = -1 if ranking.higher_is_better else 1
    ranked = np.argsort(sign * values[:, column], kind="stable")
    names = [str(teachers.values[code]) for code in codes[bounds[:-1]]]
    badness = sign * drawn[:, :, column]
    ties = _ties(badness, ranked)
    correctness = None if correct is None else _correctness(correct, order)
    lines = []
    for t in ranked.tolist():
        estimates = [Estimate(value=v, low=a, high=b) for v, a, b in zip(values[t], low[t], high[t], strict=True)]
        own = slices[t]
        known = correctness[own][~np.isnan(correctness[own])] if correctness is not None else np.empty(0)
        lines.append(
            TeacherLine(
                teacher=names[t],
                samples=own.stop - own.start,
                prompts=num_distinct(groups[own]),
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
        verdict=verdict_of(lines, metric, part_names, badness, sign * values[:, column], ranked, num_prompts),
        warnings=warnings_of(lines, metric, rows[metric], tokens, num_prompts, int(unnamed.sum()), unscored),
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
    """The leaderboard of a scores file, or of some of its samples; None if the file does not name teachers."""
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
        cut=scores.cut(epoch=epoch),
        among=among,
        shared_only=shared,
        draws=draws,
    )
    if note := cut_note(scores, epoch=epoch):
        board = replace(board, warnings=[note, *board.warnings])
    if mixed := scores.mixed_prompts(epoch=epoch):
        values = "1 value" if len(mixed) == 1 else f"{len(mixed):,} values"
        sentence = (
            f"Different prompts share {values} of '{scores.group}' (for example '{mixed[0]}'). "
            "Their responses are compared as if they answered the same prompt. Give every prompt its own id, or score "
            "again with another --group-column."
        )
        board = replace(board, warnings=[sentence, *board.warnings])
    return board


def cut_note(scores: Scores, *, epoch: int | None = None) -> str | None:
    """Whose responses truncation cut off, and by how much; None if it cut none, or the file does not say."""
    tokens_cut = scores.integers("tokens_cut", epoch=epoch)
    if tokens_cut is None or not tokens_cut.any():
        return None
    length = scores.facts.get("max_length")
    by = "the trainer's max_length" if length is None else f"--max-length {length}"
    return cut_sentence(tokens_cut, scores.column(scores.teacher, epoch=epoch), by=by)


def rank_domains(
    scores: Scores, *, metric: str | None = None, epoch: int | None = None, shared: bool = False
) -> dict[str, Leaderboard]:
    """A leaderboard for each of the largest domains, largest first; empty if fewer than two domains have one."""
    domains, teachers = scores.column(scores.domain, epoch=epoch), scores.column(scores.teacher, epoch=epoch)
    groups = scores.codes(scores.group, epoch=epoch)
    scored = np.isfinite(scores.numbers(epoch=epoch)[scores.metric(metric).name])
    found: dict[str, Leaderboard] = {}
    if domains is None or teachers is None or len(domains.values) < 2:
        return found
    sizes = np.bincount(domains.codes[scored], minlength=len(domains.values))
    for code in np.argsort(-sizes, kind="stable")[:MAX_DOMAINS].tolist():
        among = scored & (domains.codes == code)
        prompts = among.sum() if groups is None else num_distinct(groups[among])
        if domains.values[code] is None or prompts < DOMAIN_PROMPTS or num_distinct(teachers.codes[among]) < 2:
            continue
        board = rank_teachers(scores, metric=metric, epoch=epoch, among=among, shared=shared, draws=_DOMAIN_DRAWS)
        assert board is not None
        found[str(domains.values[code])] = board
    return found if len(found) > 1 else {}


def domain_sentence(board: Leaderboard, by_domain: Mapping[str, Leaderboard]) -> str:
    """Whether the same teacher is first in every domain, as a sentence."""
    first = board.lines[0].teacher
    firsts = {domain: own.lines[0].teacher for domain, own in by_domain.items()}
    if set(firsts.values()) == {first}:
        return f"{first} is first in each of {len(firsts)} domains."
    parts = []
    for domain, own in by_domain.items():
        tied = any(line.tied and line.teacher == first for line in own.lines)
        parts.append(f"{firsts[domain]} in {domain}" + (f" (cannot be told apart from {first})" if tied else ""))
    return f"The first teacher depends on the domain: {', '.join(parts)}."


def _shared(codes: IntArray, groups: IntArray) -> BoolArray:
    """`[n]` whether every teacher answered the row's prompt."""
    codes, groups = renumbered(codes), renumbered(groups)
    num_teachers = int(codes.max()) + 1
    answered = num_distinct_in(groups, codes)
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
    rows = [np.arange(teacher.stop - teacher.start) for teacher in slices]
    result = []
    for _ in range(draws):
        times = np.bincount(rng.integers(num_prompts, size=num_prompts), minlength=num_prompts)
        result.append([figures(t, np.repeat(own, times[groups[t]])) for t, own in zip(slices, rows, strict=True)])
    return np.array(result).reshape(draws, len(slices), len(figures(slices[0], None)))


def _ties(badness: npt.NDArray[np.float64], ranked: IntArray) -> set[int]:
    """Teachers whose difference from the first has an interval that contains 0. `badness` is `[draws, teachers]`."""
    if not len(badness):
        return set()
    behind = badness - badness[:, ranked[:1]]
    return {t for t in ranked[1:].tolist() if not np.nanquantile(behind[:, t], 0.025) > 0}


def _correctness(correct: EncodedColumn, order: IntArray) -> npt.NDArray[np.float64]:
    """`[samples]` 1: correct, 0: incorrect, NaN: unknown."""
    values = [float(v) if isinstance(v, (bool, int, float)) and v in (0, 1) else math.nan for v in correct.values]
    return np.array(values)[correct.codes[order]]
