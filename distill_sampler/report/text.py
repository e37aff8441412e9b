"""Text and numbers of the data for a page: hostile characters become visible, long texts are cut, NaN becomes null."""

from __future__ import annotations

import math
import re
from typing import Any

MAX_TEXT = 4000

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")


def visible(text: str, limit: int = MAX_TEXT) -> str:
    """Text with control characters and direction marks made visible, cut off at `limit`."""
    cut = text[:limit]
    safe = _CONTROLS.sub(lambda found: _mark(found.group()), cut)
    return safe + (f"… ({len(text) - limit:,} more characters)" if len(text) > limit else "")


def _mark(character: str) -> str:
    code = ord(character)
    if character == "\r":
        return ""
    return chr(0x2400 + code) if code < 0x20 else f"⟦U+{code:04X}⟧"


def rounded(values: Any) -> list[float | None]:
    """Numbers with four significant digits, enough for a picture; None for NaN, which JSON does not have."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]
