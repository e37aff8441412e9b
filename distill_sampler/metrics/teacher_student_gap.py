"""How much more probable the teacher finds the sentences of a response than the student does, arXiv:2512.20908."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.second_model import SentenceMetric
from distill_sampler.types import Sample, TokenStats


@documents_fields
@dataclass(frozen=True, kw_only=True, repr=False)
class TeacherStudentGap(SentenceMetric):
    """Mean over the response's sentences of p_T - p_S, between -1 and 1. Higher is better.

    p is the geometric mean of the probabilities of a sentence's tokens, as in `TeacherSentences`. Unlike there, there
    is no threshold, and the mean does not grow with the length of the response. Use it for divergence-aware sampling,
    which keeps those of a teacher's responses that the student is least likely to write:
    `KeepTop("teacher_student_gap", max_tokens=…)`. Needs the same forwards as `TeacherSentences`.

    Weak spot: in a long response, the mean hides a few sentences with a large gap.
    """

    name: str = "teacher_student_gap"
    """Its name in policies, and the column of the score."""

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        p_teacher, p_student = (each.probability(self.bytes_per_token) for each in self.by_sentence(sample, stats))
        return {self.name: float((p_teacher - p_student).mean())}
