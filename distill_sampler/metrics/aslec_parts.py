"""What ASLEC-CASL, arXiv:2604.06834 (ACL 2026), regresses on: log-probabilities of steps' first and other tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.steps import Splitter, sentences
from distill_sampler.metrics.windows import steps_of
from distill_sampler.protocols import Metric
from distill_sampler.serialize import described
from distill_sampler.types import Sample, TokenStats

_NO_TOKENS = -16.0
"""The mean log-probability that the authors use if there are no tokens."""


@documents_fields
@dataclass(frozen=True, kw_only=True, repr=False)
class AslecParts(Metric):
    """Mean log-probabilities (nats) of a response's step beginnings, of its other tokens, and of all. Higher is better.

    Longer steps have a smaller share of first tokens, which are hard to predict, so naturalness favours long steps over
    good ones. The expression `AslecCasl()` corrects that: it regresses the mean over all tokens on these numbers over
    the whole pool, and subtracts the part that the share of first tokens explains. Use it in place of this metric's
    name: `BestOf(AslecCasl(), per="prompt_id")`. One forward pass per sample, shared with `RankSurprisalRatio`.

    Columns: `aslec_first_share` (of tokens at the beginning of a step), `aslec_first`, `aslec_rest` and `aslec` (mean
    log-probabilities of these tokens, of the others, and of all). `aslec_rest` is ASLEC-drop as in the authors' code;
    the metric `AslecDrop` reads steps in windows and gives every step the same weight.

    What to keep in mind: `aslec` itself is uncorrected global naturalness. The result depends strongly on where steps
    begin; the authors split after `". "` and `"? "` (`by_pattern(r"[.?] ")`, with `min_tokens=1`).
    """

    skip: int = 1
    """Tokens at the beginning of a step that count as first. 1 in the paper; the authors' script is run with 2."""
    splitter: Splitter = sentences
    """Function from text to the positions where steps begin; see `distill_sampler.metrics.steps`."""
    min_tokens: int = 4
    """Shorter steps are joined with the next one."""
    max_tokens: int = 256
    """Longer steps are cut into equal pieces."""
    name: str = "aslec"
    """Its name in policies and `AslecCasl`, and the beginning of the columns' names."""
    tokenizer: Any = field(default=None, compare=False)
    """Decodes the tokens. `attach` and the command line fill it in; in your own loop, pass it yourself."""

    def __post_init__(self) -> None:
        if self.skip < 1:
            raise ValueError(f"AslecParts(skip={self.skip}): at least the first token of a step is its beginning.")
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"AslecParts(min_tokens={self.min_tokens}, max_tokens={self.max_tokens}): choose them so that "
                "1 <= min_tokens <= max_tokens."
            )

    def __repr__(self) -> str:
        """The configuration as text, the same in every process."""
        return described(self)

    @property
    def columns(self) -> tuple[str, ...]:
        return (f"{self.name}_first_share", f"{self.name}_first", f"{self.name}_rest", self.name)

    def with_tokenizer(self, tokenizer: Any) -> Self:
        return replace(self, tokenizer=tokenizer) if self.tokenizer is None else self

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        (tokens,) = stats
        log_probs = -tokens.surprisal.astype(np.float64)
        steps = steps_of(
            sample,
            self.tokenizer,
            self.splitter,
            min_tokens=self.min_tokens,
            max_tokens=self.max_tokens,
            metric=type(self).__name__,
        )
        lengths = np.array([stop - start for start, stop in steps])
        place = np.arange(len(log_probs)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        first = place < self.skip
        of_first = float(log_probs[first].mean())
        of_rest = float(log_probs[~first].mean()) if not first.all() else _NO_TOKENS
        numbers = (float(first.mean()), of_first, of_rest, float(log_probs.mean()))
        return dict(zip(self.columns, numbers, strict=True))
