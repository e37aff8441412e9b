"""Instruction-Following Difficulty (IFD), arXiv:2308.12032 (NAACL 2024): how little the question helps the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.response import response_view
from distill_sampler.protocols import Metric
from distill_sampler.types import Sample, TokenStats, View


@documents_fields
@dataclass(frozen=True, kw_only=True)
class InstructionFollowingDifficulty(Metric):
    """Mean surprisal of the answer after the question, over its mean surprisal when it is read alone. Higher is better.

    A low ratio means that the question already leads the student to the answer, so there is little to learn. Above 1,
    the question makes the answer *less* likely, which the authors take as a sign that the two do not belong together:
    such samples have no score, and a note says how many they are (`limit`). Two forward passes: the sample, shared with
    `RankSurprisalRatio`, and the response without what precedes it.

    Columns: `ifd_conditioned` and `ifd_alone` (nats per token) and `instruction_following_difficulty`. With another
    `name`, the first two get it as a prefix.

    What to keep in mind: it was made to filter single-turn instructions of mixed quality. The beginning of a long
    reasoning trace repeats the question, so the ratios of long traces are close to 1 and differ little. The turns of a
    conversation are read as one text, without what stands between them.
    """

    limit: float | None = 1.0
    """Samples with a larger ratio have no score; 1 in the paper. None: all have one."""
    start_token: int | None = None
    """Token to put before the answer that is read alone, so that its first token is predicted too: the tokenizer's BOS
    token, as in the authors' code for Llama. None, for tokenizers without one, such as Qwen's or SmolLM's: the mean of
    the answer alone leaves out its first token."""
    name: str = "instruction_following_difficulty"
    """Its name in policies, and the column of the score."""

    def __post_init__(self) -> None:
        if self.limit is not None and not self.limit > 0:
            raise ValueError(
                f"InstructionFollowingDifficulty(limit={self.limit}): the ratio is positive; give 1, as in the paper, "
                "or None to score every sample."
            )

    @property
    def columns(self) -> tuple[str, ...]:
        prefix = "ifd" if self.name == "instruction_following_difficulty" else self.name
        return (f"{prefix}_conditioned", f"{prefix}_alone", self.name)

    def views(self, sample: Sample) -> Sequence[View] | None:
        alone = sample.input_ids[sample.scored]
        if self.start_token is not None:
            alone = np.r_[np.int64(self.start_token), alone]
        if len(alone) < 2:  # nothing predicts the only token
            return None
        return (response_view(sample), View(input_ids=alone, scored=np.arange(len(alone)) > 0))

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float] | None:
        conditioned, alone = (float(tokens.surprisal.mean(dtype=np.float64)) for tokens in stats)
        ratio = conditioned / max(alone, 1e-12)
        if self.limit is not None and ratio > self.limit:
            return None
        return dict(zip(self.columns, (conditioned, alone, ratio), strict=True))
