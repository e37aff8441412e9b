"""LARK's learnability factor, arXiv:2605.30651: how fast the loss on a response falls when the student trains on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.rank_surprisal_ratio import ratio
from distill_sampler.protocols import Metric
from distill_sampler.types import FloatArray, Sample, TokenStats


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Lark(Metric):
    """ρ = B / L: the mean Brier score of the response's tokens over their mean surprisal. Higher is better.

    L is the mean of -log p (nats). B is the mean of |onehot(y) - p|² = 1 - 2 p(y) + Σ p², the squared gradient of the
    loss by the logits, so ρ is how fast the loss falls relative to its size. LARK does not choose by ρ alone, but by
    the gain g within each prompt's candidates, which also considers a response's share of the loss: `LarkGain`, as in
    `KeepByMargin(LarkGain(per="prompt_id"), per="prompt_id", k=3)`. A group's score here is ΣB / ΣL over its samples.
    One forward pass per sample, shared with `RankSurprisalRatio`.

    Columns: `lark_loss` (L), `lark_brier` (B) and `lark` (ρ).

    What to keep in mind: ρ is small both for tokens that the student is sure of and for tokens that it thinks
    impossible; it is largest for tokens with a probability near 0.25. It says nothing about length or correctness. So
    far, the only results are the authors' own.
    """

    top_50: bool = False
    """Compute B over the 50 most likely tokens, with probabilities scaled to add up to 1, as the authors' code does to
    save memory. False: over all tokens, as in the paper, which is cheaper here."""
    name: str = "lark"
    """Its name in policies, the column of the score, and the beginning of the other columns' names."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (f"{self.name}_loss", f"{self.name}_brier", self.name)

    @property
    def uses_statistics(self) -> tuple[str, ...]:
        return ("top50", "top50_sum_p2") if self.top_50 else ("sum_p2",)

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        (tokens,) = stats
        p = np.exp(-tokens.surprisal.astype(np.float64))
        if self.top_50:
            assert tokens.top50 is not None, "asked for in uses_statistics"
            assert tokens.top50_sum_p2 is not None, "asked for in uses_statistics"
            assert tokens.rank is not None, "the student gives ranks"
            mass = tokens.top50.astype(np.float64)
            p = np.where(tokens.rank <= 50, p / mass, 0.0)
            sum_p2 = tokens.top50_sum_p2 / mass**2
        else:
            assert tokens.sum_p2 is not None, "asked for in uses_statistics"
            sum_p2 = tokens.sum_p2.astype(np.float64)
        loss = float(tokens.surprisal.mean(dtype=np.float64))
        brier = float((1 - 2 * p + sum_p2).mean())
        return dict(zip(self.columns, (loss, brier, ratio(brier, loss)), strict=True))

    def aggregate(self, columns: Mapping[str, FloatArray]) -> float:
        loss, brier, _ = self.columns
        return ratio(float(columns[brier].sum(dtype=float)), float(columns[loss].sum(dtype=float)))
