"""Score distributions per teacher, at the first and the last scoring pass, as one HTML file that needs no network."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.compute as pc

BEFORE, AFTER = "#9aa5b1", "#d1495b"


def write_distributions(scores: pa.Table, metric: str, path: Path, *, first: str, last: str) -> None:
    """A box with all its points for each teacher, at the first pass and at the last.

    Args:
        scores: `ScoreStore.to_table` with a column `teacher`.
        metric: the column to show.
        path: HTML file to write.
        first: what to call the first pass.
        last: what to call the last pass.
    """
    figure = go.Figure()
    epochs = pc.unique(scores["epoch"]).to_pylist()
    for epoch, label, colour in ((min(epochs), first, BEFORE), (max(epochs), last, AFTER)):
        taken = scores.filter(pc.equal(scores["epoch"], epoch))
        figure.add_trace(
            go.Box(
                x=taken["teacher"].to_pylist(),
                y=taken[metric].to_pylist(),
                text=taken["prompt_id"].to_pylist() if "prompt_id" in taken.column_names else None,
                name=label,
                marker_color=colour,
                boxpoints="all",
                jitter=0.5,
                pointpos=0,
                marker={"size": 5, "opacity": 0.7},
            )
        )
    figure.update_layout(
        title=f"{metric.replace('_', ' ')} per teacher",
        yaxis_title=metric.replace("_", " "),
        boxmode="group",
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 14},
        legend={"orientation": "h", "y": 1.06, "x": 0},
    )
    figure.write_html(path, include_plotlyjs=True, full_html=True, config={"displaylogo": False, "responsive": True})
