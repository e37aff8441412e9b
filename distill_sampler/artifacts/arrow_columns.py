"""Parts of a scores file or of a run's record as arrays and columns (`scorefile.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from distill_sampler.artifacts.record import Record, read_run
from distill_sampler.artifacts.run_folder import measurement_rows, plan_rows
from distill_sampler.store import drifted
from distill_sampler.types import FloatArray, IntArray


class Values(Sequence[Any]):
    """An Arrow array as a sequence. Elements become Python objects only on access: there may be ten million of them."""

    def __init__(self, array: pa.Array) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Values: ...
    def __getitem__(self, index: int | slice) -> Any:
        return Values(self._array[index]) if isinstance(index, slice) else self._array[int(index)].as_py()

    def __contains__(self, value: object) -> bool:
        return self._array.null_count > 0 if value is None else super().__contains__(value)


def has_passes(folder: Path) -> bool:
    return folder.is_dir() and bool(read_run(folder)) and len(Record(folder, write=False).passes) > 0


def read_record(
    record: Record, run: Mapping[str, Any], samples: pa.Table
) -> tuple[Sequence[str], Mapping[str, Any], Callable[[list[str]], pa.Table], Callable[[], pa.Table] | None]:
    """A record's columns and facts, and functions that read its measurements and its plans."""

    def load(columns: list[str]) -> pa.Table:
        return measurement_rows(record, samples, columns)

    def load_plans() -> pa.Table:
        return plan_rows(record, samples, ["epoch", "sample"])

    names = measurement_rows(record, samples, None).column_names
    return names, {**run, **record.facts()}, load, load_plans if len(record.plans) else None


def float_columns(table: pa.Table, names: Sequence[str]) -> dict[str, FloatArray]:
    return {name: np.array(table[name].to_numpy(), np.float32) for name in names}


def codes_of(encoded: pa.DictionaryArray) -> IntArray:
    return np.asarray(encoded.indices.to_numpy(zero_copy_only=False), np.int64)


def replayed(
    measured: Mapping[str, FloatArray],
    passes: IntArray,
    samples: IntArray,
    drift: Sequence[Mapping[str, float] | None],
    last_pass: int,
) -> dict[str, FloatArray]:
    """Every number after a pass, `[samples]` each. What a pass did not measure moves with its drift, as in training.

    Args:
        measured: by name, `[measurements]` the numbers.
        passes: `[measurements]` the pass of each.
        samples: `[measurements]` the sample of each.
        drift: by pass, how far the numbers moved that it did not measure; None: the pass was deleted from the run's
            record, so that what it measured, and what moved with it, is NaN until it is measured again.
        last_pass: the last pass that counts.
    """
    size = int(samples.max(initial=-1)) + 1
    latest = {name: np.full(size, np.nan, np.float32) for name in measured}
    ever_measured = np.zeros(size, bool)
    for number in range(last_pass + 1):
        rows = np.flatnonzero(passes == number)
        was_measured = np.zeros(size, bool)
        was_measured[samples[rows]] = True
        ever_measured |= was_measured
        moves = drift[number] if number < len(drift) else {}
        if moves is None:
            latest = {name: np.full(size, np.nan, np.float32) for name in measured}
        for name, moved in (moves or {}).items():
            latest[name] = np.where(was_measured, latest[name], drifted(latest[name], moved))
        for name, values in measured.items():
            latest[name][samples[rows]] = values[rows]
    return {name: values[ever_measured] for name, values in latest.items()}
