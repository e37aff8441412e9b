"""What scoring gives, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.types import FloatArray, IntArray, Missing, TokenStats


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """The numbers of some samples, as soon as they are known."""

    indices: IntArray
    """`[samples]` which samples."""
    columns: Mapping[str, FloatArray]
    """`[samples]` each; NaN where a sample has no score."""
    missing: Mapping[str, IntArray]
    """By metric, `[samples]` why a sample has no score (`Missing`); 0 where it has one."""
    tokens: int
    """Tokens that went through the readers for them, without padding."""
    tokens_of: Mapping[str, int]
    """By metric, the tokens of the views that it asked for, as if it were the only metric. A prompt that several views
    share counts in equal parts."""
    traces: Mapping[int, TokenStats] = field(default_factory=dict)
    """The student's token statistics of those samples whose traces were asked for."""

    def without_score(self, reason: Missing) -> IntArray:
        """The samples that some metric has no score for, for this reason."""
        found = np.zeros(len(self.indices), bool)
        for codes in self.missing.values():
            found |= codes == reason
        return self.indices[found]

    @property
    def non_finite(self) -> IntArray:
        """Samples for which some reader's logits were NaN or infinite."""
        return self.without_score(Missing.NON_FINITE)

    @property
    def too_long(self) -> IntArray:
        """Samples with a view of more tokens than its reader has positions for."""
        return self.without_score(Missing.TOO_LONG)

    @property
    def not_applicable(self) -> IntArray:
        """Samples that some metric does not apply to."""
        return self.without_score(Missing.NOT_APPLICABLE)
