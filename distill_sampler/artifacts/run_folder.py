"""A run's scores and plans as tables: from its record to `scores.parquet` and `plans.parquet`.

What a run resumes from lies in its checkpoints and needs neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_sampler.artifacts.passes import missing_column
from distill_sampler.artifacts.record import Record
from distill_sampler.artifacts.schema import OWN_COLUMNS, RUN_COLUMNS
from distill_sampler.dataset import ScoredDataset
from distill_sampler.types import Missing

SCORES, PLANS = "scores.parquet", "plans.parquet"


def column_values(dataset: ScoredDataset, name: str) -> pa.Array:
    """A column of the data set.

    Raises:
        ValueError: there is no such column.
    """
    column = dataset.column(name)
    return pa.DictionaryArray.from_arrays(pa.array(column.codes), pa.array(column.values)).dictionary_decode()


def sample_rows(dataset: ScoredDataset, columns: Sequence[str]) -> pa.Table:
    """One row for each sample: what it is, for people and for planning from files.

    A column of the data that is called like one of ours gets `_in_data` behind its name.

    Args:
        dataset: the samples.
        columns: of the data set.
    """
    return pa.table(
        {
            "sample": np.arange(len(dataset)),
            **{name + "_in_data" * (name in OWN_COLUMNS): column_values(dataset, name) for name in columns},
            "num_tokens": dataset.num_scored,
            "length": dataset.lengths,
            "content_hash": dataset.content_hash,
            "prompt_hash": dataset.prompt_hash,
        }
    )


def measurement_rows(
    record: Record, samples: pa.Table, columns: Sequence[str] | None, *, unmeasured: bool = True
) -> pa.Table:
    """Every measurement of a run, by pass and sample, as in `scores.parquet`.

    Args:
        record: the run's.
        samples: one row for each sample of the data set.
        columns: those that are wanted; None: all of them, in the schema's order.
        unmeasured: whether the first pass has a row, without numbers, for each sample that it did not measure, so that
            every sample is in the table. Its step is -1.
    """
    parts = []
    for number, taken in enumerate(record.passes):
        measured = taken.was_measured
        where = np.flatnonzero(measured | (unmeasured and number == 0))
        step, observed = np.full(taken.num_samples, -1, np.int64), np.zeros(taken.num_samples, bool)
        no_reason = np.zeros(taken.num_samples, np.int64)
        if unmeasured and number == 0:
            without_response = samples["num_tokens"].to_numpy() == 0
            no_reason = np.where(without_response, Missing.NO_RESPONSE, Missing.UNREAD)
        for some in taken.measured:
            step[some.indices], observed[some.indices] = some.step, some.observed
        own = {
            "pass": np.full(len(where), number),
            "epoch": np.full(len(where), taken.epoch),
            "step": step[where],
            "observed": observed[where],
            **{name: values[where] for name, values in taken.columns.items()},
            **{
                missing_column(name): np.where(measured, codes, no_reason)[where].astype(np.int8)
                for name, codes in taken.missing.items()
            },
        }
        wanted = _ordered(samples.column_names, list(own)) if columns is None else list(columns)
        told = samples.select([name for name in wanted if name not in own]).take(pa.array(where))
        parts.append(pa.table({n: pa.array(own[n]) if n in own else told[n].combine_chunks() for n in wanted}))
    return pa.concat_tables(parts) if parts else samples.slice(0, 0)


def plan_rows(record: Record, samples: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    """The plan of every epoch, as in `plans.parquet`. An epoch that was planned anew on the way has its last plan."""
    last = {planned.epoch: planned for planned in record.plans}
    parts = []
    for epoch, planned in last.items():
        plan = planned.plan
        own = {
            "epoch": np.full(len(plan), epoch),
            "position": np.arange(len(plan)),
            "sample": plan.indices,
            "weight": plan.weights,
        }
        told = [name for name in samples.column_names if name not in own]
        wanted = ["epoch", "position", "sample", *told, "weight"] if columns is None else list(columns)
        rows = samples.select([name for name in wanted if name not in own]).take(pa.array(plan.indices))
        parts.append(pa.table({n: pa.array(own[n]) if n in own else rows[n].combine_chunks() for n in wanted}))
    return pa.concat_tables(parts) if parts else pa.table({})


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


def _ordered(of_samples: Sequence[str], own: Sequence[str]) -> list[str]:
    """The schema's order: what a sample is, what the pass was, the numbers."""
    return [*of_samples, *RUN_COLUMNS, *(name for name in own if name not in RUN_COLUMNS)]
