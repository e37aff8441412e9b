"""The numbers of one plan, for a trainer's log and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from distill_sampler.metrics.groups import group_score
from distill_sampler.planning.packs import PackCounts
from distill_sampler.policies import effective_sample_size
from distill_sampler.policies.keys import num_distinct
from distill_sampler.protocols import Metric
from distill_sampler.types import EncodedColumn, EpochPlan, FloatArray, IntArray

PREFIX = "curriculum/"
"""Prefix of every name in a trainer's log."""
Logs = Literal["few", "all"]
"""How many of a plan's numbers go into a trainer's log."""
_MOST_SHARES = 10
"""The shares of so many teachers are among the few numbers."""


@dataclass(frozen=True, kw_only=True)
class TeacherRow:
    """One teacher's samples in an epoch."""

    teacher: str
    candidates: int
    """Samples of this teacher that could be chosen."""
    chosen: int
    """Positions of the plan that hold this teacher's samples."""
    tokens: float
    """Mean number of response tokens of its candidates."""
    scores: Mapping[str, float]
    """By metric: the *group* score of its candidates that have a score; NaN if none has."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoringSummary:
    """What scoring for one plan cost, and how old the scores are."""

    samples: int
    """Samples that were scored for this plan."""
    observed: int
    """Samples whose scores were observed in training since the last pass."""
    estimated: int
    """Candidates whose scores are estimates: older scores, moved by the drift of the others."""
    tokens: int
    """Tokens that the student read."""
    tokens_of: Mapping[str, int]
    """By metric, the tokens it would have needed alone. Shared forward passes count for each metric."""
    seconds: float
    share: float
    """Share of the run's time so far that scoring took, without the first pass."""
    age_median: float
    """Optimizer steps since a candidate's scores were measured, median over candidates."""
    age_max: int
    non_finite: IntArray
    """Candidates without a score because the student's logits for them were NaN or infinite."""
    too_long: IntArray
    """Candidates without a score because they have more tokens than the student has positions for."""
    not_applicable: Mapping[str, int] = field(default_factory=dict)
    """By metric, how many candidates it does not apply to."""
    non_finite_weights: str = ""
    """The student's parameters that are NaN or infinite, in words; empty if none is. Looked at only if logits are."""
    from_file: int = 0
    """Samples whose scores came from `Curriculum(scores=)`."""


@dataclass(frozen=True, kw_only=True)
class EpochSummary:
    """The numbers of one plan and of the scoring for it."""

    epoch: int
    step: int
    num_samples: int
    """Length of the plan."""
    distinct: int
    """Distinct samples in the plan."""
    candidates: int
    plan_fingerprint: str
    effective_sample_size: float
    """Kish's (Σw)² / Σw² over the plan's weights, with the copies of a sample added up."""
    mean_scores: Mapping[str, tuple[float, float]]
    """By metric: mean over all scored candidates, mean over the plan."""
    teachers: Sequence[TeacherRow]
    """By teacher, most chosen first. Empty if the data set does not name teachers."""
    scoring: ScoringSummary
    notes: Sequence[str]
    """Notes that the user should read."""
    packed: PackCounts | None = None
    """What its packs hold."""

    def logs(self, which: Logs = "few") -> dict[str, float]:
        """The numbers for the trainer's log, for any `report_to`.

        Args:
            which: `"few"`: the mean score of the candidates and of the plan, the share of each teacher (of the ten with
                the largest shares) and the age of the scores; `"all"`: also counts, and what scoring cost.
        """
        numbers: dict[str, float] = {}
        for metric, (candidates, chosen) in self.mean_scores.items():
            numbers[f"{metric}/candidates"] = candidates
            numbers[f"{metric}/chosen"] = chosen
        shown = self.teachers if which == "all" else self.teachers[:_MOST_SHARES]
        for row in shown:
            numbers[f"share/{row.teacher}"] = row.chosen / self.num_samples
        numbers["score_age_median"] = self.scoring.age_median
        numbers["score_age_max"] = self.scoring.age_max
        # what a run should not have is told when it is there
        for name, count in (
            ("non_finite_samples", len(self.scoring.non_finite)),
            ("too_long_samples", len(self.scoring.too_long)),
        ):
            if count or which == "all":
                numbers[name] = count
        if self.packed is not None:
            numbers["pack_fill"] = round(self.packed.fill, 4)
        if which == "all":
            numbers |= {
                "effective_sample_size": self.effective_sample_size,
                "distinct_samples": self.distinct,
                "scored_samples": self.scoring.samples,
                "observed_samples": self.scoring.observed,
                "estimated_samples": self.scoring.estimated,
                "scoring_seconds": round(self.scoring.seconds, 3),
                "scoring_tokens_per_second": round(self.scoring.tokens / max(self.scoring.seconds, 1e-9), 1),
                "scoring_share_of_run": round(self.scoring.share, 4),
            }
            if self.packed is not None:
                numbers["pack_tokens"] = self.packed.tokens
        return {PREFIX + name: value for name, value in numbers.items() if np.isfinite(value)}

    def rows(self) -> list[dict[str, str | float]]:
        """The table by teacher as data, for a log that has tables. Empty if the data set does not name teachers."""
        return [
            {
                "teacher": row.teacher,
                "candidates": row.candidates,
                "tokens": row.tokens,
                **{metric: row.scores[metric] for metric in self.mean_scores},
                "chosen": row.chosen,
                "share": row.chosen / self.num_samples,
            }
            for row in self.teachers
        ]

    def table(self) -> RenderableType:
        """A compact table for the terminal."""
        title = Text(f"Epoch {self.epoch}", style="bold")
        title.append(
            f"  {self.num_samples} of {self.candidates} candidates, plan {self.plan_fingerprint}", style="none"
        )
        scoring = self.scoring
        if scoring.from_file:
            title.append(f"\ntook the scores of {scoring.from_file:,} samples from a file", style="dim")
        if scoring.tokens:
            rate = scoring.tokens / max(scoring.seconds, 1e-9)
            title.append(
                f"\nscored {scoring.samples:,} samples, {scoring.tokens:,} tokens, in {scoring.seconds:.1f} s "
                f"({rate:,.0f} tokens/s)",
                style="dim",
            )
        if set(scoring.tokens_of.values()) - {0, scoring.tokens}:  # not all metrics share all forward passes
            each = ", ".join(f"{metric.replace('_', ' ')} {tokens:,}" for metric, tokens in scoring.tokens_of.items())
            title.append(f"\ntokens by metric (shared forward passes count for each): {each}", style="dim")
        if scoring.age_max:
            title.append(
                f"\nscores are up to {scoring.age_max} steps old (median {scoring.age_median:.0f}); "
                f"{scoring.observed:,} observed in training, {scoring.estimated:,} estimated",
                style="dim",
            )
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("teacher", no_wrap=True)
        for heading in ("candidates", "tokens", *self.mean_scores, "chosen", "share"):
            # headings wrap between words, so that several metrics fit into 80 columns
            table.add_column(heading.replace("_", " "), justify="right", min_width=6)
        for row in self.teachers:
            table.add_row(
                Text(row.teacher),
                str(row.candidates),
                f"{row.tokens:.0f}",
                *(f"{row.scores[metric]:.3f}" for metric in self.mean_scores),
                str(row.chosen),
                f"{row.chosen / self.num_samples:.0%}",
            )
        for label, side in (("mean of candidates", 0), ("mean of the plan", 1)):
            if self.mean_scores:
                scores = (f"{means[side]:.3f}" for means in self.mean_scores.values())
                table.add_row(Text(label, style="dim"), "", "", *scores, "", "")
        return Group(title, table, *(Text(f"note: {note}", style="yellow") for note in self.notes))

    def print(self) -> None:
        """Print the table to stderr, where progress bars are too."""
        Console(stderr=True).print("\n", self.table(), sep="")


def summarise(
    *,
    epoch: int,
    step: int,
    plan: EpochPlan,
    metrics: Mapping[str, Metric],
    scores: Mapping[str, FloatArray],
    teacher: EncodedColumn | None,
    candidates: IntArray,
    num_scored: IntArray,
    scoring: ScoringSummary,
    notes: Sequence[str],
    packed: PackCounts | None = None,
) -> EpochSummary:
    """Compute the numbers of a plan. Arrays are indexed by sample; `candidates` lists sample indices."""
    mean_scores = {}
    for name in metrics:
        mean_scores[name] = (_nanmean(scores[name][candidates]), _nanmean(scores[name][plan.indices]))
    rows = []
    if teacher is not None:
        chosen_counts = np.bincount(teacher.codes[plan.indices], minlength=len(teacher.values))
        for code, value in enumerate(teacher.values):
            own = candidates[teacher.codes[candidates] == code]
            rows.append(
                TeacherRow(
                    teacher=str(value),
                    candidates=len(own),
                    chosen=int(chosen_counts[code]),
                    tokens=float(num_scored[own].mean()) if len(own) else 0.0,
                    scores={name: group_score(metric, scores, own) for name, metric in metrics.items()},
                )
            )
        rows.sort(key=lambda row: (-row.chosen, row.teacher))
    return EpochSummary(
        epoch=epoch,
        step=step,
        num_samples=len(plan),
        distinct=num_distinct(plan.indices),
        candidates=len(candidates),
        plan_fingerprint=plan.fingerprint,
        effective_sample_size=effective_sample_size(plan),
        mean_scores=mean_scores,
        teachers=tuple(rows),
        scoring=scoring,
        notes=tuple(notes),
        packed=packed,
    )


def _nanmean(values: FloatArray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean(dtype=np.float64)) if len(finite) else float("nan")
