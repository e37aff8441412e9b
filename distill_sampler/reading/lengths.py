"""Limits on the length of sequences, from a student's configuration and its adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def positions(student: Any) -> float:
    """How many tokens a student can read at once, with YaRN and the like; infinity if its configuration has no limit.

    Beyond it, learned positions run out (an error deep inside the model), and rotary positions leave the trained range.
    """
    config = student.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    extended = (rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or 0)
    return max(getattr(config, "max_position_embeddings", None) or math.inf, int(extended)) - virtual_tokens(student)


def switches_at(student: Any) -> float:
    """The batch length beyond which rotary positions are computed differently for all tokens; infinity: there is none.

    LongRoPE (Phi-3, Phi-4-mini) has two sets of factors, and "dynamic" NTK scaling computes new ones for each length.
    The longest sequence of the batch decides, so a sample's scores would depend on what else is in its batch.
    """
    config = student.config.get_text_config()
    given = getattr(config, "rope_parameters", None) or {}
    found = math.inf
    for rope in (given, *given.values()):  # one for all layers, or one for each type of layer
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
        if kind in ("longrope", "su", "dynamic"):
            trained = None if kind == "dynamic" else rope.get("original_max_position_embeddings")
            found = min(found, trained or config.max_position_embeddings)
    return found - virtual_tokens(student)


def window(student: Any) -> int:
    """How many tokens back the layers with limited attention look; 0: every layer attends to everything."""
    config = student.config.get_text_config()
    return max(getattr(config, name, None) or 0 for name in ("sliding_window", "attention_chunk_size"))


def virtual_tokens(student: Any) -> int:
    """How many tokens of a learned prompt (prompt, p- or prefix tuning) peft puts before every sequence."""
    adapter: Any = getattr(student, "active_peft_config", None)
    return int(adapter.num_virtual_tokens) if getattr(adapter, "is_prompt_learning", False) else 0
