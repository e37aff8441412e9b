"""What the page shows, as plain values: figures for all data, points for a sample of it, and some traces in full.

Text of the data set may be hostile. `text.visible` replaces what could mislead a reader (control characters, direction
marks) and cuts what is too long for a browser. The page escapes the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.planning.why import ExplainedPlan
from distill_sampler.policies import BestOf
from distill_sampler.protocols import Policy
from distill_sampler.report.correctness import correctness
from distill_sampler.report.health import health
from distill_sampler.report.leaderboard import Leaderboard, domain_sentence, rank_domains, rank_teachers
from distill_sampler.report.progress import progress
from distill_sampler.report.text import rounded, visible
from distill_sampler.report.traces import traces
from distill_sampler.report.verdict import Estimate
from distill_sampler.types import EncodedColumn, FloatArray, IntArray

MAX_POINTS = 4000
"""At most this many samples are in pictures and in the list; figures in tables use all samples."""
OUTLIERS = 25
"""So many of the lowest and of the highest scores, by each number of the ranking metric, are among them in any case."""
MAX_NAMES = 60
"""At most this many teachers or domains are shown by name. The others are merged into one."""


def payload(
    scores: Scores, *, policies: Sequence[Policy] = (), seed: int = 0, metric: str | None = None
) -> dict[str, Any]:
    """Everything that the page needs, ready for JSON.

    Raises:
        ValueError: there is nothing to show, or a policy does not fit the scores.
    """
    ranking = scores.metric(metric)
    samples = scores.integers("sample")
    assert samples is not None
    numbers = scores.numbers()
    if not np.isfinite(numbers[ranking.name]).any():
        raise ValueError(f"{scores.path} has no finite {ranking.name}: there is nothing to show.")
    teachers, domains = scores.column(scores.teacher), scores.column(scores.domain)
    groups, correct = scores.column(scores.group), scores.column(scores.correct)
    board = rank_teachers(scores, metric=ranking.name)
    plans = {} if policies else scores.plans()
    choice = _choice(scores, policies, seed, ranking.name, groups)
    chosen = np.zeros(len(samples), bool)
    if plans:
        chosen[np.isin(samples, plans[max(plans)])] = True
    elif choice is not None:
        chosen |= choice.in_plan

    teacher_codes, teacher_names = _named(teachers, len(samples), board)
    domain_codes, domain_names = _named(domains, len(samples), None)
    finite = np.flatnonzero(np.isfinite(numbers[ranking.name]))
    tokens = scores.integers("num_tokens")
    shown, rule = _shown(finite, [numbers[name] for name in ranking.columns], seed)
    verdicts = _correctness(correct, len(samples))
    found = health(scores, ranking.name, numbers, teacher_codes, teacher_names, seed)
    flags = found.pop("flags")
    return {
        "about": {name: value and visible(value) for name, value in scores.about().items()},
        "file": scores.path.name,
        "metric": ranking.name,
        "better": "higher" if ranking.higher_is_better else "lower",
        "ratio": list(ranking.columns[:2]) if ranking.name == "rank_surprisal_ratio" else None,
        "metrics": [name for item in scores.metrics.values() for name in item.columns],
        "samples": len(samples),
        "scored": len(finite),
        "prompts": len(samples) if groups is None else len(groups.values),
        "teachers": teacher_names,
        "domains": domain_names,
        "domain": scores.domain,
        "board": None if board is None else _board(board),
        "by_domain": None if board is None else _by_domain(board, rank_domains(scores, metric=ranking.name)),
        "points": {
            "sample": samples[shown].tolist(),
            "group": [] if groups is None else [visible(str(groups.values[c]), 60) for c in groups.codes[shown]],
            "teacher": teacher_codes[shown].tolist(),
            "domain": domain_codes[shown].tolist(),
            "correct": verdicts[shown].tolist(),
            "flags": sum((flag[shown].astype(int) << place for place, flag in enumerate(flags.values()))).tolist(),
            "tokens": [] if tokens is None else tokens[shown].tolist(),
            "chosen": chosen[shown].astype(int).tolist(),
            "reason": [_reason(choice, row, plans, bool(chosen[row])) for row in shown.tolist()],
            "scores": {name: rounded(values[shown]) for name, values in numbers.items()},
        },
        "composition": _composition(samples, teacher_codes, len(teacher_names), finite, plans, choice),
        "chosen": int(chosen.sum()) if plans or choice else None,
        "policies": [] if choice is None else [policy.text for policy in choice.policies],
        "passes": _passes(scores, ranking.name, samples, teacher_codes, shown),
        "traces": traces(
            scores,
            ranking.columns,
            numbers,
            chosen=chosen,
            reason=lambda row: _reason(choice, row, plans, bool(chosen[row])),
            teachers=teacher_codes,
            domains=domain_codes,
            correct=verdicts,
        ),
        "rule": rule,
        "health": {**found, "rows": [_health_row(row) for row in found["rows"]]},
        "correctness": _said(correctness(scores, verdicts, choice, policies, seed)),
        "progress": _progress(scores, ranking.name, seed, teacher_codes, teacher_names),
    }


def _shown(finite: IntArray, numbers: Sequence[FloatArray], seed: int) -> tuple[IntArray, str]:
    """The rows to show one by one, and the rule by which they were drawn; empty if all are shown."""
    if len(finite) <= MAX_POINTS:
        return finite, ""
    kept = np.zeros(len(finite), bool)
    for values in numbers:
        order = np.argsort(values[finite], kind="stable")
        kept[order[:OUTLIERS]] = kept[order[-OUTLIERS:]] = True
    others = np.flatnonzero(~kept)
    kept[np.random.default_rng(seed).choice(others, MAX_POINTS - int(kept.sum()), replace=False)] = True
    rule = (
        f"Of {len(finite):,} scored responses, {MAX_POINTS:,} are shown one by one: the {OUTLIERS} lowest and the "
        f"{OUTLIERS} highest by each number, and the others drawn at random. Tables and headlines count all of them."
    )
    return finite[kept], rule


def _health_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "teacher": visible(str(row["teacher"]), 60)}


def _said(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """The same with text that may come from the data made visible."""
    return found and {**found, "sentences": [visible(sentence, 1000) for sentence in found["sentences"]]}


def _progress(scores: Scores, metric: str, seed: int, codes: IntArray, names: list[str]) -> dict[str, Any] | None:
    """How a run goes; None if there is only one epoch to show. Teachers have the codes of the whole page."""
    if not scores.load_plans and len(scores.epochs) < 2:
        return None
    return progress(scores, metric=metric, seed=seed, teachers=(codes, names or ["all"]))


def _choice(
    scores: Scores, policies: Sequence[Policy], seed: int, metric: str, groups: EncodedColumn | None
) -> ExplainedPlan | None:
    """The choice to show: by the given policies, else the run's last plan, else the best response of each prompt."""
    if policies:
        return scores.choose(policies, seed=seed)
    if scores.load_plans is not None:
        return scores.last_plan()
    if scores.group is None or groups is None or len(groups.values) == len(groups.codes):
        return None
    return scores.choose([BestOf(metric, per=scores.group)], seed=seed)


def _named(column: EncodedColumn | None, size: int, board: Leaderboard | None) -> tuple[IntArray, list[str]]:
    """Codes and names in the order of the leaderboard, or by frequency. Values beyond `MAX_NAMES` become one."""
    if column is None:
        return np.zeros(size, np.int64), []
    counts = np.bincount(column.codes, minlength=len(column.values))
    order = np.argsort(-counts, kind="stable")
    if board is not None:
        place = {line.teacher: number for number, line in enumerate(board.lines)}
        order = np.array(sorted(range(len(column.values)), key=lambda c: place.get(str(column.values[c]), 1 << 30)))
    new = np.empty(len(order), np.int64)
    new[order] = np.minimum(np.arange(len(order)), MAX_NAMES)
    names = ["none" if (v := column.values[code]) is None else visible(str(v), 60) for code in order[:MAX_NAMES]]
    if len(order) > MAX_NAMES:
        names.append(f"{len(order) - MAX_NAMES:,} others")
    return new[column.codes], names


def _correctness(correct: EncodedColumn | None, size: int) -> IntArray:
    """`[samples]` 1: correct, 0: incorrect, -1: unknown."""
    if correct is None:
        return np.full(size, -1)
    return np.array([int(v) if v in (0, 1, True, False) and v is not None else -1 for v in correct.values])[
        correct.codes
    ]


def _reason(choice: ExplainedPlan | None, row: int, plans: Mapping[int, IntArray], chosen: bool) -> str:
    why = "" if choice is None else visible(choice.reason(row), 400)
    if not plans:
        return why
    return f"{'in' if chosen else 'not in'} the plan of epoch {max(plans)}{why and ', '}{why}"


def _board(board: Leaderboard) -> dict[str, Any]:
    """The leaderboard for the page's table. Intervals are drawn in percent of the range of all intervals."""
    estimates = [line.scores[board.metric] for line in board.lines]
    low, high = min(e.low for e in estimates), max(e.high for e in estimates)
    width = (high - low) or 1.0

    def numbers(estimate: Estimate) -> dict[str, float | None]:
        named = {"value": estimate.value, "low": estimate.low, "high": estimate.high, "half": estimate.half}
        return {name: value if math.isfinite(value) else None for name, value in named.items()}  # JSON has no NaN

    return {
        "metric": board.metric,
        "verdict": [visible(sentence, 1000) for sentence in board.verdict],
        "warnings": [visible(sentence, 1000) for sentence in board.warnings],
        "draws": board.draws,
        "prompts": board.prompts,
        "low": low,
        "high": high,
        "lines": [
            {
                "teacher": visible(line.teacher, 60),
                "samples": line.samples,
                "prompts": line.prompts,
                "tokens": line.tokens,
                "score": numbers(line.scores[board.metric]),
                "others": {
                    n: numbers(e) for n, e in line.scores.items() if n not in (board.metric, *_redundant(line.parts))
                },
                "parts": {name: numbers(estimate) for name, estimate in line.parts.items()},
                "chosen": numbers(line.chosen),
                "correct": line.correct,
                "tied": line.tied,
                "left": 100 * (line.scores[board.metric].low - low) / width,
                "width": 100 * (line.scores[board.metric].high - line.scores[board.metric].low) / width,
                "place": 100 * (line.scores[board.metric].value - low) / width,
            }
            for line in board.lines
        ],
    }


def _by_domain(board: Leaderboard, by_domain: Mapping[str, Leaderboard]) -> dict[str, Any] | None:
    """The ranking metric of each teacher in each domain; None if there are no domains to compare."""
    if not by_domain:
        return None
    rows = []
    for line in board.lines:
        found = [{own.teacher: own for own in other.lines}.get(line.teacher) for other in by_domain.values()]
        cells = [
            own and {"value": (e := own.scores[board.metric]).value, "half": e.half, "first": own is other.lines[0]}
            for own, other in zip(found, by_domain.values(), strict=True)
        ]
        rows.append({"teacher": visible(line.teacher, 60), "cells": cells})
    sentence = visible(domain_sentence(board, by_domain), 1000)
    prompts = [other.prompts for other in by_domain.values()]
    return {"sentence": sentence, "names": [visible(d, 60) for d in by_domain], "prompts": prompts, "rows": rows}


def _redundant(parts: Mapping[str, Estimate]) -> tuple[str, ...]:
    """Columns that show nothing new: the mean log-probability is the mean surprisal with the opposite sign."""
    return ("global_naturalness",) if "mean_surprisal" in parts else ()


def _composition(
    samples: IntArray,
    teachers: IntArray,
    num_teachers: int,
    finite: IntArray,
    plans: Mapping[int, IntArray],
    choice: ExplainedPlan | None,
) -> list[dict[str, Any]]:
    """Bars with the number of each teacher's samples: among the candidates, and in each epoch or in the choice."""
    if num_teachers < 2:
        return []

    def bar(label: str, codes: IntArray) -> dict[str, Any]:
        return {"label": label, "counts": np.bincount(codes, minlength=num_teachers).tolist()}

    bars = [bar("candidates", teachers[finite])]
    if plans:
        order = np.argsort(samples, kind="stable")
        for epoch, plan in plans.items():
            place = np.searchsorted(samples, plan[np.isin(plan, samples)], sorter=order)
            bars.append(bar(f"epoch {epoch}", teachers[order[place]]))
    elif choice is not None:
        bars.append(bar("chosen", teachers[choice.plan.indices]))
    return bars if len(bars) > 1 else []


def _passes(
    scores: Scores, metric: str, samples: IntArray, teachers: IntArray, shown: IntArray
) -> dict[str, Any] | None:
    """Group scores of the teachers for every epoch, and each sample's mean and spread over the epochs."""
    if len(scores.epochs) < 2:
        return None
    item = scores.metrics[metric]
    history, lines = [], []
    num_teachers = int(teachers.max()) + 1
    for epoch in scores.epochs:
        order = scores.integers("sample", epoch=epoch)
        numbers = scores.numbers(epoch=epoch)
        if order is None or not np.array_equal(order, samples):
            return None
        history.append(numbers[metric][shown])
        finite = np.all([np.isfinite(numbers[name]) for name in item.columns], axis=0)
        parts = [np.flatnonzero(finite & (teachers == code)) for code in range(num_teachers)]
        lines.append([item.aggregate({n: numbers[n][p] for n in item.columns}) if len(p) else math.nan for p in parts])
    stacked = np.stack(history)
    return {
        "epochs": scores.epochs,
        "teachers": [rounded(np.array(line)) for line in np.array(lines).T],
        "mean": rounded(stacked.mean(axis=0)),
        "spread": rounded(stacked.std(axis=0)),
    }
