"""The result of scoring a block of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.types import FloatArray, IntArray, Missing, TokenStats


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """The numbers of the samples of one block."""

    indices: IntArray
    """`[samples]` the samples' indices."""
    columns: Mapping[str, FloatArray]
    """The metrics' numbers by name, `[samples]` each; NaN where a sample has no score."""
    missing: Mapping[str, IntArray]
    """By metric, `[samples]` why a sample has no score (`Missing`); 0 where it has one."""
    tokens: int
    """How many tokens the readers processed for these samples, without padding."""
    tokens_of: Mapping[str, int]
    """By metric, how many tokens the readers processed for its views, as if it were the only metric. A prompt that
    several views share counts in equal parts."""
    traces: Mapping[int, TokenStats] = field(default_factory=dict)
    """The student's token statistics, by sample, of those samples for which they were requested."""

    def without_score(self, reason: Missing) -> IntArray:
        """The samples for which at least one metric has no score for this reason."""
        found = np.zeros(len(self.indices), bool)
        for codes in self.missing.values():
            found |= codes == reason
        return self.indices[found]

    @property
    def non_finite(self) -> IntArray:
        """Samples for which a reader's logits were NaN or infinite."""
        return self.without_score(Missing.NON_FINITE)

    @property
    def too_long(self) -> IntArray:
        """Samples with a view of more tokens than its reader has positions for."""
        return self.without_score(Missing.TOO_LONG)

    @property
    def not_applicable(self) -> IntArray:
        """Samples to which at least one metric does not apply."""
        return self.without_score(Missing.NOT_APPLICABLE)
