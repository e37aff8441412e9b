"""What a run leaves for people to look at: every score in `scores.parquet`, every plan in `plans.parquet`.

`distill-sampler report FOLDER` and `distill-sampler teachers FOLDER` read them. What a run resumes from lies in its
checkpoints and needs neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_sampler.curriculum import Curriculum

SCORES, PLANS = "scores.parquet", "plans.parquet"
_LONGEST_TEXT = 200
"""Characters of a text that tells what a row is; longer ones are prompts and responses."""


def save_run(curriculum: Curriculum, folder: str | Path, *columns: str) -> None:
    """Write the scores and plans of a curriculum into a folder. Epochs of the same run that are there already, from
    before a resume, are kept.

    Args:
        curriculum: one that has planned an epoch.
        folder: usually the trainer's `output_dir`.
        columns: of the data set, to know the rows by. Left out: all with short single values (ids, teacher, domain,
            correctness).

    Raises:
        ValueError: the data set has no such column.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dataset, summaries = curriculum.dataset, curriculum.summaries
    names = columns or _telling(curriculum)
    identity = {name: _values(curriculum, name) for name in names}
    scores = curriculum.store.to_table(**identity, num_tokens=dataset.num_scored)
    # an epoch that was planned anew on the way ends with its last plan
    plans = {summary.epoch: plan for summary, plan in zip(summaries, curriculum.plans, strict=True)}
    planned = pa.concat_tables(
        pa.table(
            {
                "epoch": np.full(len(plan), epoch),
                "position": np.arange(len(plan)),
                "sample": plan.indices,
                **{name: values.take(pa.array(plan.indices)) for name, values in identity.items()},
                "weight": plan.weights,
            }
        )
        for epoch, plan in plans.items()
    ).replace_schema_metadata(scores.schema.metadata)
    for name, table in ((SCORES, scores), (PLANS, planned)):
        _write(_with_earlier(folder / name, table), folder / name)


def _telling(curriculum: Curriculum) -> list[str]:
    first = curriculum.dataset[0]

    def telling(value: Any) -> bool:
        return isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= _LONGEST_TEXT)

    needed = dict.fromkeys(name for policy in curriculum.policies for name in policy.uses_columns)
    return list(needed | dict.fromkeys(name for name in curriculum.dataset.column_names if telling(first[name])))


def _values(curriculum: Curriculum, name: str) -> pa.Array:
    column = curriculum.dataset.column(name)
    return pa.array(column.values).take(pa.array(column.codes))


def _with_earlier(path: Path, table: pa.Table) -> pa.Table:
    """Behind the epochs that an earlier process of this run has written and this one has not."""
    if not path.exists():
        return table
    before = pq.read_table(path)
    if before.schema.remove_metadata() != table.schema.remove_metadata() or _origin(before) != _origin(table):
        return table
    first = min(table["epoch"].to_numpy(), default=0)
    earlier = before.filter(pa.array(before["epoch"].to_numpy() < first))
    return pa.concat_tables([earlier.replace_schema_metadata(table.schema.metadata), table])


def _origin(table: pa.Table) -> tuple[bytes | None, ...]:
    told = table.schema.metadata or {}
    return tuple(told.get(f"distill_sampler.{name}".encode()) for name in ("dataset", "metrics"))


def _write(table: pa.Table, path: Path) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    pq.write_table(table, unfinished, compression="zstd")
    unfinished.rename(path)
