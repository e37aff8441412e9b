"""ASLEC-drop, arXiv:2604.06834: Local Naturalness without the first token of each step, which is hard to predict."""

from __future__ import annotations

from dataclasses import dataclass

from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.windows import WindowMetric
from distill_sampler.types import FloatArray


@documents_fields
@dataclass(frozen=True, kw_only=True, repr=False)
class AslecDrop(WindowMetric):
    """`LocalNaturalness` with the first `skip` tokens of each step left out. Higher is better.

    The first token of a step is hard to predict whatever follows it, so short steps score badly in `LocalNaturalness`.
    This metric leaves that token out. With the same windows and steps, both metrics share their forward passes.
    """

    skip: int = 1
    """Tokens to leave out at the start of each step. The last token of a step always counts."""
    name: str = "aslec_drop"
    """Its name in policies, and the column of the score."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip < 0:
            raise ValueError(f"AslecDrop(skip={self.skip}): give 0 or more tokens.")

    def of_step(self, surprisal: FloatArray) -> float:
        return -float(surprisal[min(self.skip, len(surprisal) - 1) :].mean(dtype=float))
