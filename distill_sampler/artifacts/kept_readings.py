"""The statistics of frozen readers, saved in a run's folder, so that a resumed run need not compute them again.

Each scoring pass adds one file. Each row is one view, identified by its content and the reader's identity.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill_sampler.artifacts.parts import read_part, write_part
from distill_sampler.reading.readings import Readings
from distill_sampler.types import TokenStats

logger = logging.getLogger(__name__)

_STATISTICS = [each.name for each in fields(TokenStats) if each.name != "cost"]


def load_readings(readings: Readings, folder: Path, identities: Collection[str]) -> None:
    """Load the saved statistics of these readers. A file that is damaged or unreadable is skipped with a warning, and
    its views are read again.

    Args:
        readings: the statistics of this process, to which the saved ones are added.
        folder: the folder. It need not exist.
        identities: the readers' identities.
    """
    for path in sorted(folder.glob("*.parquet")):
        try:
            table = read_part(path)
        except (OSError, ValueError) as error:
            logger.warning(
                "Statistics of frozen readers in %s cannot be loaded, so they read it again: %s", path, error
            )
            continue
        rows = [row for row in table.to_pylist() if row["reader"] in identities]
        readings.keep((((row["reader"], row["view"]), _statistics(row)) for row in rows), saved=True)


def save_readings(readings: Readings, folder: Path) -> None:
    """Write the statistics that are new since the last call, as one file. If that fails, it logs a warning."""
    new = readings.take_unsaved()
    if not new:
        return
    columns: dict[str, list[Any]] = {
        "reader": [identity for (identity, _), _ in new],
        "view": [view for (_, view), _ in new],
        **{name: [getattr(stats, name) for _, stats in new] for name in _STATISTICS},
    }
    given = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_part(pa.table(given), folder, f"{len(list(folder.glob('*.parquet'))):07d}")
    except OSError as error:
        logger.warning(
            "The statistics of frozen readers cannot be saved in %s (%s). A resumed run will compute them again.",
            folder,
            error,
        )


def _statistics(row: Mapping[str, Any]) -> TokenStats:
    given = {name: row[name] for name in _STATISTICS if row.get(name) is not None}
    return TokenStats(**{name: _array(name, values) for name, values in given.items()})


def _array(name: str, values: list[Any]) -> Any:
    # mid ranks can be half-integers
    whole = name in ("rank", "ties") and all(value == int(value) for value in values)
    return np.array(values, np.int64 if whole else np.float32)
