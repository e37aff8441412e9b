"""The table of a chunk: the user's columns of each candidate, and the student's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from distill_sampler.artifacts.passes import missing_column
from distill_sampler.artifacts.schema import OWN_COLUMNS, TRACE_COLUMNS
from distill_sampler.protocols import Metric
from distill_sampler.reading.reduce import columns_of
from distill_sampler.rows.chunks import Chunk
from distill_sampler.sources.candidates import Candidate, Layout
from distill_sampler.types import FloatArray, IntArray, TokenStats

_IN_DATA = b"in_data"
"""Key in a field's metadata: the column's name in the data, where it differs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkScores:
    """The student's scores of a chunk."""

    columns: Mapping[str, FloatArray]
    """The metrics' numbers by name, `[rows]` each, float32."""
    missing: Mapping[str, IntArray]
    """By metric, `[rows]` why there is no score (`Missing`)."""
    traces: Mapping[int, TokenStats]
    """By row, the statistics of every token, for the rows that keep them."""


class RowTables:
    """Turns candidates and their scores into rows that have the same columns in every chunk.

    Args:
        layout: what each column of the data is for.
        metrics: what is scored.
        kinds: by name, the types of values that the user's other columns have in the first rows.
        schema: the schema of the chunks that an earlier run wrote, which decides instead; None: there are none.
    """

    def __init__(
        self, layout: Layout, metrics: Sequence[Metric], kinds: Mapping[str, set[type]], schema: pa.Schema | None
    ) -> None:
        self._own = {*OWN_COLUMNS, *columns_of(metrics), *(missing_column(metric.name) for metric in metrics)}
        self._names = set(self._own)
        self.renamed: dict[str, str] = {}
        """Columns of the data that have another name in the scores, because the library uses theirs."""
        self.group = self._named(layout.group or "prompt_id")
        """The column that is equal for rows that answer the same prompt."""
        self.teacher = self._named(layout.teacher or "teacher")
        """The column with the teacher who wrote each response."""
        if schema is None:
            self._carried = self._settled(kinds)
            """The user's other columns, by their names in the data."""
        else:
            ours = {*self._own, self.group, self.teacher}
            self._carried = {_name_in_data(field): field for field in schema if field.name not in ours}
            self.renamed |= {name: field.name for name, field in self._carried.items() if name != field.name}
        self._numbers = pa.schema(
            [
                ("num_tokens", pa.int32()),
                ("length", pa.int32()),
                ("tokens_cut", pa.int32()),
                ("content_hash", pa.uint64()),
                ("prompt_hash", pa.uint64()),
                ("scoring_hash", pa.uint64()),
                *((name, pa.float32()) for name in columns_of(metrics)),
                *((missing_column(metric.name), pa.int8()) for metric in metrics),
                ("prompt_text", pa.large_string()),
                ("tokens", pa.list_(pa.large_string())),
                ("token_ranks", pa.list_(pa.int32())),
                ("token_surprisals", pa.list_(pa.float32())),
            ]
        )
        assert set(TRACE_COLUMNS) <= set(self._numbers.names)

    @property
    def score_columns(self) -> list[str]:
        """The columns that are the same for all rows of equal content."""
        return list(self._numbers.names)

    def _named(self, name: str) -> str:
        """The name of a user's column in the scores: `sample_in_data` for `sample`, which the library uses itself."""
        free = name
        while free in self._names:
            free += "_in_data"
        if free != name:
            self.renamed[name] = free
        self._names.add(free)
        return free

    def _settled(self, kinds: Mapping[str, set[type]]) -> dict[str, pa.Field]:
        """The columns of the user's that are kept, with the types that hold the values of the first rows."""
        carried = {}
        for name, found in kinds.items():
            column = self._named(name)
            metadata = None if column == name else {_IN_DATA: name.encode()}
            carried[name] = pa.field(column, _type_for(found), metadata=metadata)
        return carried

    def misfit(self, candidate: Candidate) -> str | None:
        """Why a candidate does not fit the columns' types, which the first rows have decided; None if it fits."""
        for name, column in self._carried.items():
            value = candidate.extra.get(name)
            if value is None or pa.types.is_string(column.type):
                continue
            fits: Any = {"bool": bool, "int64": int, "double": (int, float)}[str(column.type)]
            if not isinstance(value, fits) or isinstance(value, bool) != (str(column.type) == "bool"):
                return f"'{name}' is {value!r}, but in the first rows it is a {column.type}"
        return None

    def identity(self, candidates: Sequence[Candidate], numbers: IntArray) -> pa.Table:
        """The columns that identify each row, then the user's other columns.

        Args:
            candidates: the candidates of a chunk.
            numbers: `[rows]` their numbers among all candidates.
        """
        fields = [
            pa.field("sample", pa.int64()),
            pa.field(self.group, pa.string()),
            pa.field(self.teacher, pa.string()),
            *self._carried.values(),
        ]
        columns = [
            pa.array(numbers, pa.int64()),
            pa.array([candidate.group for candidate in candidates], pa.string()),
            pa.array([candidate.teacher for candidate in candidates], pa.string()),
        ]
        for name, field in self._carried.items():
            values = [candidate.extra.get(name) for candidate in candidates]
            if pa.types.is_string(field.type):
                values = [None if value is None else str(value) for value in values]
            columns.append(pa.array(values, field.type))
        return pa.Table.from_arrays(columns, schema=pa.schema(fields))

    def numbers(self, chunk: Chunk, scores: ChunkScores) -> pa.Table:
        """The columns that depend on the content of each row: counts, hashes, scores, and statistics of every token."""
        kept = [scores.traces.get(row) for row in range(len(chunk))]
        texts = [
            None if trace is None else [encoded.token_text(token) for token in np.flatnonzero(mask).tolist()]
            for encoded, trace, mask in zip(chunk.encoded, kept, chunk.masks, strict=True)
        ]
        columns: dict[str, Any] = {
            "num_tokens": chunk.counts,
            "length": np.diff(chunk.offsets),
            "tokens_cut": [encoded.tokens_cut for encoded in chunk.encoded],
            "content_hash": chunk.hashes,
            "prompt_hash": np.array([candidate.prompt_hash for candidate in chunk.candidates], np.uint64),
            "scoring_hash": chunk.scoring_hashes,
            **scores.columns,
            **{missing_column(name): codes for name, codes in scores.missing.items()},
            "prompt_text": [
                None if trace is None else candidate.prompt_text or encoded.text
                for candidate, encoded, trace in zip(chunk.candidates, chunk.encoded, kept, strict=True)
            ],
            "tokens": texts,
            "token_ranks": [None if t is None or t.rank is None else t.rank.astype(np.int32) for t in kept],
            "token_surprisals": [None if t is None else t.surprisal for t in kept],
        }
        arrays = [pa.array(columns[field.name], field.type) for field in self._numbers]
        return pa.Table.from_arrays(arrays, schema=self._numbers)


def _name_in_data(field: pa.Field) -> str:
    name: bytes = (field.metadata or {}).get(_IN_DATA, field.name.encode())
    return name.decode()


def _type_for(found: set[type]) -> pa.DataType:
    """The type that can hold values of all of these types."""
    found = found - {type(None)}
    for kinds, arrow in (({bool}, pa.bool_()), ({int}, pa.int64()), ({int, float}, pa.float64())):
        if found and found <= kinds:
            return arrow
    return pa.string()
