"""Local Naturalness, arXiv:2510.03988 (ICML 2026): how likely each step is, given the prompt and a few steps before."""

from __future__ import annotations

from dataclasses import dataclass

from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.windows import WindowMetric
from distill_sampler.types import FloatArray


@documents_fields
@dataclass(frozen=True, kw_only=True, repr=False)
class LocalNaturalness(WindowMetric):
    """Mean over a response's steps of the mean log-probability (nats) of the step's tokens, each step read after the
    prompt and at most `window` steps before it; older steps are not there. Higher is better.

    The mean over steps is unweighted: a short step counts like a long one. A response of one step has its global mean
    log-probability. Several forwards a sample: the first `window + 1` steps share one, every later step has its own
    (shorter) one. Because no view holds more than the prompt and `window + 1` steps, traces longer than the model's
    context can be scored, which no global score can.

    Weak spots: the first token of a step is expensive, so short steps are punished (`AslecDrop` leaves it out), and
    much of the gain in the paper may come from mixing teachers; compare with `Random` at the same mixture.
    """

    name: str = "local_naturalness"
    """What policies call it, and the score's column."""

    def of_step(self, surprisal: FloatArray) -> float:
        return -float(surprisal.mean(dtype=float))
