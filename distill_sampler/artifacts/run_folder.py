"""A run's scores and plans as tables: from its record to `scores.parquet` and `plans.parquet`.

A resume does not need these files. It loads the state in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distill_sampler.artifacts.passes import missing_column
from distill_sampler.artifacts.record import Record
from distill_sampler.artifacts.record_files import packs_of
from distill_sampler.artifacts.schema import OWN_COLUMNS, RUN_COLUMNS
from distill_sampler.dataset import ScoredDataset
from distill_sampler.protocols import Metric
from distill_sampler.reading.reduce import columns_of
from distill_sampler.types import IntArray, Missing

SCORES, PLANS = "scores.parquet", "plans.parquet"


def column_values(dataset: ScoredDataset, name: str) -> pa.Array:
    """The values of a column of the data set.

    Raises:
        ValueError: there is no such column.
    """
    column = dataset.column(name)
    return pa.DictionaryArray.from_arrays(pa.array(column.codes), pa.array(column.values)).dictionary_decode()


def kept_as(name: str, metrics: Collection[Metric], own: Collection[str] = OWN_COLUMNS) -> str:
    """The name that a column of the data has in our tables: `sample_in_data` if one of ours is called `sample`.

    Args:
        name: the column of the data.
        metrics: the metrics whose numbers are in the table.
        own: names of the table's other columns.
    """
    taken = {*own, *columns_of(metrics), *(missing_column(metric.name) for metric in metrics)}
    return name + "_in_data" * (name in taken)


def sample_rows(dataset: ScoredDataset, columns: Sequence[str], metrics: Collection[Metric]) -> pa.Table:
    """What each sample is, one row each: for people, and for planning from files.

    Args:
        dataset: the data set.
        columns: names of the data set's columns to include (`kept_as`).
        metrics: the metrics whose numbers stand beside them.
    """
    return pa.table(
        {
            "sample": np.arange(len(dataset)),
            "source_row": dataset.source_rows,
            **{kept_as(name, metrics): column_values(dataset, name) for name in columns},
            "num_tokens": dataset.num_scored,
            "length": dataset.lengths,
            "tokens_cut": dataset.tokens_cut,
            "content_hash": dataset.content_hash,
            "prompt_hash": dataset.prompt_hash,
        }
    )


def measurement_rows(
    record: Record, samples: pa.Table, columns: Sequence[str] | None, *, unmeasured: bool = True
) -> pa.Table:
    """Every measurement of a run, by pass and sample, as in `scores.parquet`.

    Args:
        record: the run's record.
        samples: what each sample of the data set is, one row each.
        columns: the columns to return; None: all, in the schema's order.
        unmeasured: whether the first pass has a row, without numbers, for each sample that it did not measure, so that
            every sample is in the table. Its step is -1.
    """
    record.say_what_is_missing()
    tables = []
    for number, scoring_pass in (passes := record.passes).items():
        is_first = number == passes.numbers[0]
        measured = scoring_pass.was_measured
        indices = np.flatnonzero(measured | (unmeasured and is_first))
        step, observed = np.full(scoring_pass.num_samples, -1), np.zeros(scoring_pass.num_samples, bool)
        reason = np.zeros(scoring_pass.num_samples, np.int64)
        if unmeasured and is_first:
            reason = np.where(samples["num_tokens"].to_numpy() == 0, Missing.NO_RESPONSE, Missing.UNREAD)
        for measurements in scoring_pass.measured:
            step[measurements.indices], observed[measurements.indices] = measurements.step, measurements.observed
        of_pass = {
            "pass": np.full(len(indices), number),
            "epoch": np.full(len(indices), scoring_pass.epoch),
            "step": step[indices],
            "observed": observed[indices],
            **{name: values[indices] for name, values in scoring_pass.columns.items()},
            **{
                missing_column(name): np.where(measured, codes, reason)[indices].astype(np.int8)
                for name, codes in scoring_pass.missing.items()
            },
        }
        names = _in_schema_order(samples.column_names, list(of_pass)) if columns is None else list(columns)
        tables.append(_joined(of_pass, samples, indices, names))
    return pa.concat_tables(tables) if tables else samples.slice(0, 0)


def plan_rows(record: Record, samples: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    """The plan of every epoch, as in `plans.parquet`. For a replanned epoch this is its last plan; an epoch whose last
    plan may have been deleted is left out."""
    ours = ("position", "weight")
    samples = samples.rename_columns([name + "_in_data" * (name in ours) for name in samples.column_names])
    record.say_what_is_missing()
    tables, plans = [], record.plans
    for epoch, number in record.last_plans().items():
        plan = plans.of(number).plan
        of_plan = {
            "epoch": np.full(len(plan), epoch),
            "position": np.arange(len(plan)),
            "sample": plan.indices,
            "weight": plan.weights,
            **packs_of(plan),
        }
        of_samples = [name for name in samples.column_names if name not in of_plan]
        last = [name for name in of_plan if name in ("weight", "pack")]
        names = ["epoch", "position", "sample", *of_samples, *last] if columns is None else list(columns)
        tables.append(_joined(of_plan, samples, plan.indices, names))
    return pa.concat_tables(tables) if tables else pa.table({name: pa.array([], pa.int64()) for name in columns or ()})


def write_tables(record: Record, samples: pa.Table, facts: dict[bytes, bytes], folder: Path) -> None:
    """Write `scores.parquet` and `plans.parquet`.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in (
        (SCORES, measurement_rows(record, samples, None)),
        (PLANS, plan_rows(record, samples, None)),
    ):
        unfinished = folder / f"{name}.unfinished"
        pq.write_table(table.replace_schema_metadata(facts), unfinished, compression="zstd")
        unfinished.rename(folder / name)


def _joined(
    own: Mapping[str, npt.NDArray[Any]], samples: pa.Table, indices: IntArray, names: Sequence[str]
) -> pa.Table:
    """The columns `names`, from `own` or from the rows `indices` of `samples`."""
    of_samples = samples.select([name for name in names if name not in own]).take(pa.array(indices))
    return pa.table({n: pa.array(own[n]) if n in own else of_samples[n].combine_chunks() for n in names})


def _in_schema_order(of_samples: Sequence[str], of_pass: Sequence[str]) -> list[str]:
    """Column names in the order of the schema: the sample, the pass, the numbers."""
    return [*of_samples, *RUN_COLUMNS, *(name for name in of_pass if name not in RUN_COLUMNS)]


def schema_of(file: Path) -> pa.Schema:
    """A Parquet file's schema.

    Raises:
        ValueError: there is no such file, or it is not a Parquet file.
    """
    if not file.exists():
        cure = "Make one with `distill-sampler score DATA --model M --output scores.parquet`."
        if (file.parent / PLANS).exists() or any(file.parent.glob("checkpoint-*")):
            cure = "Runs with attach write their scores. In a loop of your own, call curriculum.save_run(FOLDER)."
        if file.with_name(file.name + ".parts").exists():
            cure = "It is unfinished. Run the same `distill-sampler score` command again to continue."
        raise ValueError(f"There is no scores file {file}. {cure}")
    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a Parquet file ({str(error).splitlines()[0]}).") from None
