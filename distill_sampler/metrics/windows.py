"""What Local Naturalness and its variants share: a response cut into steps, each read after a window of those before.

The first `window + 1` steps see everything before them and share a row; every later step has a row of its own, of the
prompt, the `window` steps before it, and the step.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.steps import Splitter, sentences, token_steps
from distill_sampler.serialize import described
from distill_sampler.types import FloatArray, Metric, Sample, TokenStats, View

Steps = list[tuple[int, int]]
"""`(start, stop)` of each step, as places among the sample's tokens."""

_STEPS: WeakKeyDictionary[Sample, dict[Any, Steps]] = WeakKeyDictionary()
"""The steps of samples between `views` and `reduce`, so that nothing is decoded twice."""


@documents_fields
@dataclass(frozen=True, kw_only=True, repr=False)
class WindowMetric(Metric):
    """The unweighted mean over a response's steps of a number of each step. Abstract: variants say which number."""

    window: int | float = 4
    """Steps of context: an int, or a fraction in (0, 1) of the steps before (the paper's second version finds 5-25 %
    to rank teachers correctly, and 50-75 % to behave like the global score)."""
    splitter: Splitter = sentences
    """From text to the places where steps begin; see `distill_sampler.metrics.steps`."""
    min_tokens: int = 4
    """Shorter steps are joined with the next."""
    max_tokens: int = 256
    """Longer steps are cut into equal pieces."""
    stride: int = 1
    """Steps in a row: 1 is exact. More is an approximation that reads fewer tokens: the first step of a row has its
    window, those behind it have up to `stride - 1` steps more. How well it orders samples is reported before it is
    used."""
    name: str = ""
    """What policies call it, and the score's column."""
    tokenizer: Any = field(default=None, compare=False)
    """Turns tokens into text. `attach` and the command line fill it in; give it yourself in a loop of your own."""

    def __post_init__(self) -> None:
        kind, window = type(self).__name__, self.window
        if window < 0 or (isinstance(window, float) and not 0 < window < 1):
            raise ValueError(
                f"{kind}(window={window}): give a number of steps, 0 or more, or a fraction between 0 and 1."
            )
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"{kind}(min_tokens={self.min_tokens}, max_tokens={self.max_tokens}): 1 <= min_tokens <= max_tokens."
            )
        if self.stride < 1:
            raise ValueError(f"{kind}(stride={self.stride}): give 1 step in a row, which is exact, or more.")

    def __repr__(self) -> str:
        """The configuration, the same in every process."""
        return described(self)

    @property
    def columns(self) -> tuple[str, ...]:
        prefix = "" if self.name == "local_naturalness" else f"{self.name}_"
        return (f"{prefix}num_steps", self.name)

    @property
    def approximates(self) -> Self | None:
        return None if self.stride == 1 else replace(self, stride=1, name=f"{self.name}_exact")

    def with_tokenizer(self, tokenizer: Any) -> Self:
        return replace(self, tokenizer=tokenizer) if self.tokenizer is None else self

    @abstractmethod
    def of_step(self, surprisal: FloatArray) -> float:
        """The number of a step, higher is better, from the surprisals (nats) of its tokens."""

    def views(self, sample: Sample) -> Sequence[View]:
        steps = self.steps(sample)
        starts = [start for start, _ in steps]
        no_response = np.flatnonzero(~sample.scored)
        prompt = View(input_ids=sample.input_ids, scored=sample.scored).shareable
        views = []
        for first, last in self._rows(len(steps)):
            oldest = starts[first - self._context(first)] if first else 0
            before = no_response[: np.searchsorted(no_response, oldest)]
            kept = np.concatenate([before, np.arange(oldest, steps[last - 1][1])])
            views.append(
                View(
                    input_ids=sample.input_ids[kept],
                    scored=sample.scored[kept] & (kept >= starts[first]),
                    shared=len(prompt),
                )
            )
        return views

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        steps = self.steps(sample)
        surprisal = np.concatenate([view.surprisal for view in stats])  # the rows hold the steps in order
        ends = np.cumsum([stop - start for start, stop in steps])
        of_steps = [self.of_step(step) for step in np.split(surprisal, ends[:-1])]
        return dict(zip(self.columns, (float(len(steps)), float(np.mean(of_steps))), strict=True))

    def steps(self, sample: Sample) -> Steps:
        """The steps of all stretches of the sample's response, in order.

        Raises:
            ValueError: there is no tokenizer, or the splitter names places that are not in the text.
        """
        known = _STEPS.setdefault(sample, {})
        key = (self.splitter, self.min_tokens, self.max_tokens, id(self.tokenizer))
        if key in known:
            return known[key]
        kind = type(self).__name__
        if self.tokenizer is None:
            raise ValueError(
                f"{kind} reads text, so it needs a tokenizer: {kind}(tokenizer=…). (attach gives it the trainer's.)"
            )
        scored = np.flatnonzero(sample.scored)
        steps: Steps = []
        for stretch in np.split(scored, np.flatnonzero(np.diff(scored) > 1) + 1):
            first = int(stretch[0])
            try:
                found = token_steps(
                    sample.input_ids[stretch],
                    self.tokenizer,
                    self.splitter,
                    min_tokens=self.min_tokens,
                    max_tokens=self.max_tokens,
                )
            except ValueError as error:
                raise ValueError(f"{kind}, sample {sample.index}: {error}") from error
            steps += [(first + start, first + stop) for start, stop in found]
        known[key] = steps
        return steps

    def _rows(self, num_steps: int) -> list[tuple[int, int]]:
        """The steps that each row scores, as ranges: `5 steps, window 1 -> (0, 2), (2, 3), (3, 4), (4, 5)`."""
        together = 0
        while together < num_steps and self._context(together) == together:
            together += 1
        later = range(together, num_steps, self.stride)
        return [(0, together)] + [(first, min(first + self.stride, num_steps)) for first in later]

    def _context(self, before: int) -> int:
        """How many of the `before` steps before one are in its context."""
        return min(before, self.window if isinstance(self.window, int) else math.ceil(self.window * before))
