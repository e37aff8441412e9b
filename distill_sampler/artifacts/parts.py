"""Work that is kept piece by piece: a folder of tables, each written aside and renamed, so that a kill costs one piece.

`identity.json` says what the pieces belong to. The command line keeps the chunks of a data set this way, a curriculum the
blocks of a scoring pass. Pieces carry checksums: one that was damaged later is dropped with all that follow it, and made
again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_sampler.serialize import write_aside

logger = logging.getLogger(__name__)

_IDENTITY = "identity.json"


class Parts:
    """The pieces in a folder, in the order in which they were added.

    Args:
        folder: where they lie. It need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def identity(self) -> dict[str, Any] | None:
        """What the pieces belong to; None if there are none, or nobody can tell."""
        try:
            found = json.loads((self.folder / _IDENTITY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Throw away what is there, and start with pieces of something else.

        Raises:
            OSError: the folder cannot be written.
        """
        self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_aside(self.folder / _IDENTITY, json.dumps(identity, indent=1).encode())

    def paths(self) -> list[Path]:
        """The files of the pieces."""
        return sorted(self.folder.glob("[0-9]*.parquet"))

    def check(self) -> int:
        """Drop a damaged piece and all that follow it. Gives the number of whole ones.

        Raises:
            OSError: a piece cannot be removed.
        """
        paths = self.paths()
        for number, path in enumerate(paths):
            if path.stem != f"{number:07d}" or not _is_whole(path):
                logger.warning("%s is damaged; what it held, and what came after it, is done again.", path)
                for later in paths[number:]:
                    later.unlink()
                return number
        return len(paths)

    def tables(self) -> Iterator[pa.Table]:
        """The pieces, one at a time."""
        return map(read_part, self.paths())

    def add(self, table: pa.Table) -> None:
        """Keep a piece. It is on the disk when this returns.

        Raises:
            OSError: it cannot be written.
        """
        write_part(table, self.folder / f"{len(self.paths()):07d}.parquet")

    def take(self, other: Parts) -> None:
        """Move another folder's pieces behind these: the last one first, so that those an interruption leaves behind
        are still the first ones.

        Raises:
            OSError: a piece cannot be moved.
        """
        number = len(self.paths())
        for path in reversed(other.paths()):
            path.rename(self.folder / f"{number:07d}.parquet")
            number += 1

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_part(table: pa.Table, path: Path) -> None:
    """A table as a file that is whole or not there, with a checksum of every page."""
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def read_part(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A file that `write_part` wrote, in this thread: others would keep their memory with the process.

    Raises:
        OSError, pyarrow.ArrowException: it is damaged.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns, use_threads=False)


def _is_whole(path: Path) -> bool:
    try:
        read_part(path)
    except (OSError, pa.ArrowException):
        return False
    return True
