"""What a notebook shows of a run: tables with prompts and teachers, a summary, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from distill_sampler.artifacts.run_folder import column_values, kept_as, measurement_rows
from distill_sampler.artifacts.schema import OWN_COLUMNS
from distill_sampler.cycle import Cycle
from distill_sampler.protocols import Metric, Policy
from distill_sampler.serialize import as_typed
from distill_sampler.showing import html_table
from distill_sampler.types import BoolArray

_OF_SAMPLES = ("estimated", "times_scored", "times_trained", "chosen")


def history(cycle: Cycle, columns: Sequence[str]) -> pa.Table:
    """See `Curriculum.history`."""
    samples = pa.table({"sample": np.arange(len(cycle.dataset)), **_of_the_user(cycle, columns)})
    table = measurement_rows(cycle.record, samples, None, unmeasured=False)
    if not table.num_rows:
        return table
    chosen = np.zeros(table.num_rows, bool)
    planned = np.zeros(table.num_rows, bool)
    epochs, rows = table["epoch"].to_numpy(), table["sample"].to_numpy()
    for epoch, in_plan in _chosen(cycle).items():
        own = epochs == epoch
        planned |= own
        chosen[own] = in_plan[rows[own]]
    return table.append_column("chosen", pa.array(chosen, mask=~planned))


def samples(cycle: Cycle, columns: Sequence[str]) -> pa.Table:
    """See `Curriculum.samples`."""
    plan = cycle.sampler.plan
    return pa.table(
        {
            "sample": np.arange(len(cycle.dataset)),
            "source_row": cycle.dataset.source_rows,
            **_of_the_user(cycle, columns),
            **cycle.store.latest,
            "step": cycle.store.step,
            "estimated": cycle.store.estimated,
            "times_scored": cycle.store.times_scored,
            "times_trained": cycle.times_trained(),
            "chosen": np.isin(np.arange(len(cycle.dataset)), [] if plan is None else plan.indices),
        }
    )


def _of_the_user(cycle: Cycle, columns: Sequence[str]) -> dict[str, pa.Array]:
    """Columns of the data set under the names that they have beside ours; by default the prompt's and the teacher's."""
    names = columns or [name for name in dict.fromkeys((cycle.group, cycle.teacher)) if name is not None]
    own = (*OWN_COLUMNS, *_OF_SAMPLES)
    return {kept_as(name, cycle.metrics.values(), own): column_values(cycle.dataset, name) for name in names}


def _chosen(cycle: Cycle) -> dict[int, BoolArray]:
    """By epoch, `[samples]` whether its last plan has the sample, as far as that plan is known."""
    everything, plans = np.arange(len(cycle.dataset)), cycle.record.plans
    last = cycle.record.last_plans()
    return {epoch: np.isin(everything, plans.of(number).plan.indices) for epoch, number in last.items()}


def text(metrics: Mapping[str, Metric], policies: Sequence[Policy], cycle: Cycle | None) -> str:
    """A curriculum in one line: its configuration, and how far its run is."""
    listed = ", ".join(as_typed(metric) for metric in metrics.values())
    configured = f"Curriculum(metrics=[{listed}], policies=[{', '.join(map(as_typed, policies))}])"
    if cycle is None:
        return f"{configured}, not attached"
    epoch = "not begun" if cycle.epoch is None else f"epoch {cycle.epoch}"
    return f"{configured}, {epoch}, {cycle.planner.num_samples:,} of {len(cycle.dataset):,} samples an epoch"


def html(metrics: Mapping[str, Metric], policies: Sequence[Policy], cycle: Cycle | None) -> str:
    """The same for a notebook, with the last plan by teacher."""
    title = text(metrics, policies, cycle)
    if cycle is None or not cycle.summaries:
        return html_table(title, (), ())
    last = cycle.summaries[-1]
    names = list(last.mean_scores)
    rows: list[tuple[Any, ...]] = [
        (row.teacher, row.candidates, row.chosen, *(float(row.scores[name]) for name in names)) for row in last.teachers
    ]
    rows.append(("mean of candidates", last.candidates, None, *(last.mean_scores[name][0] for name in names)))
    rows.append(("mean of the plan", None, last.num_samples, *(last.mean_scores[name][1] for name in names)))
    headings = ("teacher", "candidates", "chosen", *(name.replace("_", " ") for name in names))
    return html_table(title, headings, rows, note="; ".join(last.notes))
