"""Reducible holdout loss (RHO-LOSS), arXiv:2206.07137 (ICML 2022): what the student has not learnt yet, but can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.second_model import SecondModel, SecondModelMetric
from distill_sampler.types import Sample, TokenStats


@documents_fields
@dataclass(frozen=True, kw_only=True, repr=False)
class ExcessLoss(SecondModelMetric):
    """The student's loss on the response minus a reference model's, in nats per token of the student. Higher is better.

    A high loss alone may be noise, which cannot be learnt. A sample that is easy for the reference but not for the
    student is worth training on. In the paper, the reference is trained on held-out data; a teacher can replace it. If
    the reference has another tokenizer, the losses of the whole response are compared, divided by the number of the
    student's tokens. Needs one forward of the student, shared with RSR, and one of the reference, in the first pass
    only.

    Columns: `reference_loss` (nats per token of the student) and `excess_loss`. With another `name`, the first has it
    as a prefix.

    Weak spot: for a reference that was trained on the samples, all of them are easy. This is then the student's loss.
    """

    reference: SecondModel
    """The reference model: the path of a store of its log-probabilities (`.arrow`), or a `ModelReader`, with
    `tokenizer=` if that is not the student's."""
    name: str = "excess_loss"
    """Its name in policies, and the column of the score."""

    @property
    def second(self) -> tuple[str, SecondModel]:
        return "reference", self.reference

    @property
    def columns(self) -> tuple[str, ...]:
        prefix = "" if self.name == "excess_loss" else f"{self.name}_"
        return (f"{prefix}reference_loss", self.name)

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        _, of_reference = self.read_by_second(sample, stats)
        student, reference = (float(each.sum(dtype=np.float64)) for each in (stats[0].surprisal, of_reference))
        tokens = len(stats[0].surprisal)
        return dict(zip(self.columns, (reference / tokens, (student - reference) / tokens), strict=True))
