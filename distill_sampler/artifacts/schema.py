"""The one schema of scores and plans on disk: names of columns, what the metadata says, and how metrics come back.

A scores file has a row for each measurement. `sample` counts the rows of the prepared data; the user's own columns
follow (prompt id, teacher, correctness, …), then `num_tokens` (of the response), `length` (prompt included),
`content_hash` and `prompt_hash`. A run's file then has `pass`, `epoch`, `step` and `observed`. The numbers of the
metrics follow, and for each metric a column `…_missing` that says why there is no score. The metadata holds what the
numbers belong to.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from distill_sampler.planning.why import facts_of
from distill_sampler.serialize import as_typed, described
from distill_sampler.specs import known_metrics, recorded_metric
from distill_sampler.types import FloatArray, Metric, Policy, Sample, TokenStats

VERSION = 2
PREFIX = b"distill_sampler."
"""Of our entries in a file's metadata."""

TRACE_COLUMNS = ("prompt_text", "tokens", "token_ranks", "token_surprisals")
RUN_COLUMNS = ("pass", "epoch", "step", "observed")
FACT_COLUMNS = ("num_tokens", "length", "content_hash", "prompt_hash")
OWN_COLUMNS = ("sample", *RUN_COLUMNS, *FACT_COLUMNS, *TRACE_COLUMNS)
"""Columns of ours, which a column of the data cannot be called."""


@dataclass(frozen=True, kw_only=True)
class RecordedMetric(Metric):
    """A metric whose numbers are in a file and whose code is not here. A group has the mean of its scores."""

    name: str = ""
    of_columns: tuple[str, ...] = ()
    """Every number that it gave, the score among them."""
    higher: bool = True
    """Whether higher is better."""

    @property
    def columns(self) -> tuple[str, ...]:
        return self.of_columns

    @property
    def higher_is_better(self) -> bool:
        return self.higher

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        raise ValueError(f"'{self.name}' is known from a file only. Install the package that has the metric to score.")

    def aggregate(self, columns: Mapping[str, FloatArray]) -> float:
        return float(columns[self.name].mean(dtype=float))


def metric_facts(metrics: Iterable[Metric]) -> list[dict[str, Any]]:
    """What a file says of its metrics, so that they can be shown without their code."""
    return [
        {
            "text": as_typed(metric),
            "identity": described(metric),
            "name": metric.name,
            "package": _package_of(metric),
            "columns": list(metric.columns),
            "higher_is_better": metric.higher_is_better,
            "uses_columns": list(metric.uses_columns),
            "readers": {name: reader.identity for name, reader in metric.readers.items()},
        }
        for metric in metrics
    ]


def _metrics_from_facts(facts: Iterable[Mapping[str, Any]]) -> dict[str, Metric]:
    """The metrics of a file by name: the real ones where their code is installed, stand-ins elsewhere."""
    found: dict[str, Metric] = {}
    for told in facts:
        columns = tuple(told["columns"])
        metric: Metric = RecordedMetric(name=told["name"], of_columns=columns, higher=told["higher_is_better"])
        real = recorded_metric(str(told["text"]))
        if real is not None and _package_of(real) == told.get("package", _package_of(real)):
            said = (real.name, tuple(real.columns), real.higher_is_better)
            if said == (told["name"], columns, told["higher_is_better"]):  # or else it is of another version
                metric = real
        found[metric.name] = metric
    return found


def metrics_in_file(facts: Mapping[str, Any], names: Sequence[str]) -> dict[str, Metric]:
    """The metrics of a file by name: those that it names, or in a table made by hand those whose columns it has.

    Args:
        facts: what the file says of itself.
        names: its columns.
    """
    told = facts.get("metrics")
    if isinstance(told, list) and all(isinstance(one, dict) for one in told):
        found = _metrics_from_facts(told)
    else:
        found = known_metrics(names)
    return {name: metric for name, metric in found.items() if set(metric.columns) <= set(names)}


def _package_of(metric: Metric) -> str:
    """The package that has a metric's code. Modules inside it are renamed from version to version."""
    return type(metric).__module__.partition(".")[0]


def run_facts(
    *,
    run: str | None,
    metrics: Sequence[Metric],
    policies: Sequence[Policy] = (),
    group: str | None,
    teacher: str | None,
    **more: Any,
) -> dict[str, Any]:
    """What a scores file or a run's record says of its numbers, as plain JSON values.

    Args:
        run: which run they are of; None for a file of its own.
        metrics: what was scored.
        policies: what chose.
        group: the column that says which rows answer the same prompt.
        teacher: the column that says who wrote a response.
        more: other facts: data set, model, numerics, seed, settings.
    """
    return {
        "schema": VERSION,
        "run": run,
        "metrics": metric_facts(metrics),
        "policies": facts_of(policies),
        "columns": {"group": group, "teacher": teacher},
        **more,
    }


def with_facts(table: pa.Table, facts: Mapping[str, Any]) -> pa.Table:
    """A table with these facts in its metadata, each as JSON."""
    return table.replace_schema_metadata(encode_facts(facts))


def encode_facts(facts: Mapping[str, Any]) -> dict[bytes, bytes]:
    """Facts as a file's metadata."""
    return {PREFIX + name.encode(): json.dumps(value, default=str).encode() for name, value in facts.items()}


def decode_facts(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The facts in a file's metadata; text that is no JSON stays text."""
    facts: dict[str, Any] = {}
    for key, value in (metadata or {}).items():
        if key.startswith(PREFIX):
            text = value.decode(errors="replace")
            try:
                facts[key.removeprefix(PREFIX).decode()] = json.loads(text)
            except ValueError:
                facts[key.removeprefix(PREFIX).decode()] = text
    return facts
