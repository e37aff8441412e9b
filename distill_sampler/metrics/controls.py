"""Scores that need no forward: what every study of selection should be compared with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from distill_sampler.field_docs import documents_fields
from distill_sampler.hashing import content_uniform
from distill_sampler.types import Metric, Sample, TokenStats, View


@documents_fields
@dataclass(frozen=True, kw_only=True)
class ResponseLength(Metric):
    """Number of response tokens. The longest response is a strong control: 57.9 where teacher-guided selection reached
    58.7 and global naturalness 55.1 (arXiv:2512.20908)."""

    longest: bool = True
    """False: shorter is better."""
    name: str = "response_length"
    """What policies call it, and the score's column."""

    @property
    def higher_is_better(self) -> bool:
        return self.longest

    def views(self, sample: Sample) -> Sequence[View]:
        return ()

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        return {self.name: float(sample.scored.sum())}


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Random(Metric):
    """A uniform number in [0, 1) drawn from the sample's content and a seed, the same in every pass. The control of
    every selection, for example of arXiv:2510.03988; `Shuffle` draws anew each epoch instead."""

    seed: int = 0
    """Another seed, other numbers."""
    name: str = "random"
    """What policies call it, and the score's column."""

    def views(self, sample: Sample) -> Sequence[View]:
        return ()

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        return {self.name: content_uniform(sample.input_ids, self.seed)}


@documents_fields
@dataclass(frozen=True, kw_only=True)
class RuleQuality(Metric):
    """Words of reasoning in the response, for each hundred words: checks, alternatives, conclusions. Higher is better.

    The rule-based quality score in the style of LIMO (arXiv:2502.03387), as a control that reads no model.
    """

    pattern: str = (
        r"\b(?:check|verify|confirm|double-check|wait|however|alternatively|another way|perhaps|maybe|suppose|assume"
        r"|because|since|therefore|thus|hence|so that|first|second|next|finally|note that|recall)\b"
    )
    """Regular expression of what counts, regardless of case."""
    tokenizer: Any = field(default=None, repr=False, compare=False)
    """Turns tokens into text. `attach` and the command line fill it in; give it yourself in a loop of your own."""
    name: str = "rule_quality"
    """What policies call it, and the score's column."""

    def with_tokenizer(self, tokenizer: Any) -> Self:
        return replace(self, tokenizer=tokenizer) if self.tokenizer is None else self

    def views(self, sample: Sample) -> Sequence[View]:
        return ()

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        if self.tokenizer is None:
            raise ValueError(
                "RuleQuality reads text, so it needs a tokenizer: RuleQuality(tokenizer=…). attach gives it its own."
            )
        text = self.tokenizer.decode(sample.input_ids[sample.scored].tolist())
        found = len(re.findall(self.pattern, text, flags=re.IGNORECASE))
        return {self.name: 100 * found / max(len(text.split()), 1)}
