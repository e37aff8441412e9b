"""Reads rows from JSONL (plain, gz, zst), JSON, Parquet, folders of these, saved data sets, and data sets on the hub.

Rows are read one by one and never kept. A row that cannot be read becomes a `Bad` with its place and the reason, so
that one bad line neither stops the reading of ten million good ones nor goes unnoticed.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_sampler.content import content_hashes
from distill_sampler.serialize import hash_of

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".json", ".json.gz", ".json.zst", ".parquet")
"""The file name endings that can be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row as it was read."""

    where: str
    """Its place in the data, for messages: `"candidates.jsonl.gz, line 17"`."""
    values: Mapping[str, Any]
    """Its columns by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bad:
    """A row that cannot be used."""

    where: str
    """Its place in the data, for messages."""
    reason: str
    """Why it cannot be used, as the rest of a sentence."""


class Sources:
    """All the data that a command was given, in the given order.

    Args:
        data: paths, and names of data sets on the hub.
        split: the split to read of a saved data set or one on the hub.
        subset: the subset to read of a data set on the hub; None: its only one, or its default.

    Raises:
        ValueError: a path does not exist, or cannot be read; the message names it.
    """

    def __init__(self, data: Sequence[str], *, split: str = "train", subset: str | None = None) -> None:
        self.data = tuple(data)
        self.split = split
        self.subset = subset
        self.files = [file for name in data for file in _files(name)]
        self.size = sum(file.stat().st_size for file in self.files if isinstance(file, Path) and file.is_file())
        """Size of all files in bytes; 0 if there are none."""
        self.position = 0
        """Bytes read so far, for a progress bar."""
        self._commits: dict[str, str | None] = {}

    @property
    def about_tokens(self) -> int:
        """About how many tokens there are: one for four bytes."""
        return self.size // 4

    def contents(self) -> list[tuple[str, str | None]]:
        """The name of each file or data set, with a hash of its content. A data set on the hub has its commit instead,
        or None if the hub cannot be asked.

        Raises:
            OSError: a file cannot be read.
        """
        parts = [_parts_of(file, self.split) for file in self.files]
        hashes = iter(content_hashes([part for some in parts for part in some]))
        found: list[tuple[str, str | None]] = []
        for file, some in zip(self.files, parts, strict=True):
            if isinstance(file, str):
                name = f"{file} ({', '.join(filter(None, (self.subset, self.split)))})"
                commit = self._commit(file)
                found.append((name, f"{name} at {commit}" if commit else None))
            else:
                found.append((str(file), hash_of(*(each.encode() for each in itertools.islice(hashes, len(some))))))
        return found

    def _commit(self, name: str) -> str | None:
        """The current commit of a data set on the hub. It is looked up once, so that exactly this commit is read."""
        if name not in self._commits:
            from huggingface_hub import HfApi

            try:
                self._commits[name] = HfApi().dataset_info(name, timeout=10).sha
            except Exception:  # no network, no rights, no such data set: reading it will say which
                self._commits[name] = None
        return self._commits[name]

    def __iter__(self) -> Iterator[Row | Bad]:
        before = 0
        for file in self.files:
            if isinstance(file, str):
                yield from _hub(file, self.subset, self.split, self._commit(file))
            elif file.is_dir():
                yield from _saved(file, self.split)
            elif file.suffix == ".parquet":
                for done, item in _parquet(file):
                    self.position = before + int(done * file.stat().st_size)
                    yield item
            else:
                with file.open("rb") as raw:
                    for item in _json(file, raw):
                        self.position = before + raw.tell()
                        yield item
            before += file.stat().st_size if isinstance(file, Path) and file.is_file() else 0


class GivenRows:
    """Rows that a program gives, in the place of `Sources`. They are read once, so they may come from an iterator.

    The beginning can be looked at before: rows that the first iteration takes come again in the second one, the last.

    Args:
        rows: the rows, each its columns by name.
        name: what the rows are called in messages.
        size: how many rows there are; None: as many as can be counted.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], *, name: str = "the rows", size: int | None = None) -> None:
        self.data = (name,)
        self.size = size if size is not None else len(rows) if isinstance(rows, Sized) else 0
        """How many rows there are; 0 if nobody knows."""
        self.position = 0
        """How many rows were read so far, for a progress bar."""
        self._rows = iter(rows)
        self._looked_at: list[Mapping[str, Any]] | None = None

    def contents(self) -> list[tuple[str, str | None]]:
        """The name, with the content unknown."""
        return [(self.data[0], None)]

    @property
    def about_tokens(self) -> int:
        """About how many tokens there are, if a row has 512."""
        return 512 * self.size

    def __iter__(self) -> Iterator[Row | Bad]:
        rows = self._rows
        looking = self._looked_at is None
        if self._looked_at is None:
            self._looked_at = []
        else:
            rows = itertools.chain(self._looked_at, self._rows)
        for number, values in enumerate(rows, 1):
            if looking:
                self._looked_at.append(values)
            self.position = number
            where = f"row {number}"
            yield Row(where=where, values=values) if isinstance(values, Mapping) else _checked(where, values)


def _files(name: str) -> list[Path | str]:
    """The files of a path, sorted; or the name itself, if it must be a data set on the hub."""
    path = Path(name)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"{name} is in a format that cannot be read. Convert it to one of {', '.join(SUFFIXES)}.")
        return [path]
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return [path]
        found: list[Path | str] = [file for file in sorted(path.rglob("*")) if file.name.endswith(SUFFIXES)]
        if not found:
            raise ValueError(f"The folder {name} has no file that ends in {', '.join(SUFFIXES)}.")
        return found
    if name.endswith(SUFFIXES) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"There is no file or folder {name}. Check the path.")
    return [name]


def _parts_of(file: Path | str, split: str) -> list[Path]:
    """The files that hold a source's rows: itself, or the tables of a saved data set."""
    if isinstance(file, str):
        return []
    if file.is_file():
        return [file]
    return sorted((file / split if (file / "dataset_dict.json").exists() else file).glob("*.arrow"))


def _json(file: Path, raw: io.BufferedReader) -> Iterator[Row | Bad]:
    number = 0
    try:
        stream: Any = raw
        if file.suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif file.suffix == ".zst":
            # opened separately, because closing Arrow's stream closes the file under it
            stream = io.BufferedReader(pa.input_stream(str(file), compression="zstd"))
        if ".json" in file.suffixes:
            stream = io.BufferedReader(stream) if not isinstance(stream, io.BufferedReader) else stream
            if not _is_lines(stream):
                yield from _document(file, stream)
                return
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _row(f"{file.name}, line {number}", line)
    except (EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowException, OSError) as error:
        yield Bad(where=f"{file.name}, after line {number}", reason=f"the file is cut off or damaged ({error})")


def _is_lines(stream: io.BufferedReader) -> bool:
    """Whether a .json file holds one object a line, as many do: its first line is a complete object."""
    start = stream.peek(1 << 16)[: 1 << 16].lstrip()
    if not start.startswith(b"{") or b"\n" not in start.rstrip():
        return False
    try:
        json.loads(start.split(b"\n", 1)[0])
    except ValueError:
        return False
    return True


def _document(file: Path, stream: io.BufferedReader) -> Iterator[Row | Bad]:
    try:
        content = json.load(stream)
    except (ValueError, RecursionError) as error:
        yield Bad(where=file.name, reason=f"it is not JSON ({error})")
        return
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else [content]
    if not isinstance(content, list):
        yield Bad(where=file.name, reason="it holds no list of rows")
        return
    for number, values in enumerate(content, 1):
        where = f"{file.name}, row {number}"
        yield _checked(where, values)


def _row(where: str, line: bytes) -> Row | Bad:
    try:
        values = json.loads(line)
    except UnicodeDecodeError:
        return Bad(where=where, reason="it is not UTF-8 text")
    except (ValueError, RecursionError) as error:
        return Bad(where=where, reason=f"it is not JSON ({error})")
    return _checked(where, values)


def _checked(where: str, values: Any) -> Row | Bad:
    if isinstance(values, dict):
        return Row(where=where, values=values)
    return Bad(where=where, reason=f"it is a {type(values).__name__}, not an object with columns")


def _parquet(file: Path) -> Iterator[tuple[float, Row | Bad]]:
    try:
        with pq.ParquetFile(file) as table:
            rows, number = max(table.metadata.num_rows, 1), 0
            for batch in table.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield number / rows, Row(where=f"{file.name}, row {number}", values=values)
    except (pa.ArrowException, OSError) as error:
        yield 1.0, Bad(where=file.name, reason=f"it is not a Parquet file, or it is damaged ({error})")


def _saved(folder: Path, split: str) -> Iterator[Row | Bad]:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"{folder} has no split '{split}'; choose with --split one of: {', '.join(saved)}.")
        saved = saved[split]
    for number, values in enumerate(saved, 1):
        yield Row(where=f"{folder.name}, row {number}", values=values)


def _hub(name: str, subset: str | None, split: str, commit: str | None) -> Iterator[Row | Bad]:
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split=split, revision=commit, streaming=True)
    except Exception as error:  # the hub's client raises errors of many kinds
        raise ValueError(
            f"There is no file or folder {name}, and loading it from the hub failed: {_one_line(error)}. Check the "
            "name, --subset, --split and the network."
        ) from error
    number = 0
    try:
        for number, values in enumerate(rows, 1):
            yield Row(where=f"{name}, row {number}", values=values)
    except Exception as error:
        raise ValueError(
            f"Reading {name} from the hub stopped after row {number}: {_one_line(error)}. The scores so far are kept. "
            "Run the same command again to continue."
        ) from error


def _one_line(error: Exception) -> str:
    """The beginning of an error's message on one line. It names the cause, and the subsets or splits that exist."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300].rstrip('.') or 'no reason given'}"
