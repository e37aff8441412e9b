"""Rho-1's choice of tokens, arXiv:2404.07965 (NeurIPS 2024), as a diagnostic: how many are worth learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.second_model import SecondModel, SecondModelMetric
from distill_sampler.types import Sample, TokenStats, View


@documents_fields
@dataclass(frozen=True, kw_only=True, repr=False)
class Rho1Share(SecondModelMetric):
    """Share of the response's tokens whose loss under the student exceeds a reference model's. Higher is better.

    Rho-1 trains only on the tokens with the largest excess loss, student minus reference. This metric tells, for each
    sample, how many such tokens it has, and how large their excess is; it does not change the training loss.
    `ExcessLoss` is the same difference over the whole response. Needs one forward of the student, shared with
    `RankSurprisalRatio`, and one of the reference, in the first pass only.

    Columns: `rho1_excess` (nats: mean excess of the tokens that count, 0 if there is none) and `rho1_share`.

    What to keep in mind: the paper takes the top 60 % or so of a *batch*, so its threshold moves with the student; here
    it is fixed, which makes samples comparable. A reference that is no better than the student gives a share near one
    half that means nothing.
    """

    reference: SecondModel
    """The reference model: a `ModelReader`, or the path of a store of its log-probabilities (`.arrow`). It must have
    the student's tokenizer, because tokens are compared one by one."""
    threshold: float = 0.0
    """A token counts if its excess loss, in nats, is above this."""
    name: str = "rho1_share"
    """Its name in policies, and the column of the score."""

    @property
    def second(self) -> tuple[str, SecondModel]:
        return "reference", self.reference

    @property
    def columns(self) -> tuple[str, ...]:
        prefix = "rho1" if self.name == "rho1_share" else self.name
        return (f"{prefix}_excess", self.name)

    def views(self, sample: Sample) -> Sequence[View] | None:
        views = super().views(sample)
        if views is not None and not self.second_reads_same_tokens(sample):
            raise ValueError(
                "Rho1Share(reference=): the reference model has another tokenizer than the student, so their tokens "
                "cannot be compared one by one. Give a reference of the student's family, or use ExcessLoss, which "
                "compares whole responses."
            )
        return views

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        _, of_reference = self.read_by_second(sample, stats)
        excess = stats[0].surprisal.astype(np.float64) - of_reference.astype(np.float64)
        counts = excess > self.threshold
        mean = float(excess[counts].mean()) if counts.any() else 0.0
        return dict(zip(self.columns, (mean, float(counts.mean())), strict=True))
