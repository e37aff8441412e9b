"""Ray Data: an actor that scores batches of rows.

    rows = ray.data.read_json("candidates/")
    scores = rows.map_batches(StudentScores, fn_constructor_args=["HuggingFaceTB/SmolLM2-135M-Instruct"],
                              batch_format="pyarrow", batch_size=512, concurrency=8, num_gpus=1)
    scores.write_parquet("scores/")

`distill-sampler merge scores/` joins the files. Ray scores a batch again whose actor died.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from distill_sampler.integrations.rows import METRICS, RowScorer, in_python, metrics_of
from distill_sampler.integrations.student import RowOptions, Student
from distill_sampler.protocols import Metric


class StudentScores:
    """Takes batches of rows, and gives their scores, for `Dataset.map_batches`.

    Args:
        model: the student: a folder, or its name on the hub.
        metrics: what to score, as for `score_rows`.
        options: the fields of `RowOptions`.

    Raises:
        ValueError: an option or the model cannot be used.
    """

    def __init__(self, model: str, *, metrics: Sequence[Metric] | str = METRICS, **options: Any) -> None:
        with in_python():
            found = RowOptions(**options)
            self._scorer = RowScorer(Student(model, None, found), metrics_of(metrics), found)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The scores of a batch, as `score_rows` gives them.

        Raises:
            ValueError: the batch is no Arrow table, or a row cannot be used.
        """
        if not isinstance(batch, pa.Table):
            raise ValueError(
                f"StudentScores takes Arrow tables: map_batches(…, batch_format='pyarrow'), not {type(batch)}."
            )
        with in_python():
            table = self._scorer.table(batch)
        own = {"text", *(name for name in table.column_names if name not in batch.column_names)}
        for place, field in enumerate(table.schema):
            # a batch in which a column has no values must not give it another type
            if field.name not in own and pa.types.is_primitive(kind := batch.schema.field(field.name).type):
                table = table.set_column(place, field.with_type(kind), table[field.name].cast(kind))
        return table
