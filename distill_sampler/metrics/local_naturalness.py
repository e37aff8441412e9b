"""Local Naturalness, arXiv:2510.03988 (ICML 2026): how likely each step is after the prompt and a few steps."""

from __future__ import annotations

from dataclasses import dataclass

from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.windows import WindowMetric
from distill_sampler.types import FloatArray


@documents_fields
@dataclass(frozen=True, kw_only=True, repr=False)
class LocalNaturalness(WindowMetric):
    """Mean over a response's steps of the mean log-probability (nats) of each step. Higher is better.

    The student reads each step after the prompt and at most `window` steps before it, without the older ones. The mean
    over steps is unweighted: a short step counts as much as a long one. A response of one step gets its global mean
    log-probability. A sample takes several forward passes: the first `window + 1` steps share one, and every later step
    has its own, shorter one. No view holds more than the prompt and `window + 1` steps, so the metric can score traces
    longer than the model's context, which no global score can.

    Weak spots: the first token of a step is hard to predict, so short steps score badly (`AslecDrop` leaves that token
    out). Much of the gain in the paper may come from mixing teachers; compare with `Random` at the same mixture.
    """

    name: str = "local_naturalness"
    """Its name in policies, and the column of the score."""

    def of_step(self, surprisal: FloatArray) -> float:
        return -float(surprisal.mean(dtype=float))
