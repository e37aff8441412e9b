"""The schema of scores and plans on disk: column names, metadata, and how to restore metrics from the metadata.

A scores file has one row for each measurement, with these columns:

- `sample`, the row number in the prepared data set;
- in a run's file `source_row`, the row's number in the data that the trainer was given;
- the user's own columns (prompt id, teacher, correctness, …);
- `num_tokens` (of the response), `length` (prompt included), `tokens_cut` (tokens of the response that truncation cut
  off; -1: some, nobody knows how many), `content_hash` and `prompt_hash`;
- in a file of scored rows `scoring_hash`, of the tokens as the student read them, by which a curriculum finds them;
- in a run's file `pass`, `epoch`, `step` and `observed`;
- the numbers of the metrics, and for each metric a column `…_missing` that says why a sample has no score.

The metadata, called *facts* here, says what the numbers belong to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_sampler.artifacts.passes import missing_column
from distill_sampler.planning.why import facts_of
from distill_sampler.protocols import Metric, Policy
from distill_sampler.serialize import as_typed, described
from distill_sampler.specs import known_metrics, recorded_metric
from distill_sampler.types import FloatArray, Sample, TokenStats

VERSION = 4

TRACE_COLUMNS = ("prompt_text", "tokens", "token_ranks", "token_surprisals")
RUN_COLUMNS = ("pass", "epoch", "step", "observed")
FACT_COLUMNS = ("num_tokens", "length", "tokens_cut", "content_hash", "prompt_hash", "scoring_hash")
OWN_COLUMNS = ("sample", "source_row", *RUN_COLUMNS, *FACT_COLUMNS, *TRACE_COLUMNS)
"""Names of the library's columns. A column of the data set with such a name is renamed."""


@dataclass(frozen=True, kw_only=True)
class RecordedMetric(Metric):
    """A metric whose numbers are in a file, but whose code is not installed. A group's score is the mean of its
    scores."""

    name: str = ""
    of_columns: tuple[str, ...] = ()
    """Every number that the metric gave, the score among them."""
    higher: bool = True
    """Whether higher is better."""

    @property
    def columns(self) -> tuple[str, ...]:
        return self.of_columns

    @property
    def higher_is_better(self) -> bool:
        return self.higher

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        raise ValueError(f"'{self.name}' is known only from a file. To score with it, install the package that has it.")

    def aggregate(self, columns: Mapping[str, FloatArray]) -> float:
        return float(columns[self.name].mean(dtype=float))


def metric_facts(metrics: Iterable[Metric]) -> list[dict[str, Any]]:
    """What a file says about its metrics, so that they can be shown without their code."""
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
    """The metrics that a file describes, by name: `RecordedMetric` where the metric's code is not installed."""
    found: dict[str, Metric] = {}
    for recorded in facts:
        columns = tuple(recorded["columns"])
        metric: Metric = RecordedMetric(name=recorded["name"], of_columns=columns, higher=recorded["higher_is_better"])
        real = recorded_metric(str(recorded["text"]))
        if real is not None and _package_of(real) == recorded.get("package", _package_of(real)):
            described_by = (real.name, tuple(real.columns), real.higher_is_better)
            if described_by == (recorded["name"], columns, recorded["higher_is_better"]):  # else of another version
                metric = real
        found[metric.name] = metric
    return found


def metrics_in_file(facts: Mapping[str, Any], names: Sequence[str]) -> dict[str, Metric]:
    """The metrics of a file, by name.

    A table without facts (one made by hand) has those of this library's metrics whose columns it has.

    Args:
        facts: the file's facts.
        names: the file's columns.
    """
    recorded = facts.get("metrics")
    if isinstance(recorded, list) and all(isinstance(one, dict) for one in recorded):
        found = _metrics_from_facts(recorded)
    else:
        found = known_metrics(names)
    return {name: metric for name, metric in found.items() if set(metric.columns) <= set(names)}


def columns_of_data(names: Iterable[str], metrics: Mapping[str, Metric]) -> list[str]:
    """The user's columns among those of a file, by their names in the data.

    Args:
        names: the file's columns.
        metrics: the file's metrics, by name.
    """
    ours = {*OWN_COLUMNS, *map(missing_column, metrics), *(name for each in metrics.values() for name in each.columns)}
    return [name.removesuffix("_in_data") for name in names if name not in ours]


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
    """What a scores file or a run's record says about its numbers, as plain JSON values.

    Args:
        run: identity of the run; None for the file of `distill-sampler score`.
        metrics: the scored metrics.
        policies: the policies that made the plans.
        group: the column that identifies the prompt.
        teacher: the column that names the teacher.
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
