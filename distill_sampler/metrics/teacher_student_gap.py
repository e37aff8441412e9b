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

    p is the geometric mean of the probabilities of a sentence's tokens, as in `TeacherSentences`, but without a
    threshold, and a mean, which a longer response does not raise. It ranks samples for divergence-aware sampling
    (several responses of one teacher, those kept that the student would say least):
    `KeepTop("teacher_student_gap", max_tokens=…)`. The forwards are those of `TeacherSentences`.

    Weak spot: a mean hides a few strong sentences in a long response.
    """

    name: str = "teacher_student_gap"
    """Its name in policies, and the column of the score."""

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        p_teacher, p_student = (each.probability(self.bytes_per_token) for each in self.by_sentence(sample, stats))
        return {self.name: float((p_teacher - p_student).mean())}
