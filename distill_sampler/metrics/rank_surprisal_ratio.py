"""Rank-Surprisal Ratio, arXiv:2601.14249 (ACL 2026): informative for this student, yet close to what it would say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.protocols import Metric
from distill_sampler.types import FloatArray, Sample, TokenStats


@documents_fields
@dataclass(frozen=True, kw_only=True)
class RankSurprisalRatio(Metric):
    """RSR = Σ_k min(rank_k, r_max) / Σ_k surprisal_k over the response's tokens. Lower is better.

    A low ratio means that the student finds the tokens surprising (there is something to learn), yet ranks them high
    (it can be learnt). `rank_k` is 1 + the number of tokens with a strictly larger logit; `surprisal_k` is in nats. The
    score of a *group* is Σ_j mean_rank(x_j) / Σ_j mean_surprisal(x_j): a ratio of sums of per-sample means, neither the
    mean of the ratios nor pooled over tokens. One forward pass per sample.

    Columns: `mean_rank` (of the clipped ranks), `mean_surprisal` (nats) and `rank_surprisal_ratio`. With another
    `name`, the first two get it as a prefix, so that variants can be scored side by side.

    Weak spots: three teachers from outside the students' family account for part of the paper's correlation, and one
    teacher supplies 45-77 % of each selected set.
    """

    rank_clip: int = 100
    """r_max: larger ranks count as this. The paper reports 50 → .696, 100 → .856, 500 → .822, no clipping → .700."""
    name: str = "rank_surprisal_ratio"
    """Its name in policies, and the column of the score."""

    def __post_init__(self) -> None:
        if self.rank_clip < 1:
            raise ValueError(f"RankSurprisalRatio(rank_clip={self.rank_clip}): ranks start at 1, so clip at 1 or more.")

    @property
    def columns(self) -> tuple[str, ...]:
        prefix = "" if self.name == "rank_surprisal_ratio" else f"{self.name}_"
        return (f"{prefix}mean_rank", f"{prefix}mean_surprisal", self.name)

    @property
    def higher_is_better(self) -> bool:
        return False

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        (tokens,) = stats
        assert tokens.rank is not None, "the student gives ranks"
        mean_rank = float(np.minimum(tokens.rank, self.rank_clip).mean())
        mean_surprisal = float(tokens.surprisal.mean(dtype=np.float64))
        return dict(zip(self.columns, (mean_rank, mean_surprisal, ratio(mean_rank, mean_surprisal)), strict=True))

    def aggregate(self, columns: Mapping[str, FloatArray]) -> float:
        mean_rank, mean_surprisal, _ = self.columns
        return ratio(float(columns[mean_rank].sum(dtype=float)), float(columns[mean_surprisal].sum(dtype=float)))


def ratio(rank: float, surprisal: float) -> float:
    """rank / surprisal, with the authors' guard against surprisal 0, where the student is certain of the response."""
    return rank / max(surprisal, 1e-12)
