"""Small tables for notebooks: HTML without scripts or style sheets, with every text escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def html_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[Any]], *, note: str = "") -> str:
    """A titled table as HTML. Numbers are aligned to the right, and fractions have four significant digits."""
    head = "".join(f"<th style='text-align:left'>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    below = f"<p><small>{escape(note)}</small></p>" if note else ""
    top = f"<thead><tr>{head}</tr></thead>" if headings else ""
    return f"<div><p><b>{escape(title)}</b></p><table>{top}<tbody>{body}</tbody></table>{below}</div>"


def shown(value: Any) -> str:
    """A value as people read it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cell(value: Any) -> str:
    align = "right" if isinstance(value, (int, float)) and not isinstance(value, bool) else "left"
    return f"<td style='text-align:{align}'>{escape(shown(value))}</td>"
