"""A checkpoint's manifest: the name, size and hash of every file, so that damage is found before anything is loaded.

    CHECKPOINT/distill_sampler_manifest.json

Weights, optimizers and random states with a flipped bit load without an error, and training goes on with wrong numbers.
So after each save, a thread reads every file of the checkpoint once more while training goes on. It hashes them with
XXH3, usually from the operating system's page cache, and writes the manifest last. A checkpoint has no manifest if an
older version saved it, or if the run was killed before the thread finished.

Files that are added later are not in the manifest and are not checked. If you change a file on purpose, it no longer
matches: delete the manifest.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from distill_sampler.content import quick_hashes
from distill_sampler.distributed import Ranks
from distill_sampler.serialize import digest, write_atomically

logger = logging.getLogger(__name__)

MANIFEST = "distill_sampler_manifest.json"
FORMAT = 1
_THREADS = 4
"""Number of threads that hash during training, which needs the other cores."""
_ATTEMPTS = 3


def write_manifest(checkpoint: Path, *, threads: int | None = None, beside: bool = True) -> None:
    """Write the manifest of a folder whose files are complete.

    Args:
        checkpoint: the folder, with all files in it and below it.
        threads: number of threads that hash files; None: one more than there are cores.
        beside: write the manifest next to the folder, under a name that a trainer never uploads, and move it into the
            folder when it is complete, because the folder may be uploaded meanwhile. False: write it in the folder.

    Raises:
        OSError: a file cannot be read, or the manifest cannot be written.
        ValueError: the files keep changing while they are read.
    """
    for _ in range(_ATTEMPTS):
        before = _stamps(checkpoint)
        hashes = quick_hashes([checkpoint / name for name in before], threads=threads)
        if _stamps(checkpoint) == before:
            break
    else:
        raise ValueError(f"the files in {checkpoint} keep changing")
    files = {name: {"size": before[name][0], "hash": found} for name, found in zip(before, hashes, strict=True)}
    manifest: dict[str, Any] = {"format": FORMAT, "files": files}
    manifest["digest"] = digest(manifest)
    content = json.dumps(manifest, indent=1).encode()
    if not beside:
        write_atomically(checkpoint / MANIFEST, content)
        return
    unfinished = checkpoint.parent / f"_{MANIFEST}"
    write_atomically(unfinished, content)
    try:
        unfinished.rename(checkpoint / MANIFEST)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def damage(checkpoint: Path, readers: Ranks | None = None) -> str:
    """How a checkpoint differs from its manifest, as the end of a sentence. Empty if it matches or has no manifest.

    Args:
        checkpoint: the folder.
        readers: the processes that read the checkpoint together. Each checks its share of the files. None: this process
            checks all files.

    Raises:
        OSError: a file exists but cannot be read.
    """
    try:
        files = _read(checkpoint / MANIFEST)
    except FileNotFoundError:
        return ""
    except ValueError:
        return f"its {MANIFEST} is damaged"
    names = sorted(files)
    own = (readers or Ranks()).share(np.array([files[name]["size"] for name in names], np.int64))
    names = [names[place] for place in own.tolist()]
    for name in names:
        if not (checkpoint / name).is_file():
            return f"its {name} is missing"
        if (size := (checkpoint / name).stat().st_size) != files[name]["size"]:
            return f"its {name} has {size} bytes and was saved with {files[name]['size']}"
    for name, found in zip(names, quick_hashes([checkpoint / name for name in names]), strict=True):
        if found != files[name]["hash"]:
            return f"the content of its {name} is not what was saved (if you changed it, delete its {MANIFEST})"
    return ""


def _read(path: Path) -> Mapping[str, Any]:
    """The entries of a manifest.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: the manifest is damaged.
    """
    manifest = json.loads(path.read_bytes())
    if not isinstance(manifest, dict) or manifest.get("digest") != digest(manifest):
        raise ValueError("the content does not match the digest")
    if manifest["format"] != FORMAT:
        logger.warning("%s was written by another version of distill_sampler, so the files are not checked.", path)
        return {}
    return dict(manifest["files"])


def _stamps(checkpoint: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file in a folder and its subfolders, except the manifest, by name."""
    found = {}
    for folder, _, names in os.walk(checkpoint):
        for path in (Path(folder, name) for name in names):
            state = path.stat()
            found[path.relative_to(checkpoint).as_posix()] = (state.st_size, state.st_mtime_ns)
    return {name: found[name] for name in sorted(found) if not name.startswith(MANIFEST)}


class Manifests:
    """Writes the manifests of a run's checkpoints in a thread while training goes on.

    All processes call the methods at the same points of the run.

    Args:
        write: whether this process writes the manifests.
        beside: see `write_manifest`.
    """

    def __init__(self, *, write: bool, beside: bool = True) -> None:
        self._write = write
        self._beside = beside
        self._saved: Path | None = None
        """The last checkpoint, until the writing of its manifest begins."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="manifest")
        self._writing: Future[None] | None = None

    def saving(self, checkpoint: Path, ranks: Ranks) -> None:
        """Call before a checkpoint is written. Removes an old manifest from its folder.

        Waits until the manifest of the previous checkpoint is written, because writing it changes the folder's
        modification time, and the trainer deletes the checkpoints with the oldest ones.
        """
        self.begin(ranks)
        self.wait()
        if self._write:
            (checkpoint / MANIFEST).unlink(missing_ok=True)

    def saved(self, checkpoint: Path) -> None:
        """Call when this process has written its files of a checkpoint. Callbacks may still add or remove files."""
        self._saved = checkpoint

    def begin(self, ranks: Ranks) -> None:
        """Begin to write the manifest of the last saved checkpoint, if that has not begun yet."""
        if self._saved is None:
            return
        checkpoint, self._saved = self._saved, None
        ranks.max_over_ranks(0)  # all processes have written their files
        if self._write:
            self._writing = self._thread.submit(_write_or_say, checkpoint, self._beside)

    def wait(self) -> None:
        """Wait until the manifest that was begun is written."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None


def _write_or_say(checkpoint: Path, beside: bool) -> None:
    try:
        write_manifest(checkpoint, threads=_THREADS, beside=beside)
    except (OSError, ValueError) as error:
        if checkpoint.is_dir():  # else it was deleted meanwhile
            logger.warning(
                "%s gets no manifest (%s). A resume from it will not notice a few damaged bytes.", checkpoint, error
            )
