"""Is selection worth it here? What a few short runs say about spread, stability, cost, and the budget that it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from distill_sampler.compare.runner import Comparison, Run, scoring_cost
from distill_sampler.compare.statistics import seeds_needed
from distill_sampler.compare.student import scores_of, train
from distill_sampler.compare.table import PRIMARY, measured_runs, paired
from distill_sampler.correlation import spearman
from distill_sampler.types import FloatArray, IntArray


def pilot_arms(subject: str) -> tuple[str, ...]:
    """The arms that a pilot trains."""
    return tuple(dict.fromkeys((subject, "matched_random")))


def spread(scores: FloatArray, groups: IntArray) -> tuple[float, float]:
    """How much the candidates of a prompt differ: the share of the scores' variance that is within prompts, and the
    median over prompts of (largest - smallest) / |median|.

    Args:
        scores: `[samples]`, NaN where there is none.
        groups: `[samples]` the prompt of each.
    """
    known = np.isfinite(scores)
    some, of = scores[known].astype(np.float64), np.unique(groups[known], return_inverse=True)[1]
    means = np.bincount(of, some) / np.bincount(of)
    total = float(some.var())
    within = float(((some - means[of]) ** 2).mean()) / total if total > 0 else 0.0
    ranges = []
    for group in range(len(means)):
        own = some[of == group]
        if len(own) > 1:
            ranges.append((own.max() - own.min()) / max(abs(float(np.median(own))), 1e-12))
    return within, float(np.median(ranges)) if ranges else math.nan


def same_best(before: FloatArray, after: FloatArray, groups: IntArray, *, higher_is_better: bool) -> float:
    """The share of prompts with the same best candidate by two passes of scores."""
    sign = 1 if higher_is_better else -1
    same = []
    for group in np.unique(groups):
        rows = np.flatnonzero((groups == group) & np.isfinite(before) & np.isfinite(after))
        if len(rows) > 1:
            same.append(np.argmax(sign * before[rows]) == np.argmax(sign * after[rows]))
    return float(np.mean(same)) if same else math.nan


def noise(differences: Sequence[FloatArray]) -> tuple[float, float]:
    """Standard deviations of a comparison's noise: of a seed's own difference, and of a prompt's within a seed."""
    within = math.sqrt(float(np.mean([each.var(ddof=1) for each in differences if len(each) > 1])))
    if len(differences) < 2:
        return 0.0, within
    means = np.array([each.mean() for each in differences])
    of_prompts = float(np.mean([within**2 / len(each) for each in differences]))
    return math.sqrt(max(0.0, float(means.var(ddof=1)) - of_prompts)), within


def stability(comparison: Comparison, scores: Mapping[str, FloatArray]) -> dict[str, tuple[float, float]]:
    """For each metric of the subject, Spearman with itself and the share of prompts with the same best candidate after
    the student was trained on one random plan of the budget; on the training candidates of the first seed."""
    dataset = comparison.candidates.dataset
    rows, _ = comparison.split(0)
    some = rows[
        np.isin(dataset.column("prompt_id").codes[rows], np.unique(dataset.column("prompt_id").codes[rows])[:24])
    ]
    model = comparison.load()
    plan = comparison.chooser(0, scores).plan(comparison.arms["matched_random"])
    train(model, comparison.tokenizer, dataset, plan, comparison.training, seed=0)
    metrics = [comparison.metrics[name] for name in comparison.subject.uses_metrics]
    after, _, _ = scores_of(model, dataset, metrics, some, comparison.training)
    groups = dataset.column("prompt_id").codes[some]
    found = {}
    for metric in metrics:
        old, new = scores[metric.name][some], after[metric.name][some]
        known = np.isfinite(old) & np.isfinite(new)
        same = same_best(old, new, groups, higher_is_better=metric.higher_is_better)
        found[metric.name] = (spearman(old[known], new[known]), same)
    return found


def pilot_report(comparison: Comparison, runs: Sequence[Run]) -> str:
    """The pilot's answers in words."""
    scores = comparison.scores()
    dataset = comparison.candidates.dataset
    groups = dataset.column("prompt_id").codes
    subject, lines = comparison.subject.name, []
    for name in comparison.subject.uses_metrics:
        within, wide = spread(scores[name], groups)
        lines.append(
            f"Spread of {name}: {within:.0%} of its variance is among the candidates of a prompt; within a prompt the "
            f"largest and the smallest differ by {wide:.0%} of the median."
        )
    for name, (rank, same) in stability(comparison, scores).items():
        lines.append(
            f"Stability of {name}: after a run of this budget, rank correlation {rank:.2f} with before; {same:.0%} of "
            "prompts keep their best candidate."
        )
    seconds = [run.seconds["training"] + run.seconds["measuring"] for run in runs if run.arm == "matched_random"]
    cost = scoring_cost(comparison.folder)
    scored = f"; scoring all candidates once takes {cost[1]:.0f} s" if cost else ""
    if seconds:
        lines.append(f"Cost of the matched control: {np.mean(seconds):.0f} s for each seed, as any other arm{scored}.")
    differences = paired(measured_runs(runs), PRIMARY, subject, "matched_random")
    if differences:
        between, within = noise(differences)
        lines.append(
            f"Noise of {subject} against its matched control: {between:.4f} nats between seeds"
            f"{' (unknown with one seed)' if len(differences) < 2 else ''}, {within:.4f} between prompts."
        )
        for effect in (comparison.margin, 2 * comparison.margin, 5 * comparison.margin):
            seeds = seeds_needed(effect, between=between, within=within, prompts=comparison.held_out, contrasts=4)
            needed = f"{seeds} seeds" if seeds else "more than 1000 seeds"
            hours = (
                f", {2 * (seeds or 1000) * float(np.mean(seconds)) / 3600:.1f} h for the two arms" if seconds else ""
            )
            lines.append(f"To see {effect:g} nats per token with probability 0.8: {needed} of this budget{hours}.")
    return "\n".join(lines)
