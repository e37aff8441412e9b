"""How a teacher's log-probabilities lie on disk: the columns of a store, and how one is written.

A store is an Arrow IPC file, which is memory-mapped: opening it reads nothing, and a row is read where it lies. (A row
of a Parquet file can only be read with the thousands that are compressed with it.) A row is one response:

| column | type | what |
|---|---|---|
| `key` | string | the value of the user's key column; null without one |
| `text` | string | the response's text |
| `key_hash`, `text_hash` | uint64 | by which a row is found |
| `content_hash` | uint64 | of prompt and response as they stand in the data |
| `coverage` | float32 | share of the text's bytes that lie in a token |
| `absent` | int32 | the teacher's tokens that are not in the text |
| `token_ids` | list of int32 | the teacher's tokens that are in the text; empty if only their texts are known |
| `logprobs` | list of float32 | their log-probabilities |
| `begins` | list of int32 | the byte of the text at which each begins |
| `top_ids`, `top_logprobs` | lists of int32, float16 | for each token in turn the k likeliest in its place |

What the numbers belong to is in the file's metadata.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill_sampler.field_docs import documents_fields
from distill_sampler.serialize import encode_facts, hash_of
from distill_sampler.types import FloatArray, IntArray

VERSION = 1
KIND = "teacher log-probabilities"
BATCH_BYTES = 1 << 26
"""Bytes of a record batch. Opening a store looks at each batch once, and writing one holds one."""


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class StoredRow:
    """A teacher's log-probabilities of one response."""

    text: str
    """The response's text."""
    surprisal: FloatArray
    """`[tokens]` of the tokens that are in the text, in nats."""
    begins: IntArray
    """`[tokens]` the byte of the text at which each begins, ascending."""
    token_ids: IntArray | None = None
    """`[tokens]` in the teacher's vocabulary; None: not known."""
    key: str | None = None
    """The value of the user's key column."""
    coverage: float = 1.0
    """Share of the text's bytes that lie in a token."""
    absent: int = 0
    """The teacher's tokens that are not in the text."""
    content_hash: int | None = None
    """Of prompt and response; None: of the response and its key."""
    top_ids: IntArray | None = None
    """`[tokens, k]` the likeliest tokens in each place."""
    top_logprobs: FloatArray | None = None
    """`[tokens, k]` their log-probabilities."""


def schema(top_k: int) -> pa.Schema:
    """The columns of a store."""
    fields: list[tuple[str, pa.DataType]] = [
        ("key", pa.string()),
        ("text", pa.string()),
        *((name, pa.uint64()) for name in ("key_hash", "text_hash", "content_hash")),
        ("coverage", pa.float32()),
        ("absent", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("begins", pa.list_(pa.int32())),
    ]
    if top_k:
        fields += [("top_ids", pa.list_(pa.int32())), ("top_logprobs", pa.list_(pa.float16()))]
    return pa.schema(fields)


def key_hash(key: str | None) -> int:
    """64 bits of a key; 0 for none."""
    return 0 if key is None else _hash(key)


def text_hash(text: str) -> int:
    """64 bits of a text without its white space, which templates and files trim in different ways."""
    return _hash("".join(text.split()))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def table_of(rows: Sequence[StoredRow], *, top_k: int) -> pa.Table:
    """Rows as a table of a store."""
    columns: dict[str, Any] = {
        "key": [row.key for row in rows],
        "text": [row.text for row in rows],
        "key_hash": [key_hash(row.key) for row in rows],
        "text_hash": [text_hash(row.text) for row in rows],
        "content_hash": [
            _hash(f"{row.key}\0{row.text}") if row.content_hash is None else row.content_hash for row in rows
        ],
        "coverage": [row.coverage for row in rows],
        "absent": [row.absent for row in rows],
        "token_ids": _lists([np.zeros(0) if row.token_ids is None else row.token_ids for row in rows], np.int32),
        "logprobs": _lists([-np.asarray(row.surprisal) for row in rows], np.float32),
        "begins": _lists([row.begins for row in rows], np.int32),
    }
    if top_k:
        empty = np.zeros((0, top_k))
        for name, kind in (("top_ids", np.int32), ("top_logprobs", np.float16)):
            of_rows = [empty if getattr(row, name) is None else getattr(row, name) for row in rows]
            assert all(values.shape[1:] == (top_k,) for values in of_rows), name
            columns[name] = _lists([values.reshape(-1) for values in of_rows], kind)
    wanted = schema(top_k)
    arrays = [pa.array(columns[field.name], field.type) for field in wanted]
    return pa.Table.from_arrays(arrays, schema=wanted)


def _lists(values: Sequence[Any], kind: type[np.generic]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
    flat = np.concatenate([np.zeros(0, kind), *(np.asarray(each).astype(kind) for each in values)])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def write_store(
    path: Path, rows: Iterable[StoredRow], facts: Mapping[str, Any] | None = None, *, top_k: int = 0
) -> None:
    """Write a whole store at once, for one that is made in memory.

    Args:
        path: the file.
        rows: its rows.
        facts: what the numbers belong to, as plain values: `model`, `temperature`, `key_column` and so on.
        top_k: likeliest tokens that the rows hold in each place.
    """
    table = table_of(list(rows), top_k=top_k)
    told = encode_facts(store_facts([table], top_k=top_k, **(facts or {})))
    join_store(path, table.schema.with_metadata(told), [table])


def store_facts(tables: Iterable[pa.Table], *, top_k: int, **more: Any) -> dict[str, Any]:
    """What a store says about itself: among it a hash of its content, the same however its rows are split into tables.

    Args:
        tables: all rows, in order.
        top_k: likeliest tokens that the rows hold in each place.
        more: what the numbers belong to.
    """
    hashes = {name: hashlib.blake2b(digest_size=8) for name in schema(top_k).names}
    for table in tables:
        for name, found in hashes.items():
            column = table[name]
            if pa.types.is_list(column.type):
                found.update(column.combine_chunks().value_lengths().to_numpy().tobytes())
                column = pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)
            if pa.types.is_string(column.type):
                found.update("\0".join("" if text is None else text for text in column.to_pylist()).encode())
            else:
                found.update(column.to_numpy().tobytes())
    content = hash_of(*(found.digest() for found in hashes.values()))
    return {"kind": KIND, "schema": VERSION, "top_k": top_k, "content": content, **more}


def join_store(path: Path, described: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write a store from tables, in record batches of a useful size.

    Args:
        path: the file.
        described: the columns, with the facts as metadata.
        tables: the rows, in order; one batch of them is held in memory.
    """
    with pa.ipc.new_file(str(path), described) as writer:
        waiting: list[pa.Table] = []
        for table in tables:
            waiting.append(table)
            if sum(each.nbytes for each in waiting) >= BATCH_BYTES:
                writer.write_table(_one(waiting, described))
                waiting = []
        if waiting:
            writer.write_table(_one(waiting, described))


def _one(tables: Sequence[pa.Table], described: pa.Schema) -> pa.Table:
    return pa.concat_tables(tables).combine_chunks().replace_schema_metadata(described.metadata)
