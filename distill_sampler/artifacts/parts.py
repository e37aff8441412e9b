"""Work that is kept in parts: a folder of tables, written one by one, so that a kill loses at most one part.

The command line keeps the chunks of a data set this way, a curriculum the blocks of a scoring pass. `identity.json`
says what the parts belong to. A part's file name holds the hash of its content: a damaged part and all that follow it
are deleted and computed again.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_sampler.serialize import hash_of, write_atomically

logger = logging.getLogger(__name__)

_IDENTITY = "identity.json"


class Parts:
    """The parts in a folder, in the order in which they were added.

    Args:
        folder: the folder. It need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number: int | None = None
        """How many parts there are; None: not known yet. (Listing the folder for each new part would get slow.)"""

    @property
    def identity(self) -> dict[str, Any] | None:
        """What the parts belong to; None if there are no parts, or the file cannot be read."""
        try:
            found = json.loads((self.folder / _IDENTITY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Delete all parts, and start again with another identity.

        Raises:
            OSError: the folder cannot be written.
        """
        self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / _IDENTITY, json.dumps(identity, indent=1).encode())

    def paths(self) -> list[Path]:
        """The files of the parts."""
        return sorted(self.folder.glob("[0-9]*.parquet"))

    def drop_damaged(self) -> int:
        """Delete the first damaged part and all that follow it. Returns how many parts are left.

        Raises:
            OSError: a part cannot be deleted.
        """
        paths, self._number = self.paths(), None
        for number, path in enumerate(paths):
            if path.stem.partition("-")[0] != f"{number:07d}" or not _is_whole(path):
                logger.warning("%s is damaged. This part and all that follow it are computed again.", path)
                for later in paths[number:]:
                    later.unlink()
                return number
        return len(paths)

    def tables(self) -> Iterator[pa.Table]:
        """The parts, one at a time."""
        return map(read_part, self.paths())

    def add(self, table: pa.Table) -> None:
        """Add a part. It is on disk when this returns.

        Raises:
            OSError: the part cannot be written.
        """
        if self._number is None:
            self._number = len(self.paths())
        write_part(table, self.folder, f"{self._number:07d}")
        self._number += 1

    def take(self, other: Parts) -> None:
        """Move the parts of another folder to the end of these. The last one is moved first, so that after an
        interruption the other folder still begins with its first part.

        Raises:
            OSError: a part cannot be moved.
        """
        number, self._number = len(self.paths()), None
        for path in reversed(other.paths()):
            path.rename(self.folder / f"{number:07d}-{path.name.partition('-')[2]}")
            number += 1

    def remove(self) -> None:
        """Delete the folder with everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._number = None


def write_part(table: pa.Table, folder: Path, name: str) -> Path:
    """Write a table as `NAME-HASH.parquet`, with the hash of its content. The file is there completely or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, compression="zstd", use_dictionary=_repeating(table.schema))
    content = stream.getvalue().to_pybytes()
    path = folder / f"{name}-{hash_of(content)}.parquet"
    write_atomically(path, content)
    return path


def read_part(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a file that `write_part` wrote, in this thread: other threads would not give their memory back.

    Raises:
        ValueError: the file is damaged.
    """
    content = path.read_bytes()
    if path.stem.rpartition("-")[2] != hash_of(content):
        raise ValueError(f"{path} is damaged: its content does not match the hash in its name.")
    with pq.ParquetFile(pa.BufferReader(content)) as file:
        return file.read(columns, use_threads=False)


def _repeating(schema: pa.Schema) -> bool | list[str]:
    """Columns for which a dictionary of the values pays. Of scores and sample numbers it would hold every value: with
    millions of them, writing takes twice as long."""
    if any(pa.types.is_nested(field.type) for field in schema):
        return True
    many = pa.types.is_floating, pa.types.is_int64, pa.types.is_uint64
    return [field.name for field in schema if not any(is_one(field.type) for is_one in many)]


def _is_whole(path: Path) -> bool:
    try:
        read_part(path)
    except ValueError:
        return False
    return True
