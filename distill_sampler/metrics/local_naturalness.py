"""Local Naturalness, arXiv:2510.03988 (ICML 2026): how likely each step is, given the prompt and a few steps before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distill_sampler.steps import Splitter, sentences, token_steps
from distill_sampler.types import FloatArray, Sample, TokenStats, View

Steps = list[tuple[int, int]]
"""`(start, stop)` of each step, as places among the sample's tokens."""


@dataclass(frozen=True, kw_only=True)
class LocalNaturalness:
    """Mean over a response's steps of the mean log-probability (nats) of the step's tokens, each step read after the
    prompt and at most `window` steps before it; older steps are not there. Higher is better.

    The mean over steps is unweighted: a short step counts like a long one. A response of one step has its global mean
    log-probability. Several forwards a sample: the first `window + 1` steps share one, every later step has its own
    (shorter) one. Because no view holds more than the prompt and `window + 1` steps, traces longer than the model's
    context can be scored, which no global score can.

    Weak spots: the first token of a step is expensive, so short steps are punished, and much of the gain in the paper
    may come from mixing teachers; compare with `Random` at the same mixture. `LocalNaturalness(skip=1,
    name="aslec_drop")` leaves the first token of each step out: ASLEC-drop, arXiv:2604.06834.
    """

    window: int | float = 4
    """Steps of context: an int, or a fraction in (0, 1) of the steps before (the paper's second version finds 5-25 %
    to rank teachers correctly, and 50-75 % to behave like the global score)."""
    splitter: Splitter = sentences
    """From text to the places where steps begin; see `distill_sampler.steps`."""
    min_tokens: int = 4
    """Shorter steps are joined with the next."""
    max_tokens: int = 256
    """Longer steps are cut into equal pieces."""
    skip: int = 0
    """Tokens at the start of each step that are not counted (its last always is)."""
    tokenizer: Any = field(default=None, repr=False, compare=False)
    """Turns tokens into text. `attach` and the command line fill it in; give it yourself in a loop of your own."""
    name: str = "local_naturalness"
    """What policies call it, and the score's column."""
    _steps: dict[int, Steps] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The steps of samples between `views` and `reduce`, so that nothing is decoded twice."""

    def __post_init__(self) -> None:
        check_window(self)
        if self.skip < 0:
            raise ValueError(f"{type(self).__name__}(skip={self.skip}): give 0 or more tokens.")

    def __repr__(self) -> str:
        """The configuration, the same in every process: a splitter by its name. Scores are known by it."""
        splitter = getattr(self.splitter, "__qualname__", None) or repr(self.splitter)
        return (
            f"LocalNaturalness(window={self.window}, splitter={splitter}, min_tokens={self.min_tokens}, "
            f"max_tokens={self.max_tokens}, skip={self.skip}, name={self.name!r})"
        )

    @property
    def columns(self) -> tuple[str, ...]:
        prefix = "" if self.name == "local_naturalness" else f"{self.name}_"
        return (f"{prefix}num_steps", self.name)

    @property
    def higher_is_better(self) -> bool:
        return True

    def views(self, sample: Sample) -> Sequence[View]:
        steps = response_steps(self, sample)
        self._steps[sample.index] = steps
        return local_views(sample, steps, self.window)

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        steps = self._steps.pop(sample.index)
        surprisal = np.concatenate([view.surprisal for view in stats])  # the views score the steps in order
        ends = np.cumsum([stop - start for start, stop in steps])
        means = [
            float(step[min(self.skip, len(step) - 1) :].mean(dtype=float)) for step in np.split(surprisal, ends[:-1])
        ]
        return dict(zip(self.columns, (float(len(steps)), -float(np.mean(means))), strict=True))

    def aggregate(self, columns: Mapping[str, FloatArray]) -> float:
        return float(columns[self.name].mean(dtype=float))


def check_window(metric: Any) -> None:
    """Refuse settings that describe no context or no steps."""
    kind, window = type(metric).__name__, metric.window
    if window < 0 or (isinstance(window, float) and not 0 < window < 1):
        raise ValueError(f"{kind}(window={window}): give a number of steps, 0 or more, or a fraction between 0 and 1.")
    if not 1 <= metric.min_tokens <= metric.max_tokens:
        raise ValueError(
            f"{kind}(min_tokens={metric.min_tokens}, max_tokens={metric.max_tokens}): 1 <= min_tokens <= max_tokens."
        )


def response_steps(metric: Any, sample: Sample) -> Steps:
    """The steps of all stretches of response, in order."""
    if metric.tokenizer is None:
        raise ValueError(
            f"{type(metric).__name__} reads text, so it needs a tokenizer: {type(metric).__name__}(tokenizer=…). "
            "(attach gives it the trainer's.)"
        )
    scored = np.flatnonzero(sample.scored)
    steps: Steps = []
    for stretch in np.split(scored, np.flatnonzero(np.diff(scored) > 1) + 1):
        first = int(stretch[0])
        found = token_steps(
            sample.input_ids[stretch],
            metric.tokenizer,
            metric.splitter,
            min_tokens=metric.min_tokens,
            max_tokens=metric.max_tokens,
        )
        steps += [(first + start, first + stop) for start, stop in found]
    return steps


def local_views(sample: Sample, steps: Steps, window: int | float) -> list[View]:
    """The rows that the student reads: what is no response before a step, the `window` steps before it, and the step.

    Steps that see everything before them (the first `window + 1`) share a row.
    """
    starts = np.array([start for start, _ in steps])
    no_response = np.flatnonzero(~sample.scored)
    views = []
    together = 0
    while together < len(steps) and _context(together, window) >= together:
        together += 1
    groups = ([(0, together)] if together else []) + [(step, step + 1) for step in range(together, len(steps))]
    for first, last in groups:
        oldest = int(starts[first - _context(first, window)]) if first else 0
        kept = np.concatenate(
            [no_response[: np.searchsorted(no_response, oldest)], np.arange(oldest, steps[last - 1][1])]
        )
        views.append(View(input_ids=sample.input_ids[kept], scored=sample.scored[kept] & (kept >= starts[first])))
    return views


def _context(before: int, window: int | float) -> int:
    """How many of the `before` steps before one are in its context."""
    return min(before, window if isinstance(window, int) else math.ceil(window * before))
