"""What one epoch's plan looks like, as numbers for a log and as a table for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from distill_sampler.metrics.groups import group_score
from distill_sampler.policies import effective_sample_size
from distill_sampler.types import Column, EpochPlan, FloatArray, IntArray, Metric

PREFIX = "curriculum/"
"""Every number in a trainer's log starts with this."""


@dataclass(frozen=True, kw_only=True)
class TeacherRow:
    """One teacher's part in an epoch."""

    teacher: str
    candidates: int
    """Samples of this teacher that the epoch could have had."""
    chosen: int
    """Places of the plan that this teacher's samples fill."""
    tokens: float
    """Mean number of response tokens of its candidates."""
    scores: Mapping[str, float]
    """By metric: the *group* score of its candidates with a score; NaN without any."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoringSummary:
    """What it took to know the scores that a plan was made by, and how old they are."""

    samples: int
    """Scored for it."""
    observed: int
    """Seen in training since the last pass."""
    estimated: int
    """Candidates whose scores are older, moved by the drift of the others."""
    tokens: int
    """That went through the student."""
    tokens_of: Mapping[str, int]
    """Thereof, by metric, as if each were the only one."""
    seconds: float
    share: float
    """Of the run's time so far that scoring took, the first pass left out."""
    age_median: float
    """Optimizer steps since a candidate's scores were measured."""
    age_max: int
    non_finite: IntArray
    """Candidates left out because the student's logits for them were NaN or infinite."""
    too_long: IntArray
    """Candidates without the score of some metric: they have more tokens than the student has positions for."""
    not_applicable: Mapping[str, int] = field(default_factory=dict)
    """By metric, candidates that it does not apply to."""


@dataclass(frozen=True, kw_only=True)
class EpochSummary:
    """The numbers of one plan of an epoch and of the scoring it came from."""

    epoch: int
    step: int
    num_samples: int
    """Length of the plan."""
    distinct: int
    """Distinct samples in it."""
    candidates: int
    plan_fingerprint: str
    effective_sample_size: float
    """Kish's (Σw)² / Σw² over the plan's weights, repeats of a sample added up."""
    mean_scores: Mapping[str, tuple[float, float]]
    """By metric: mean over all scored candidates, mean over the plan."""
    teachers: Sequence[TeacherRow]
    """Empty if the data set does not name teachers. Most chosen first."""
    scoring: ScoringSummary
    notes: Sequence[str]
    """Sentences that a person should read."""

    def logs(self) -> dict[str, float]:
        """Scalars for the trainer's log, whatever `report_to` is."""
        numbers: dict[str, float] = {
            "effective_sample_size": self.effective_sample_size,
            "distinct_samples": self.distinct,
            "non_finite_samples": len(self.scoring.non_finite),
            "too_long_samples": len(self.scoring.too_long),
            "scored_samples": self.scoring.samples,
            "observed_samples": self.scoring.observed,
            "estimated_samples": self.scoring.estimated,
            "score_age_median": self.scoring.age_median,
            "score_age_max": self.scoring.age_max,
            "scoring_seconds": round(self.scoring.seconds, 3),
            "scoring_tokens_per_second": round(self.scoring.tokens / max(self.scoring.seconds, 1e-9), 1),
            "scoring_share_of_run": round(self.scoring.share, 4),
            # loggers keep float32: the first 24 bits are the most that survives exactly
            "plan_hash": int(self.plan_fingerprint[:6], 16),
        }
        for metric, (candidates, chosen) in self.mean_scores.items():
            numbers[f"{metric}/candidates"] = candidates
            numbers[f"{metric}/chosen"] = chosen
        for row in self.teachers:
            numbers[f"share/{row.teacher}"] = row.chosen / self.num_samples
        return {PREFIX + name: value for name, value in numbers.items() if np.isfinite(value)}

    def table(self) -> RenderableType:
        """A compact table for the terminal."""
        title = Text(f"Epoch {self.epoch}", style="bold")
        title.append(
            f"  {self.num_samples} of {self.candidates} candidates, plan {self.plan_fingerprint}", style="none"
        )
        scoring = self.scoring
        if scoring.tokens:
            rate = scoring.tokens / max(scoring.seconds, 1e-9)
            title.append(
                f"\nscored {scoring.samples:,} samples, {scoring.tokens:,} tokens, in {scoring.seconds:.1f} s "
                f"({rate:,.0f} tokens/s)",
                style="dim",
            )
        if set(scoring.tokens_of.values()) - {0, scoring.tokens}:  # some share their forwards, some do not
            each = ", ".join(f"{metric.replace('_', ' ')} {tokens:,}" for metric, tokens in scoring.tokens_of.items())
            title.append(f"\ntokens by metric, shared forwards counted for each: {each}", style="dim")
        if scoring.age_max:
            title.append(
                f"\nscores are up to {scoring.age_max} steps old, half of them {scoring.age_median:.0f} or less; "
                f"{scoring.observed:,} seen in training, {scoring.estimated:,} estimated",
                style="dim",
            )
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("teacher", no_wrap=True)
        for heading in ("candidates", "tokens", *self.mean_scores, "chosen", "share"):
            # between words a heading may wrap, so that several metrics fit a terminal of 80 columns
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
        """Print the table to the terminal's error stream, where progress bars are too."""
        Console(stderr=True).print("\n", self.table(), sep="")


def summarise(
    *,
    epoch: int,
    step: int,
    plan: EpochPlan,
    metrics: Mapping[str, Metric],
    scores: Mapping[str, FloatArray],
    teacher: Column | None,
    scorable: IntArray,
    num_scored: IntArray,
    scoring: ScoringSummary,
    notes: Sequence[str],
) -> EpochSummary:
    """Put an epoch's numbers together. Arrays are indexed by sample; `scorable` lists the candidates."""
    mean_scores = {}
    for name in metrics:
        candidates, chosen = scores[name][scorable], scores[name][plan.indices]
        mean_scores[name] = (_nanmean(candidates), _nanmean(chosen))
    rows = []
    if teacher is not None:
        chosen_counts = np.bincount(teacher.codes[plan.indices], minlength=len(teacher.values))
        for code, value in enumerate(teacher.values):
            own = scorable[teacher.codes[scorable] == code]
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
        distinct=len(np.unique(plan.indices)),
        candidates=len(scorable),
        plan_fingerprint=plan.fingerprint,
        effective_sample_size=effective_sample_size(plan),
        mean_scores=mean_scores,
        teachers=tuple(rows),
        scoring=scoring,
        notes=tuple(notes),
    )


def _nanmean(values: FloatArray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean(dtype=np.float64)) if len(finite) else float("nan")
