"""A scoring pass that survives an interruption: its blocks are kept as parts until the pass is over."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill_sampler.artifacts.parts import Parts
from distill_sampler.dataset import ScoredDataset
from distill_sampler.reading.model_reader import ModelReader
from distill_sampler.reading.readings import Readings
from distill_sampler.reading.reduce import columns_of
from distill_sampler.reading.scored import Scored
from distill_sampler.reading.scorer import Scorer
from distill_sampler.types import IntArray, Metric

logger = logging.getLogger(__name__)


def missing_column(metric: str) -> str:
    """The column that says why a sample has no score by a metric (`Missing`; 0 where it has one)."""
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
    """`Scorer.score`, in blocks that are kept on disk as they are done.

    What an earlier, interrupted pass of the same identity has left comes first, as one block; only the rest is read.
    The parts stay until the next pass begins, because the process may be killed before what they hold is in a
    checkpoint. Where they cannot be written (a full disk, a read-only folder), scoring goes on without them, which is
    said once.

    Args:
        scorer: the settings.
        reader: the student.
        dataset: where the samples are.
        metrics: what to compute.
        indices: `[n]` which samples.
        folder: where the parts lie; None: keep nothing. Only the first process uses it.
        identity: which pass this is, as plain JSON values: all that decides the numbers to the last bit.
        kept: what frozen readers gave in earlier passes.
    """
    ranks = reader.ranks
    parts = Parts(folder) if folder is not None and ranks.rank == 0 else None
    names = columns_of(metrics)
    codes = [metric.name for metric in metrics]
    found: list[pa.Table] = []
    try:
        if parts is not None and parts.identity != identity:
            parts.begin(identity)
        elif parts is not None and parts.drop_damaged():
            found = list(parts.tables())
    except OSError as error:
        _report_failure(parts, error)
        parts = None
    done = np.zeros(len(dataset), bool)
    if ranks.max_over_ranks(len(found)):
        rows = np.zeros((len(dataset), len(names) + len(codes) + 1))
        for table in found:
            at = table["sample"].to_numpy()
            rows[at, -1] = 1
            for place, name in enumerate([*names, *map(missing_column, codes)]):
                rows[at, place] = table[name].to_numpy()
        rows = ranks.elementwise_sum(rows)
        done = rows[:, -1] > 0
        logger.warning("%d of %d samples were scored before the interruption.", done.sum(), len(indices))
        yield Scored(
            indices=np.flatnonzero(done),
            columns={name: rows[done, place].astype(np.float32) for place, name in enumerate(names)},
            missing={name: rows[done, len(names) + place].astype(np.int64) for place, name in enumerate(codes)},
            tokens=0,
            tokens_of={},
        )
    for scored in scorer.score(reader, dataset, metrics, indices, done=done, kept=kept):
        if parts is not None:
            table = pa.table(
                {
                    "sample": scored.indices,
                    **scored.columns,
                    **{missing_column(name): scored.missing[name].astype(np.int8) for name in codes},
                }
            )
            try:
                parts.add(table)
            except OSError as error:
                _report_failure(parts, error)
                parts = None
        yield scored


def _report_failure(parts: Parts | None, error: OSError) -> None:
    logger.warning(
        "Scores cannot be kept while they are computed (%s). Scoring goes on; an interruption would cost the whole "
        "pass. Make %s writable to keep them.",
        error,
        parts and parts.folder,
    )
