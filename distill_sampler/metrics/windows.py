"""What Local Naturalness and its variants share: each step of a response is read after the few steps before it.

The first `window + 1` steps see everything before them and share one view. Every later step has its own view: the
prompt, the `window` steps before it, and the step itself.
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
from distill_sampler.metrics.response import response_view
from distill_sampler.metrics.steps import Splitter, sentences, token_steps
from distill_sampler.protocols import Metric
from distill_sampler.serialize import described
from distill_sampler.types import FloatArray, Sample, TokenStats, View, is_whole

Steps = list[tuple[int, int]]
"""`(start, stop)` of each step, as positions among the sample's tokens."""

_STEPS: WeakKeyDictionary[Sample, dict[Any, Steps]] = WeakKeyDictionary()
"""The steps of each sample, kept from `views` to `reduce` so that nothing is decoded twice."""


@documents_fields
@dataclass(frozen=True, kw_only=True, repr=False)
class WindowMetric(Metric):
    """The unweighted mean over a response's steps of one number per step. Abstract: subclasses define that number."""

    window: int | float = 4
    """How many earlier steps are shown before a step: an int, or a fraction in (0, 1) of all earlier steps. (In the
    paper's second version, 5-25 % rank teachers correctly and 50-75 % behave like the global score.)"""
    splitter: Splitter = sentences
    """Function from text to the positions where steps begin; see `distill_sampler.metrics.steps`."""
    min_tokens: int = 4
    """Shorter steps are joined with the next one."""
    max_tokens: int = 256
    """Longer steps are cut into equal pieces."""
    stride: int = 1
    """How many steps share a view. 1 is exact. More is an approximation that reads fewer tokens: the first step of a
    view sees its window, the later ones up to `stride - 1` steps more. How well it ranks samples is reported before it
    is used."""
    name: str = ""
    """Its name in policies, and the column of the score."""
    tokenizer: Any = field(default=None, compare=False)
    """Decodes the tokens. `attach` and the command line fill it in; in your own loop, pass it yourself."""

    def __post_init__(self) -> None:
        kind, window = type(self).__name__, self.window
        if window < 0 or (not is_whole(window) and not 0 < window < 1):
            raise ValueError(
                f"{kind}(window={window}): give a number of steps, 0 or more, or a fraction between 0 and 1."
            )
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"{kind}(min_tokens={self.min_tokens}, max_tokens={self.max_tokens}): choose them so that "
                "1 <= min_tokens <= max_tokens."
            )
        if self.stride < 1:
            raise ValueError(f"{kind}(stride={self.stride}): give 1, which is exact, or more.")

    def __repr__(self) -> str:
        """The configuration as text, the same in every process."""
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
        """The number of one step, from the surprisals (nats) of its tokens. Higher is better."""

    def views(self, sample: Sample) -> Sequence[View]:
        steps = self.steps(sample)
        starts = [start for start, _ in steps]
        not_scored = np.flatnonzero(~sample.scored)
        prompt = response_view(sample).shareable
        views = []
        for first, last in self._steps_of_views(len(steps)):
            window_start = starts[first - self._context(first)] if first else 0
            before = not_scored[: np.searchsorted(not_scored, window_start)]
            kept = np.concatenate([before, np.arange(window_start, steps[last - 1][1])])
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
        surprisal = np.concatenate([view.surprisal for view in stats])  # the views hold the steps in order
        ends = np.cumsum([stop - start for start, stop in steps])
        of_steps = [self.of_step(step) for step in np.split(surprisal, ends[:-1])]
        return dict(zip(self.columns, (float(len(steps)), float(np.mean(of_steps))), strict=True))

    def steps(self, sample: Sample) -> Steps:
        """The steps of the sample's response, in order. Contiguous stretches of response tokens are split one by one.

        Raises:
            ValueError: there is no tokenizer, or the splitter does not return ascending positions in the text.
        """
        return steps_of(
            sample,
            self.tokenizer,
            self.splitter,
            min_tokens=self.min_tokens,
            max_tokens=self.max_tokens,
            metric=type(self).__name__,
        )

    def _steps_of_views(self, num_steps: int) -> list[tuple[int, int]]:
        """The range of steps that each view scores: `5 steps, window 1 -> (0, 2), (2, 3), (3, 4), (4, 5)`."""
        in_first_view = 0
        while in_first_view < num_steps and self._context(in_first_view) == in_first_view:
            in_first_view += 1
        later = range(in_first_view, num_steps, self.stride)
        return [(0, in_first_view)] + [(first, min(first + self.stride, num_steps)) for first in later]

    def _context(self, before: int) -> int:
        """How many of the `before` earlier steps a step sees."""
        return min(before, self.window if is_whole(self.window) else math.ceil(self.window * before))


def steps_of(
    sample: Sample, tokenizer: Any, splitter: Splitter, *, min_tokens: int, max_tokens: int, metric: str
) -> Steps:
    """The steps of a sample's response, in order. Contiguous stretches of response tokens are split one by one.

    Args:
        sample: any.
        tokenizer: decodes the tokens.
        splitter: where steps begin in the text.
        min_tokens: shorter steps are joined with the next one.
        max_tokens: longer steps are cut into equal pieces.
        metric: name of the metric's class, for error messages.

    Raises:
        ValueError: there is no tokenizer, or the splitter does not return ascending positions in the text.
    """
    cached = _STEPS.setdefault(sample, {})
    key = (splitter, min_tokens, max_tokens, id(tokenizer))
    if key in cached:
        return cached[key]
    if tokenizer is None:
        raise ValueError(f"{metric} reads text, so it needs a tokenizer: pass {metric}(tokenizer=…). attach does this.")
    scored = np.flatnonzero(sample.scored)
    steps: Steps = []
    for stretch in np.split(scored, np.flatnonzero(np.diff(scored) > 1) + 1):
        first = int(stretch[0])
        try:
            found = token_steps(
                sample.input_ids[stretch], tokenizer, splitter, min_tokens=min_tokens, max_tokens=max_tokens
            )
        except ValueError as error:
            raise ValueError(f"{metric}, sample {sample.index}: {error}") from error
        steps += [(first + start, first + stop) for start, stop in found]
    cached[key] = steps
    return steps
