"""`distill-sampler report`: scores as one HTML file that needs no network and runs no code from the data.

Text of the data set reaches the page in two ways only: through Jinja, which escapes it, and as JSON in a block that is
not a script, with `<`, `>` and `&` escaped; the page's script puts it into text nodes. In addition, a content security
policy allows only the page's own scripts, by their hashes, so nothing else would run even if it got into the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.protocols import Policy
from distill_sampler.report.payload import payload
from distill_sampler.report.pictures import require_plotly
from distill_sampler.serialize import require_writable, write_atomically

_HERE = Path(__file__).parent


def write_report(
    source: Path | Scores,
    output: Path,
    *,
    title: str | None = None,
    live: str = "",
    policies: Sequence[Policy] = (),
    seed: int = 0,
    metric: str | None = None,
    **columns: str | None,
) -> Path:
    """Write the page of a scores file, or of a run's folder (`scores.parquet`, and `plans.parquet` if there is one).

    Args:
        source: the file that `score` wrote, the folder of a run, or scores that are open.
        output: the HTML file to write.
        title: title of the page. By default it names the student and what it scored.
        live: how far the run is, in a sentence; the page then says that it will be written anew, and reloads itself
            while nobody uses it.
        policies: the policies whose choice is shown. By default the run's own, or the best response of each prompt.
        seed: seed of the policies.
        metric: the metric that ranks teachers. By default the Rank-Surprisal Ratio if it was scored.
        columns: names of the columns (`teacher=`, `group=`, `domain=`, `correct=`), as for `Scores.open`.

    Returns:
        `output`.

    Raises:
        ValueError: `source` has no scores, the page cannot be written, or plotly is not installed.
    """
    require_writable(output, ".html", ".htm")
    require_plotly("The report")
    scores = source if isinstance(source, Scores) else Scores.open(source, **columns)
    data = payload(scores, policies=policies, seed=seed, metric=metric)
    write_atomically(output, render(data, title=title, live=live).encode())
    return output


def render(data: dict[str, Any], *, title: str | None = None, live: str = "") -> str:
    """The page's HTML. Arguments as of `write_report`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.lstrip_blocks = True
    scripts = [_plotly(), (_HERE / "page.js").read_text(encoding="utf-8")]
    for script in scripts:
        assert "</script" not in script.lower()
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    return environment.get_template("page.html.j2").render(
        title=title or _title(data),
        data=data,
        live=live,
        json=Markup(_escaped(json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")))),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        hashes=Markup(hashes),
    )


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script


def _title(data: dict[str, Any]) -> str:
    teachers = len(data["teachers"])
    what = f"{teachers} teachers" if teachers > 1 else f"{data['samples']:,} responses"
    return f"{data['about']['model'] or 'A student'} reads {what}"


def _escaped(text: str) -> str:
    """The same JSON without any character that has a meaning in HTML."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
