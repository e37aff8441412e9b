"""Where the sentences of a distilled model come from, arXiv:2512.20908 (ICLR 2026): its teacher, itself, or both.

The teacher, the student before distillation, and the student after it read the same text. Each model gives every
sentence a probability (`spans.SentenceLogProbs.probability`), and the differences between these decide its class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.spans import SentenceLogProbs
from distill_sampler.types import BoolArray, FloatArray, IntArray

CLASSES = ("shared", "teacher", "student", "boosted")
"""Names of the classes, in the order of their numbers."""
BYTES_PER_TOKEN = 4.0
"""What a token of today's vocabularies holds of English text, roughly: probabilities by bytes are then of the same size
as those by tokens, and the same thresholds can be used."""
SHARED, TEACHER, STUDENT_OWN, BOOSTED = range(4)


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The thresholds that decide where a sentence comes from.

    Let p_T, p_S and p_D be the probabilities of a sentence by teacher, student and distilled model. As in the paper,
    the sentence is **shared** if no two of them differ by more than `alpha`; else **teacher** if p_T - p_S > `beta`;
    else **student** if p_S - p_T > `beta`; else **boosted**: distillation changed its probability, and neither the
    teacher nor the student explains it.

    Weak spot: the paper does not say which `alpha` it used, and the classes depend on both thresholds. Check with
    `sensitivity`.
    """

    alpha: float = 0.1
    """Largest difference at which probabilities count as equal. The paper does not give it; the default is `beta`'s."""
    beta: float = 0.1
    """Difference beyond which a sentence counts as the teacher's or the student's. The default is the paper's value."""
    bytes_per_token: float | None = None
    """How a sentence's log-probability is normalised. None: by the number of the model's own tokens, as in the paper. A
    number, such as 4: by the sentence's bytes divided by it, which does not favour tokenizers with many tokens."""

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0 <= value < 1:
                raise ValueError(
                    f"Provenance({name}={value}): it is a difference of probabilities. Give a number from 0 up to 1, "
                    "such as 0.1."
                )
        if self.bytes_per_token is not None and not self.bytes_per_token > 0:
            raise ValueError(
                f"Provenance(bytes_per_token={self.bytes_per_token}): give a positive number of bytes, such as 4, or "
                "None to normalise by the models' own tokens."
            )

    @property
    def other_way(self) -> Provenance:
        """The same thresholds for probabilities by bytes instead of tokens, or by tokens instead of bytes."""
        return replace(self, bytes_per_token=BYTES_PER_TOKEN if self.bytes_per_token is None else None)

    def is_teacher(self, teacher: SentenceLogProbs, student: SentenceLogProbs) -> BoolArray:
        """`[sentences]` True where the teacher's probability is more than `beta` above the student's."""
        return self._probability(teacher) - self._probability(student) > self.beta

    def classes(self, teacher: SentenceLogProbs, student: SentenceLogProbs, distilled: SentenceLogProbs) -> IntArray:
        """`[sentences]` the class of each sentence, as a position in `CLASSES`."""
        p_t, p_s, p_d = (self._probability(each) for each in (teacher, student, distilled))
        shared = np.max(np.abs([p_t - p_s, p_t - p_d, p_s - p_d]), axis=0) <= self.alpha
        return np.select(
            [shared, p_t - p_s > self.beta, p_s - p_t > self.beta], [SHARED, TEACHER, STUDENT_OWN], BOOSTED
        ).astype(np.int64)

    def _probability(self, model: SentenceLogProbs) -> FloatArray:
        return model.probability(self.bytes_per_token)


Readings = tuple[SentenceLogProbs, SentenceLogProbs, SentenceLogProbs]
"""The sentence log-probabilities of one response by teacher, student and distilled model."""


def sensitivity(
    responses: Sequence[Readings], provenance: Provenance, at: Sequence[float] = (0.05, 0.1, 0.15)
) -> dict[float, FloatArray]:
    """`[classes]` the share of all sentences in each class, for several values of both thresholds.

    Args:
        responses: for each response, the log-probabilities of its sentences by the three models.
        provenance: its `bytes_per_token` is used.
        at: values that alpha and beta both take.
    """
    return {
        value: class_shares([replace(provenance, alpha=value, beta=value).classes(*each) for each in responses])
        for value in at
    }


def class_shares(classes: Sequence[IntArray]) -> FloatArray:
    """`[classes]` the share of each class among all sentences of some responses; NaN if there are no sentences."""
    counts = np.bincount(np.concatenate([*classes, np.zeros(0, np.int64)]), minlength=len(CLASSES))
    return counts / counts.sum() if counts.sum() else np.full(len(CLASSES), np.nan)


def class_curves(classes: Sequence[IntArray], bins: int = 10) -> FloatArray:
    """`[bins, classes]` the share of each class by position in the response, from its beginning to its end.

    Sentence i of n covers its response from i / n to (i + 1) / n. The share of a class in a bin is the part of the bin
    that its sentences cover, averaged over responses, so that long responses count no more than short ones.

    Args:
        classes: for each response `[sentences]`, at least one.
        bins: into how many equal parts a response is divided.
    """
    if not classes:
        return np.full((bins, len(CLASSES)), np.nan)
    curves = np.zeros((bins, len(CLASSES)))
    edges = np.linspace(0, 1, bins + 1)
    for response in classes:
        # covered[c] is how much of the response before x is of class c: linear between the sentences' edges
        member = response[:, None] == np.arange(len(CLASSES))
        covered = np.vstack([np.zeros(len(CLASSES)), np.cumsum(member, axis=0)]) / len(response)
        at = np.linspace(0, 1, len(response) + 1)
        curves += np.stack([np.diff(np.interp(edges, at, each)) for each in covered.T], axis=1) * bins
    return curves / len(classes)


def area_between(one: FloatArray, other: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The area between two sets of curves, by class.

    Args:
        one: `[bins, classes]` of `class_curves`, such as those of correct responses.
        other: `[bins, classes]`, such as those of incorrect responses.

    Returns:
        `[classes]` the area between the curves, and the signed area, negative where `one` is below `other`. Positions
        go from 0 to 1, so 0.1 means that the shares differ by ten percentage points throughout.
    """
    difference = one - other
    return np.abs(difference).mean(axis=0), difference.mean(axis=0)
