"""A metric that reads a column of the data set, and one that compares the student with a tutor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from distill_sampler import Metric, Reader, Sample, TokenStats, View
from distill_sampler.metrics.response import response_view
from distill_sampler.types import FloatArray


@dataclass(frozen=True, kw_only=True)
class RewardPerNat(Metric):
    """A verifier's reward for each nat of surprise: what is right and close to what the student would say."""

    column: str = "reward"
    """Holds the reward; a sample without one has no score."""
    name: str = "reward_per_nat"

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float] | None:
        reward = sample.columns[self.column]
        if reward is None:
            return None
        return {self.name: float(reward) / (1 + float(stats[0].surprisal.sum(dtype=float)))}


@dataclass(frozen=True, kw_only=True)
class TutorRatio(Metric):
    """The student's mean surprisal as a multiple of a tutor's. A group has the ratio of the sums."""

    tutor: Reader
    """Who the student is compared with; it reads the student's tokens."""
    name: str = "tutor_ratio"

    @property
    def columns(self) -> tuple[str, ...]:
        return (f"{self.name}_student", f"{self.name}_tutor", self.name)

    @property
    def readers(self) -> Mapping[str, Reader]:
        return {"tutor": self.tutor}

    def views(self, sample: Sample) -> Sequence[View]:
        view = response_view(sample)
        return (view, replace(view, reader="tutor"))

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float] | None:
        student, tutor = (float(each.surprisal.mean(dtype=float)) for each in stats)
        if tutor == 0:  # a tutor that is sure of every token
            return None
        return dict(zip(self.columns, (student, tutor, student / tutor), strict=True))

    def aggregate(self, columns: Mapping[str, FloatArray]) -> float:
        student, tutor, _ = self.columns
        return float(columns[student].sum(dtype=float)) / float(columns[tutor].sum(dtype=float))
