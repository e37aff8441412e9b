"""Scoring passes that survive an interruption: finished blocks are kept as parts until the pass is over."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill_sampler.artifacts.parts import Parts
from distill_sampler.dataset import ScoredDataset
from distill_sampler.protocols import Metric
from distill_sampler.reading.model_reader import ModelReader
from distill_sampler.reading.readings import Readings
from distill_sampler.reading.reduce import columns_of
from distill_sampler.reading.scored import Scored
from distill_sampler.reading.scorer import Scorer
from distill_sampler.types import IntArray

logger = logging.getLogger(__name__)

PARTS = 256
"""A pass is kept in at most about so many parts: an interruption costs a part, and each part costs a file."""


def missing_column(metric: str) -> str:
    """Name of the column that says why a sample has no score by a metric (`Missing`; 0 where it has one)."""
    return f"{metric}_missing"


def score_with_parts(
    scorer: Scorer,
    reader: ModelReader,
    dataset: ScoredDataset,
    metrics: Sequence[Metric],
    indices: IntArray,
    *,
    folder: Path | None,
    identity: Mapping[str, Any],
    kept: Readings | None = None,
) -> Iterator[Scored]:
    """Like `Scorer.score`, but finished blocks are kept on disk, in parts of one block or about 1/256 of the pass.

    If an interrupted pass with the same identity has left parts, their scores come first, as one block, and only the
    other samples are read. The parts stay until the next pass begins, because the process may be killed before their
    scores are in a checkpoint. If parts cannot be written (a full disk, a read-only folder), scoring continues without
    them, with a warning.

    Args:
        scorer: the settings.
        reader: the student.
        dataset: the data set.
        metrics: the metrics to score.
        indices: `[n]` the samples to score.
        folder: folder of the parts; None: keep none. Only the first process uses it.
        identity: identity of the pass as plain JSON values: everything that the numbers depend on, to the last bit.
        kept: what frozen readers returned in earlier passes.
    """
    ranks = reader.ranks
    parts = Parts(folder) if folder is not None and ranks.rank == 0 else None
    names = columns_of(metrics)
    metric_names = [metric.name for metric in metrics]
    tables: list[pa.Table] = []
    try:
        if parts is not None and parts.identity != identity:
            parts.begin(identity)
        elif parts is not None and parts.drop_damaged():
            tables = list(parts.tables())
    except OSError as error:
        _report_failure(parts, error)
        parts = None
    done = np.zeros(len(dataset), bool)
    if ranks.max_over_ranks(len(tables)):
        rows = np.zeros((len(dataset), len(names) + len(metric_names) + 1))  # the last column: whether it is done
        for table in tables:
            samples = table["sample"].to_numpy()
            rows[samples, -1] = 1
            for column, name in enumerate([*names, *map(missing_column, metric_names)]):
                rows[samples, column] = table[name].to_numpy()
        rows = ranks.elementwise_sum(rows)
        done = rows[:, -1] > 0
        logger.warning("%d of %d samples were scored before the interruption.", done.sum(), len(indices))
        yield Scored(
            indices=np.flatnonzero(done),
            columns={name: rows[done, column].astype(np.float32) for column, name in enumerate(names)},
            missing={name: rows[done, column].astype(np.int64) for column, name in enumerate(metric_names, len(names))},
            tokens=0,
            tokens_of={},
        )
    unkept: list[pa.Table] = []
    for scored in scorer.score(reader, dataset, metrics, indices, done=done, kept=kept):
        if parts is not None:
            missing = {missing_column(name): scored.missing[name].astype(np.int8) for name in metric_names}
            unkept.append(pa.table({"sample": scored.indices, **scored.columns, **missing}))
            if sum(map(len, unkept)) * PARTS >= len(indices):
                parts = _keep(parts, unkept)
        yield scored
    if parts is not None and unkept:
        _keep(parts, unkept)


def _keep(parts: Parts, unkept: list[pa.Table]) -> Parts | None:
    """Write finished blocks as one part. Returns None if that fails: no more parts can be kept then."""
    try:
        parts.add(pa.concat_tables(unkept))
    except OSError as error:
        _report_failure(parts, error)
        return None
    unkept.clear()
    return parts


def _report_failure(parts: Parts | None, error: OSError) -> None:
    logger.warning(
        "Finished parts of the scoring pass cannot be kept (%s). Scoring continues, but an interruption would lose the "
        "whole pass. Make %s writable to keep them.",
        error,
        parts and parts.folder,
    )
