"""Metrics that read text, and where they get a tokenizer from."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import Any

from distill_sampler.types import Metric


def with_tokenizer(metric: Metric, tokenizer: Any) -> Metric:
    """The metric, with this tokenizer if it reads text and has none of its own."""
    if is_dataclass(metric) and not isinstance(metric, type) and getattr(metric, "tokenizer", ...) is None:
        return replace(metric, tokenizer=tokenizer)
    return metric
