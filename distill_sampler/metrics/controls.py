"""Scores without a forward pass: the controls that every study of data selection should compare with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from distill_sampler.field_docs import documents_fields
from distill_sampler.hashing import content_uniform
from distill_sampler.protocols import Metric
from distill_sampler.types import Sample, TokenStats, View


@documents_fields
@dataclass(frozen=True, kw_only=True)
class ResponseLength(Metric):
    """Number of response tokens. Choosing the longest response is a strong control: it reached 57.9, teacher-guided
    selection 58.7, global naturalness 55.1 (arXiv:2512.20908)."""

    longest: bool = True
    """Whether longer is better. False: shorter is."""
    name: str = "response_length"
    """Its name in policies, and the column of the score."""

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
    """A uniform number in [0, 1), computed from the sample's content and a seed: the same in every pass.

    It is the basic control for any selection, for example in arXiv:2510.03988. `Shuffle` redraws each epoch instead.
    """

    seed: int = 0
    """A different seed gives different numbers."""
    name: str = "random"
    """Its name in policies, and the column of the score."""

    def views(self, sample: Sample) -> Sequence[View]:
        return ()

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        return {self.name: content_uniform(sample.input_ids, self.seed)}


@documents_fields
@dataclass(frozen=True, kw_only=True)
class RuleQuality(Metric):
    """Reasoning words (checks, alternatives, conclusions) per hundred words of the response. Higher is better.

    A rule-based quality score in the style of LIMO (arXiv:2502.03387): a control that needs no model.
    """

    pattern: str = (
        r"\b(?:check|verify|confirm|double-check|wait|however|alternatively|another way|perhaps|maybe|suppose|assume"
        r"|because|since|therefore|thus|hence|so that|first|second|next|finally|note that|recall)\b"
    )
    """Regular expression for reasoning words. Case does not matter."""
    tokenizer: Any = field(default=None, repr=False, compare=False)
    """Decodes the tokens. `attach` and the command line fill it in; in your own loop, pass it yourself."""
    name: str = "rule_quality"
    """Its name in policies, and the column of the score."""

    def with_tokenizer(self, tokenizer: Any) -> Self:
        return replace(self, tokenizer=tokenizer) if self.tokenizer is None else self

    def views(self, sample: Sample) -> Sequence[View]:
        return ()

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        if self.tokenizer is None:
            raise ValueError(
                "RuleQuality reads text, so it needs a tokenizer: pass RuleQuality(tokenizer=…). attach does this."
            )
        text = self.tokenizer.decode(sample.input_ids[sample.scored].tolist())
        found = len(re.findall(self.pattern, text, flags=re.IGNORECASE))
        return {self.name: 100 * found / max(len(text.split()), 1)}
