"""Hashes of the content of files, which identify files independently of their names.

Files are read in large pieces by several threads. `content_hashes` (BLAKE2, about 1 GB/s a thread) identifies contents,
and keeps the hash of a file in the user's cache folder with the file's size, times and inode, so that an unchanged file
is not read twice. `quick_hashes` (XXH3, as fast as memory) finds damage, and reads every time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from distill_sampler.serialize import hash_of, write_atomically

PIECE = 1 << 26
"""Bytes that one thread hashes at a time. A file's hash is that of its pieces' hashes, so one large file keeps all
threads busy."""
_BLOCK = 1 << 20
_REMEMBERED = 1 << 20
"""Smaller files are read again: that takes no longer than looking them up."""
_SETTLED = 2.0
"""Seconds after which a file's times tell of every later change; one that was written just now may be written again
within the same tick of the clock."""


def cache_folder() -> Path:
    """The user's folder for what can be made again: `DISTILL_SAMPLER_CACHE`, or `~/.cache/distill_sampler`.

    Raises:
        RuntimeError: there is no home directory.
    """
    return Path(os.environ.get("DISTILL_SAMPLER_CACHE") or Path.home() / ".cache" / "distill_sampler")


def content_hashes(files: Sequence[Path]) -> list[str]:
    """For each file 32 hex digits of its content.

    Raises:
        OSError: a file cannot be read.
    """
    files = [file.resolve() for file in files]
    before = {file: file.stat() for file in files}
    found = {file: known for file, state in before.items() if (known := _recalled(file, state))}
    unread = [file for file in before if file not in found]
    for file, content in zip(unread, _hashes(unread, _blake2b, threads=_all_cores()), strict=True):
        found[file] = content
        if _stamp(file.stat()) == _stamp(before[file]):
            _remember(file, before[file], content)
    return [found[file] for file in files]


def quick_hashes(files: Sequence[Path], *, threads: int | None = None) -> list[str]:
    """For each file 32 hex digits of its content (XXH3), which any damage changes. Whoever wants to can make another
    content with the same hash, so it does not identify a content.

    Args:
        files: the files.
        threads: that read at a time; None: one more than there are cores.

    Raises:
        OSError: a file cannot be read.
    """
    return _hashes(files, xxhash.xxh3_128, threads=threads or _all_cores())


def _all_cores() -> int:
    return min(16, (os.cpu_count() or 1) + 1)


def _blake2b() -> Any:
    return hashlib.blake2b(digest_size=16)


def _hashes(files: Sequence[Path], new: Callable[[], Any], *, threads: int) -> list[str]:
    """For each file the hash of its pieces' hashes. `new` makes an empty hash."""
    pieces = [(file, start) for file in files for start in range(0, max(file.stat().st_size, 1), PIECE)]
    whole = {file: new() for file in files}
    with ThreadPoolExecutor(threads) as pool:
        digests = pool.map(lambda piece: _piece(piece, new()), pieces)
        for (file, _), digest in zip(pieces, digests, strict=True):
            whole[file].update(digest)
    return [whole[file].hexdigest() for file in files]


def _piece(piece: tuple[Path, int], digest: Any) -> bytes:
    file, start = piece
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        left = PIECE
        while left and (block := stream.read(min(_BLOCK, left))):
            digest.update(block)
            left -= len(block)
    return bytes(digest.digest())


# ---- What was found before ----


def _stamp(state: os.stat_result) -> list[int]:
    """What changes with a file's content. The time of the last change of its state cannot be set back, as that of its
    content can (`cp -p`, `rsync -t`)."""
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev]


def _entry(file: Path) -> Path:
    return cache_folder() / "content" / f"{hash_of(os.fsencode(file))}.json"


def _recalled(file: Path, state: os.stat_result) -> str | None:
    if state.st_size < _REMEMBERED:
        return None
    try:
        kept = json.loads(_entry(file).read_text(encoding="utf-8"))
        return str(kept["content"]) if kept["file"] == os.fspath(file) and kept["stamp"] == _stamp(state) else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None  # nothing is kept, or somebody else's file lies there


def _remember(file: Path, state: os.stat_result, content: str) -> None:
    if state.st_size < _REMEMBERED or time.time() - state.st_mtime < _SETTLED:
        return
    try:
        entry = _entry(file)
        entry.parent.mkdir(parents=True, exist_ok=True)
        kept = {"file": os.fspath(file), "stamp": _stamp(state), "content": content}
        write_atomically(entry, json.dumps(kept).encode())
    except (OSError, RuntimeError, UnicodeError):
        pass  # no cache folder can be written, or another process was faster: the file is read again
