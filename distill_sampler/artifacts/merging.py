"""Joining files of scores that several processes wrote apart: the shards of one data set, or several data sets.

All of them must have the same identity: weights, numerics, metrics and settings of the student that scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_sampler.artifacts.run_folder import schema_of
from distill_sampler.artifacts.score_output import write_scores
from distill_sampler.serialize import decode_facts, differences, encode_facts, hash_of

_ROWS = 1 << 12
"""How many rows of each file are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """A file of scores."""

    path: Path
    schema: pa.Schema
    facts: dict[str, Any]

    @property
    def shard(self) -> tuple[int, int] | None:
        """`(number, of)`; None if the file is no shard."""
        found = self.facts.get("shard")
        return (int(found[0]), int(found[1])) if found else None

    def tables(self, columns: list[str] | None) -> Iterator[pa.Table]:
        """Its rows, some at a time."""
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns, use_threads=False):
                yield pa.Table.from_batches([batch])


def merge_scores(paths: Sequence[Path], output: Path) -> int:
    """Join files of scores into one, and return how many rows it has.

    Shards are joined in the order of the data, so that the result is the file of a single process. Other files are
    joined in the given order. Memory holds a few thousand rows of each file.

    Args:
        paths: the files, or folders of them.
        output: the file to write.

    Raises:
        ValueError: a file holds no scores or those of another student or other settings, a shard is missing or there
            twice, or the files' columns do not fit together.
    """
    files = [_opened(file) for path in paths for file in (sorted(path.glob("*.parquet")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"There is no .parquet file in {', '.join(map(str, paths))}.")
    if output.resolve() in {file.path.resolve() for file in files}:
        raise ValueError(f"{output} is one of the files to join. Give another --output.")
    first = files[0]
    for file in files[1:]:
        if differing := differences(first.facts["identity"], file.facts["identity"]):
            raise ValueError(
                f"The scores in {file.path} and {first.path} are not comparable ({differing}). Score both with the "
                "same student and settings, or leave one out."
            )
    facts = {name: value for name, value in first.facts.items() if name not in ("shard", "origin", "paths")}
    shards = [file.shard for file in files if file.shard is not None]
    if shards:
        files = _all_shards(files)
        origin = first.facts["origin"]
        facts |= {"origin": {**origin, "rows": _without_shard(origin["rows"])}, "paths": first.facts["paths"]}
    else:
        facts["paths"] = [path for file in files for path in file.facts.get("paths", [])]
    try:
        schema = pa.unify_schemas(
            [file.schema.remove_metadata() for file in files], promote_options="default" if shards else "permissive"
        )
    except pa.ArrowException as error:
        raise ValueError(f"The columns of the files do not fit together: {error}.") from None
    contents = (table["content_hash"].to_numpy().tobytes() for table in _joined(files, ["sample", "content_hash"]))
    facts["dataset"] = hash_of(*contents)
    write_scores(output, schema.with_metadata(encode_facts(facts)), _numbered(_joined(files, None), schema))
    return int(pq.read_metadata(output).num_rows)


def _opened(path: Path) -> _Scored:
    schema = schema_of(path)
    facts = decode_facts(schema.metadata)
    if "identity" not in facts:
        raise ValueError(
            f"{path} does not say which student scored it, so it cannot be joined with others. Give files that "
            "`distill-sampler score` or `score_rows` of this version wrote."
        )
    return _Scored(path=path, schema=schema, facts=facts)


def _all_shards(files: Sequence[_Scored]) -> list[_Scored]:
    """The files in the order of the shards.

    Raises:
        ValueError: one is missing, there twice, no shard, or of other data.
    """
    first = files[0]
    found: dict[int, _Scored] = {}
    for file in files:
        if file.shard is None or first.shard is None or file.shard[1] != first.shard[1]:
            raise ValueError(
                f"{first.path} is {_called(first)}, but {file.path} is {_called(file)}. Join shards alone."
            )
        if file.shard[0] in found:
            raise ValueError(f"{found[file.shard[0]].path} and {file.path} are the same shard. Leave one out.")
        found[file.shard[0]] = file
        for what in ("data", "rows"):
            here, there = (_without_shard(each.facts["origin"][what]) for each in (file, first))
            if here != there:
                raise ValueError(
                    f"{file.path} and {first.path} are shards of other data, or of other columns of it. Score all "
                    "shards from the same files with the same options."
                )
    of = first.shard[1] if first.shard else 0
    if lacking := [str(number) for number in range(1, of + 1) if number not in found]:
        raise ValueError(
            f"Of {of} shards, {', '.join(lacking)} are missing. Score them with `distill-sampler score --shard "
            f"{lacking[0]}/{of}`, and join again."
        )
    return [found[number] for number in range(1, of + 1)]


def _called(file: _Scored) -> str:
    return "no shard" if file.shard is None else "shard {}/{}".format(*file.shard)


def _without_shard(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {name: value for name, value in settings.items() if name != "shard"}
    return [content for _, content in settings]  # data: names may differ from machine to machine


def _joined(files: Sequence[_Scored], columns: list[str] | None) -> Iterator[pa.Table]:
    """The rows of all files: by their numbers if the files are shards, else file by file."""
    if files[0].shard is None:
        for file in files:
            yield from file.tables(columns)
        return
    streams = [file.tables(columns) for file in files]
    waiting: list[pa.Table | None] = [next(stream, None) for stream in streams]
    while any(table is not None for table in waiting):
        # up to this number, all rows of all shards are in memory
        bound = min(table["sample"][-1].as_py() for table in waiting if table is not None and len(table))
        ready = []
        for place, table in enumerate(waiting):
            if table is None:
                continue
            number = int(np.searchsorted(table["sample"].to_numpy(), bound, side="right"))
            ready.append(table[:number])
            rest = table[number:]
            waiting[place] = rest if len(rest) else next(streams[place], None)
        yield pa.concat_tables(ready).sort_by("sample")


def _numbered(tables: Iterator[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """The tables with all columns, and rows numbered in order."""
    begin = 0
    for table in tables:
        arrays = [
            table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
            for field in schema
        ]
        arrays[schema.get_field_index("sample")] = pa.array(np.arange(begin, begin + len(table)), pa.int64())
        begin += len(table)
        yield pa.Table.from_arrays(arrays, schema=schema)
