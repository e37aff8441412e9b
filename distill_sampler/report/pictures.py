"""A run's progress as one picture, for notebooks (`Curriculum.plot`). Pictures need plotly, which is an extra."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_COLOURS = ("#0b6e99", "#d1602c", "#3f8f4f", "#8a4fa3", "#b28a00", "#c23b6b", "#4d6a8f", "#7a6a53")
_PANELS = ("Mean score", "Each sample's score", "Teachers in the plan", "Age of scores (optimizer steps)")


def require_plotly(what: str) -> None:
    """Refuse to draw before any work is done for it.

    Args:
        what: what is to be drawn; the message begins with it.

    Raises:
        ValueError: plotly is not installed.
    """
    try:
        import plotly  # noqa: F401  # only here: an extra
    except ImportError:
        raise ValueError(
            f"{what} needs plotly, which is not installed: pip install 'distill_sampler[report]'."
        ) from None


def figure(progress: Mapping[str, Any]) -> Any:
    """Four panels by epoch: mean scores, curves of samples, the teachers' shares of the plans, ages of scores.

    Args:
        progress: what `progress.progress` returned.

    Returns:
        A `plotly.graph_objects.Figure`.
    """
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    epochs = list(progress["epochs"])
    names = [escape(name) for name in progress["teachers"]]
    picture = make_subplots(rows=2, cols=2, subplot_titles=_PANELS, vertical_spacing=0.16)

    def line(name: str, values: Any, place: tuple[int, int], **style: Any) -> None:
        settings = {"mode": "lines+markers", "connectgaps": True, **style}
        picture.add_trace(go.Scatter(x=epochs, y=values, name=name, **settings), row=place[0], col=place[1])

    line("candidates", progress["candidates"], (1, 1), line={"color": "#8a8f96", "dash": "dot"})
    line("chosen", progress["chosen"], (1, 1), line={"color": "#b4472e", "width": 3})
    for curve in progress["curves"]:
        colour = _COLOURS[curve["teacher"] % len(_COLOURS)]
        named = f"sample {curve['sample']}, {names[curve['teacher']]}"
        line(named, curve["values"], (1, 2), mode="lines", opacity=0.45, showlegend=False, line={"color": colour})
    for code, name in enumerate(names if progress["shares"] else ()):
        totals = [sum(counts) if counts else 0 for counts in progress["shares"]]
        values = [
            100 * counts[code] / total if total else None
            for counts, total in zip(progress["shares"], totals, strict=True)
        ]
        colour = _COLOURS[code % len(_COLOURS)]
        picture.add_trace(go.Bar(x=epochs, y=values, name=name, marker={"color": colour}), row=2, col=1)
    for kind in ("median", "max"):
        values = [None if ages is None else ages[kind] for ages in progress["ages"]]
        line(f"{kind} age", values, (2, 2), line={"color": "#4d6a8f", "dash": "solid" if kind == "median" else "dot"})
    title = f"{progress['metric'].replace('_', ' ')}, {progress['better']} is better"
    picture.update_layout(barmode="stack", template="plotly_white", height=640, title=title, margin={"t": 90})
    picture.update_xaxes(title_text="epoch", dtick=1 if len(epochs) <= 12 else None)
    picture.update_yaxes(ticksuffix=" %", range=[0, 100], row=2, col=1)
    return picture
