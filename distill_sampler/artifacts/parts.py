"""What an interrupted scoring pass has left on disk: the blocks it had done, so that only the rest is read again.

A text file of one line for each block, `<hash> <json>`, appended and synced as the block is done; the first line says
which pass it is. A line that a kill cut off, or that was damaged, does not have its hash: it and what follows are
dropped and scored again. A journal of another pass is overwritten.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from distill_sampler.store import pack, unpack
from distill_sampler.types import FloatArray, IntArray

logger = logging.getLogger(__name__)


class Journal:
    """The journal of one pass, open for more. Use it in a `with` statement.

    Where it cannot be written (a full disk, a read-only folder) scoring goes on without one, which is said once.

    Args:
        path: the file; None: keep nothing.
        identity: which pass this is, as plain JSON values.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self.found: list[tuple[IntArray, dict[str, FloatArray]]] = []
        """The blocks that are there already: `[n]` samples, and `[n]` numbers for each column."""
        self._path = path
        self._file: int | None = None
        if path is None:
            return
        head = json.loads(json.dumps(identity))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            lines, size = _whole_lines(path.read_bytes())
            if lines[:1] == [head]:
                for line in lines[1:]:
                    columns = {name: unpack(packed) for name, packed in line["columns"].items()}
                    self.found.append((unpack(line["samples"]).astype(np.int64), columns))
                if size < path.stat().st_size:
                    logger.warning("%s ends in the middle of a block; it is scored again from there.", path)
            else:
                size = 0
            os.ftruncate(self._file, size)
            os.lseek(self._file, size, os.SEEK_SET)
            if size == 0:
                self._write(head)
        except OSError as error:
            self._give_up(error)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def append(self, indices: IntArray, columns: Mapping[str, FloatArray]) -> None:
        """Keep a block. It is on the disk when this returns."""
        if self._file is None:
            return
        try:
            self._write({"samples": pack(indices), "columns": {name: pack(values) for name, values in columns.items()}})
        except OSError as error:
            self._give_up(error)

    def _write(self, content: Mapping[str, Any]) -> None:
        assert self._file is not None
        text = json.dumps(content).encode()
        line = _hash(text) + b" " + text + b"\n"
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)

    def _give_up(self, error: OSError) -> None:
        logger.warning(
            "Scores cannot be kept while they are computed (%s). Scoring goes on; an interruption would cost the "
            "whole pass. Make %s writable to keep them.",
            error,
            self._path,
        )
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def weights_identity(model: nn.Module) -> str:
    """16 hex digits that tell a student from the same one after a training step: of 16 weights of each parameter.

    Of a sharded student, those that this process holds.
    """
    found = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        local = parameter.detach()
        flat = (local.to_local() if hasattr(local, "to_local") else local).reshape(-1)
        places = torch.arange(16, device=flat.device) * max(len(flat) - 1, 0) // 15
        found.update(name.encode())
        found.update(flat[places].float().cpu().numpy().tobytes() if len(flat) else b"")
    return found.hexdigest()


def _whole_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines up to the first that is cut off or damaged, and how many bytes they take."""
    lines, size = [], 0
    for line in content.splitlines(keepends=True):
        check, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or check != _hash(text):
            break
        lines.append(json.loads(text))
        size += len(line)
    return lines, size


def _hash(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=8).hexdigest().encode()
