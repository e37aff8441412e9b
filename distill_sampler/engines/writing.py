"""The file format of a store of a teacher's log-probabilities, and how to write one.

A store is a memory-mapped Arrow IPC file: opening it reads no rows, and each row can be read alone. (In a Parquet file,
reading one row decompresses the thousands of rows in its row group.) Each row is one response:

| column | type | meaning |
|---|---|---|
| `key` | string | the value of the user's key column; null if there is none |
| `text` | string | the response's text |
| `key_hash`, `text_hash` | uint64 | hashes by which a row is found |
| `content_hash` | uint64 | hash of the prompt and the response in the data |
| `coverage` | float32 | share of the text's bytes that the tokens cover |
| `absent` | int32 | number of the teacher's tokens that are not in the text |
| `token_ids` | list of int32 | the teacher's tokens in the text; empty if only their texts are known |
| `logprobs` | list of float32 | their log-probabilities |
| `begins` | list of int32 | the byte of the text at which each token begins |
| `top_ids`, `top_logprobs` | lists of int32, float16 | for each token, the k most probable tokens at its position |

The file's metadata says how the numbers were made.
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
"""Bytes of a record batch. Opening a store visits each batch once. Writing a store holds one batch in memory."""


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class StoredRow:
    """A teacher's log-probabilities for one response."""

    text: str
    """The response's text."""
    surprisal: FloatArray
    """`[tokens]` surprisal in nats of the tokens that are in the text."""
    begins: IntArray
    """`[tokens]` the byte of the text at which each token begins, ascending."""
    token_ids: IntArray | None = None
    """`[tokens]` token ids in the teacher's vocabulary; None: unknown."""
    key: str | None = None
    """The value of the user's key column."""
    coverage: float = 1.0
    """Share of the text's bytes that the tokens cover."""
    absent: int = 0
    """Number of the teacher's tokens that are not in the text."""
    content_hash: int | None = None
    """Hash of the prompt and the response. None: the response and its key are hashed."""
    top_ids: IntArray | None = None
    """`[tokens, k]` the most probable tokens at each position."""
    top_logprobs: FloatArray | None = None
    """`[tokens, k]` their log-probabilities."""


def schema(top_k: int) -> pa.Schema:
    """The columns of a store with `top_k` most probable tokens at each position."""
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
    """A 64-bit hash of a key; 0 if there is no key."""
    return 0 if key is None else _hash(key)


def text_hash(text: str) -> int:
    """A 64-bit hash of a text without its white space, which chat templates and files trim differently."""
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
    """Write a store whose rows are all in memory.

    Args:
        path: the file.
        rows: its rows.
        facts: how the numbers were made, as plain values: `model`, `temperature`, `key_column` and so on.
        top_k: how many of the most probable tokens the rows have at each position.
    """
    table = table_of(list(rows), top_k=top_k)
    told = encode_facts(store_facts([table], top_k=top_k, **(facts or {})))
    join_store(path, table.schema.with_metadata(told), [table])


def store_facts(tables: Iterable[pa.Table], *, top_k: int, **more: Any) -> dict[str, Any]:
    """The metadata of a store. It has a hash of the content, which does not depend on how rows are split into tables.

    Args:
        tables: all rows, in order.
        top_k: how many of the most probable tokens the rows have at each position.
        more: how the numbers were made.
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
    """Write a store from tables, in record batches of about `BATCH_BYTES`.

    Args:
        path: the file.
        described: the columns, with the facts in the metadata.
        tables: the rows, in order. One batch at a time is held in memory.
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
