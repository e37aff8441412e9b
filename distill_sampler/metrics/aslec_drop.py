"""ASLEC-drop, arXiv:2604.06834: Local Naturalness without the expensive first token of each step."""

from __future__ import annotations

from dataclasses import dataclass

from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.windows import WindowMetric
from distill_sampler.types import FloatArray


@documents_fields
@dataclass(frozen=True, kw_only=True, repr=False)
class AslecDrop(WindowMetric):
    """`LocalNaturalness` with the first `skip` tokens of each step left out. Higher is better.

    The first token of a step opens a thought and is expensive whatever follows, which punishes short steps. Where
    windows and steps are the same, the forwards are shared with `LocalNaturalness`.
    """

    skip: int = 1
    """Tokens at the start of each step that do not count (its last always does)."""
    name: str = "aslec_drop"
    """What policies call it, and the score's column."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip < 0:
            raise ValueError(f"AslecDrop(skip={self.skip}): give 0 or more tokens.")

    def of_step(self, surprisal: FloatArray) -> float:
        return -float(surprisal[min(self.skip, len(surprisal) - 1) :].mean(dtype=float))
