"""The page of `distill-sampler trace`: every sentence in the colour of its class, three probabilities on hover.

Text of the data set reaches the page through Jinja alone, which escapes it. The page has no script, and its content
security policy allows none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from distill_sampler.metrics.provenance import CLASSES
from distill_sampler.serialize import require_writable
from distill_sampler.tracing import MODELS, Trace, Traced
from distill_sampler.types import FloatArray

_HERE = Path(__file__).parent
_WIDTH, _HEIGHT = 240.0, 110.0
"""Size of a picture of curves."""


def write_trace(found: Trace, output: Path, *, models: Mapping[str, str], shown: int = 30) -> Path:
    """Write the page of a trace.

    Args:
        found: the trace.
        output: the HTML file to write.
        models: names of the three models, for the reader.
        shown: how many responses are on the page, the first ones.

    Returns:
        `output`.

    Raises:
        ValueError: the page cannot be written.
    """
    require_writable(output, ".html", ".htm")
    output.write_text(render_trace(found, models=models, shown=shown), encoding="utf-8", errors="replace")
    return output


def render_trace(found: Trace, *, models: Mapping[str, str], shown: int = 30) -> str:
    """The page's HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.lstrip_blocks = True
    areas = found.areas()
    verdicts = [verdict for verdict in (True, False) if found.of(verdict)]
    of: list[bool | None] = [*verdicts] or [None]
    curves = {verdict: found.curves(verdict) for verdict in of}
    names = {True: "correct", False: "incorrect", None: "all"}
    return environment.get_template("trace.html.j2").render(
        style=Markup("\n".join((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "trace.css"))),
        models=models,
        classes=CLASSES,
        provenance=found.provenance,
        responses=len(found.traced),
        sentences=found.num_sentences,
        flips=found.flips,
        left_out=len(found.left_out),
        rows=[("share of sentences", found.shares)]
        + [(f"at α = β = {value}", shares) for value, shares in found.sensitivity().items()]
        + [
            (f"{names[verdict]} responses ({len(found.of(verdict)):,})", curves[verdict].mean(axis=0))
            for verdict in verdicts
        ],
        areas=areas,
        pictures=[
            {
                "name": name,
                "lines": [(names[verdict], _points(curve[:, code])) for verdict, curve in curves.items()],
                "area": None if areas is None else areas[0][code],
            }
            for code, name in enumerate(CLASSES)
        ],
        width=_WIDTH,
        height=_HEIGHT,
        traced=[_shown(each) for each in found.traced[:shown]],
    )


def _points(shares: FloatArray) -> str:
    """A curve as the points of an SVG polyline: from left to right by position, 100 % at the top."""
    at = (np.arange(len(shares)) + 0.5) / len(shares) * _WIDTH
    return " ".join(f"{x:.1f},{_HEIGHT * (1 - share):.1f}" for x, share in zip(at, shares, strict=True))


def _shown(each: Traced) -> dict[str, Any]:
    """A response for the template."""
    asked = next(
        (str(message["content"]) for message in reversed(each.response.prompt) if message["role"] == "user"), ""
    )
    counts = np.bincount(each.classes, minlength=len(CLASSES))
    return {
        "where": each.response.where,
        "correct": each.response.correct,
        "prompt": asked,
        "counts": list(zip(CLASSES, counts.tolist(), strict=True)),
        "sentences": [
            {
                "text": text,
                "kind": CLASSES[code],
                "says": "  ".join(f"{name} {p:.2f}" for name, p in zip(MODELS, probabilities, strict=True)),
            }
            for text, code, probabilities in zip(
                each.texts, each.classes.tolist(), each.probabilities.T.tolist(), strict=True
            )
        ],
    }
