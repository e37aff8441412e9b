"""Reducible holdout loss (RHO-LOSS), arXiv:2206.07137 (ICML 2022): what the student has not learnt yet, and can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.second_model import SecondModelMetric
from distill_sampler.protocols import Reader
from distill_sampler.types import Sample, TokenStats


@documents_fields
@dataclass(frozen=True, kw_only=True, repr=False)
class ExcessLoss(SecondModelMetric):
    """The student's loss on the response minus a reference model's, in nats per token of the student. Higher is better.

    A high loss alone may be noise, which nobody can learn; a sample that the reference finds easy and the student does
    not is worth a step. In the paper the reference is trained on held-out data; a teacher can stand in for it. With
    another tokenizer, the losses of the whole response are compared, over the number of the student's tokens. One
    forward of the student, shared with RSR, and one of the reference, once.

    Columns: `reference_loss` (nats per token of the student) and `excess_loss`. With another `name`, the first gets it
    as a prefix.

    Weak spot: a reference that has seen the samples finds all of them easy; then this is the student's loss.
    """

    reference: Reader
    """The reference model: a `ModelReader`, with `tokenizer=` if that is not the student's."""
    name: str = "excess_loss"
    """Its name in policies, and the column of the score."""

    @property
    def readers(self) -> Mapping[str, Reader]:
        return {"reference": self.reference}

    @property
    def columns(self) -> tuple[str, ...]:
        prefix = "" if self.name == "excess_loss" else f"{self.name}_"
        return (f"{prefix}reference_loss", self.name)

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        student, reference = (float(each.surprisal.sum(dtype=np.float64)) for each in stats)
        tokens = len(stats[0].surprisal)
        return dict(zip(self.columns, (reference / tokens, (student - reference) / tokens), strict=True))
