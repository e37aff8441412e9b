"""Teacher-guided selection, arXiv:2512.20908 (ICLR 2026): responses with many sentences typical of the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.provenance import Provenance
from distill_sampler.metrics.second_model import SentenceMetric
from distill_sampler.types import Sample, TokenStats


@documents_fields
@dataclass(frozen=True, kw_only=True, repr=False)
class TeacherSentences(SentenceMetric):
    """How many sentences of the response are the teacher's: p_T - p_S > beta. Higher is better.

    Teacher and student both read the response. p is the geometric mean of the probabilities of a sentence's tokens.
    `BestOf("teacher_sentences", per=…)` is the paper's selection, with the current student. Needs one forward of the
    student, shared with RSR, and one of the teacher, in the first pass only, because a frozen teacher's numbers are
    kept.

    Columns: `num_sentences`, `teacher_share`, `teacher_label_flips` (the number of sentences whose label changes when
    probabilities are normalised by bytes instead of tokens, or the other way round) and the score. With another `name`,
    the first three have it as a prefix.

    Weak spots: longer responses have more sentences of every kind. In the paper, selecting by this count reached 58.7,
    by the longest response 57.9, by the share 56.4, and at random 56.2; always compare with `ResponseLength`. If the
    two models have different tokenizers, the threshold does not mean the same for both; look at the label flips.
    """

    by: Literal["count", "share"] = "count"
    """Whether the score is the number of such sentences, as in the paper, or their share of all sentences."""
    first_bytes: int | None = None
    """Only sentences that begin within this many bytes of the response count, so that long responses are compared at
    equal length. None: all sentences."""
    beta: float = 0.1
    """How much more probable the teacher must find a sentence than the student."""
    name: str = "teacher_sentences"
    """Its name in policies, and the column of the score."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in ("count", "share"):
            raise ValueError(f"TeacherSentences(by={self.by!r}): choose 'count' or 'share'.")
        if self.first_bytes is not None and self.first_bytes < 1:
            raise ValueError(
                f"TeacherSentences(first_bytes={self.first_bytes}): give a positive number of bytes, such as 2000."
            )
        self._provenance  # noqa: B018  # refuses invalid thresholds

    @property
    def columns(self) -> tuple[str, ...]:
        prefix = "" if self.name == "teacher_sentences" else f"{self.name}_"
        return (f"{prefix}num_sentences", f"{prefix}teacher_share", f"{prefix}teacher_label_flips", self.name)

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        teacher, student = self.by_sentence(sample, stats)
        begins = np.r_[0, np.cumsum(teacher.num_bytes)[:-1]]
        counted = begins < (np.inf if self.first_bytes is None else self.first_bytes)
        is_teacher = self._provenance.is_teacher(teacher, student)[counted]
        other_way = self._provenance.other_way.is_teacher(teacher, student)[counted]
        count, share = float(is_teacher.sum()), float(is_teacher.mean())
        flips = float((is_teacher != other_way).sum())
        score = count if self.by == "count" else share
        return dict(zip(self.columns, (float(len(is_teacher)), share, flips, score), strict=True))

    @property
    def _provenance(self) -> Provenance:
        return Provenance(beta=self.beta, bytes_per_token=self.bytes_per_token)
