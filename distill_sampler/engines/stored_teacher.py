"""Reads a teacher's log-probabilities from a store on disk, by key or by text, and aligns them with a response's text.

The teacher reads the data once (`distill-sampler teacher-logprobs`). The store is then memory-mapped: a process keeps
an index of 16 bytes a row in memory, and none of the log-probabilities.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from distill_sampler.engines.alignment import Aligned, overlap
from distill_sampler.engines.writing import KIND, VERSION, key_hash, text_hash
from distill_sampler.serialize import decode_facts, digest
from distill_sampler.types import HashArray, IntArray

logger = logging.getLogger(__name__)

_IDENTITY = (
    "content",
    "model",
    "weights",
    "numerics",
    "temperature",
    "processed",
    "template",
    "system_prompt",
    "top_k",
)
"""The facts that determine the log-probabilities."""


class StoredTeacher:
    """A store of a teacher's log-probabilities.

    Args:
        path: a file that `distill-sampler teacher-logprobs` wrote.
        min_coverage: the share of a response's bytes that the teacher's tokens must cover, from 0 to 1. `find` returns
            None for a response with a smaller share. None: the value with which the store was made.

    Raises:
        ValueError: the file is not a store, is damaged or has another version, or `min_coverage` is not from 0 to 1.
    """

    def __init__(self, path: str | Path, *, min_coverage: float | None = None) -> None:
        if min_coverage is not None and not 0 <= min_coverage <= 1:
            raise ValueError(f"min_coverage={min_coverage}: give a share from 0 to 1, such as 0.9.")
        self.path = Path(path)
        self._file = _opened(self.path)
        self.facts: Mapping[str, Any] = decode_facts(self._file.schema.metadata)
        """How the numbers were made: `model`, `revision`, `numerics`, `temperature`, `processed`, `template`, …"""
        if self.facts.get("kind") != KIND:
            raise ValueError(
                f"{path} is not a store of a teacher's log-probabilities. Make one with distill-sampler "
                "teacher-logprobs."
            )
        if self.facts.get("schema") != VERSION:
            raise ValueError(
                f"{path} is a store of version {self.facts.get('schema')}, but this distill_sampler reads version "
                f"{VERSION}. Make the store again with distill-sampler teacher-logprobs, or use the release of "
                "distill_sampler that wrote it."
            )
        self.min_coverage = float(self.facts.get("min_coverage", 0.9) if min_coverage is None else min_coverage)
        self.top_k = int(self.facts["top_k"])
        """How many of the most probable tokens are stored at each position; 0: none."""
        self.key_column: str | None = self.facts.get("key_column")
        """The column of the data set whose values are the keys of the rows; None: rows are found by their text."""
        self._said: set[str] = set()
        if self.facts.get("processed"):
            self._say(
                "processed",
                "The log-probabilities in %s were recorded after processing (temperature %s), so they differ from the "
                "model's own. Compare them only with numbers that were processed in the same way.",
                path,
                self.facts.get("temperature"),
            )

    @cached_property
    def identity(self) -> str:
        """The model's name, and a hash of the log-probabilities and of how they were made. The path has no effect."""
        told = {name: self.facts.get(name) for name in _IDENTITY}
        return f"stored {self.facts.get('model', 'teacher')} {digest(told)}"

    def __repr__(self) -> str:
        return f"<{self.identity}, min_coverage={self.min_coverage}>"

    def __reduce__(self) -> Any:
        return _again, (self.path, self.min_coverage)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def find(self, text: str, key: object = None) -> Aligned | None:
        """The teacher's log-probabilities for a response.

        Args:
            text: the response's text. With a key, the text may be truncated or trimmed.
            key: the value of `key_column`. None: the row is found by its text, ignoring white space.

        Returns:
            The log-probabilities, with each token's position in `text`. None: the store does not have the response, or
            its tokens cover less than `min_coverage` of the text. The first time, a warning is logged.

        Raises:
            ValueError: a key is given but the store has no keys, or the store has the text several times with different
                log-probabilities.
        """
        row = self._by_text(text) if key is None else self._by_key(str(key))
        if row is None:
            how = "by its text" if key is None else f"by {self.key_column} = {key!r}"
            cure = (
                " Only whole texts can be found. A store that is made with --key-column also finds truncated ones."
                if key is None
                else ""
            )
            self._say(
                "missing", "%s has no log-probabilities for a response (%s: %.60r).%s", self.path, how, text, cure
            )
            return None
        found = self._aligned(row, text)
        if found.coverage < self.min_coverage or not len(found.begins):
            self._say(
                "coverage",
                "The tokens in %s cover %.1f %% of a response's text (%.60r), less than min_coverage=%s, so they are "
                "not used. If the store was made from other data, make it again from this data. Otherwise lower "
                "min_coverage.",
                self.path,
                100 * found.coverage,
                text,
                self.min_coverage,
            )
            return None
        return found

    # ---- Rows ----

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        return [self._file.get_batch(number) for number in range(self._file.num_record_batches)]

    @cached_property
    def _starts(self) -> IntArray:
        starts: IntArray = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        return starts

    @cached_property
    def _index(self) -> dict[str, tuple[HashArray, IntArray]]:
        """For each column of hashes, the sorted hashes and their rows. A column is added at its first search."""
        return {}

    def _rows(self, column: Literal["key_hash", "text_hash"], value: int) -> list[int]:
        if column not in self._index:
            every = np.concatenate([np.zeros(0, np.uint64), *(_numpy(batch[column]) for batch in self._batches)])
            order = np.argsort(every, kind="stable")
            self._index[column] = every[order], order
        hashes, order = self._index[column]
        first, last = (
            np.searchsorted(hashes, np.uint64(value), "left"),
            np.searchsorted(hashes, np.uint64(value), "right"),
        )
        rows: list[int] = order[first:last].tolist()
        return rows

    def _value(self, row: int, column: str) -> Any:
        """One value of a row: an Arrow scalar in the memory-mapped file."""
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[batch][column][row - int(self._starts[batch])]

    def _numbers(self, row: int, column: str) -> Any:
        return _numpy(self._value(row, column).values)

    def _by_key(self, key: str) -> int | None:
        if self.key_column is None:
            raise ValueError(
                f"{self.path} was made without --key-column, so it has no key {key!r}. Find the response by its text "
                "alone, or make the store again with --key-column."
            )
        rows = (row for row in self._rows("key_hash", key_hash(key)) if self._value(row, "key").as_py() == key)
        return next(rows, None)

    def _by_text(self, text: str) -> int | None:
        same = "".join(text.split())
        rows = [
            row
            for row in self._rows("text_hash", text_hash(text))
            if "".join(self._value(row, "text").as_py().split()) == same
        ]
        if not rows:
            return None
        contents = {self._value(row, "content_hash").as_py(): row for row in rows}
        first, *others = contents.values()
        for other in others:
            if not np.array_equal(self._numbers(first, "logprobs"), self._numbers(other, "logprobs")):
                raise ValueError(
                    f"{self.path} holds the response {text[:60]!r} {len(contents)} times with different "
                    "log-probabilities, because it answers different prompts. Make the store again with --key-column "
                    "and a column whose values identify the samples, and keep that column in the data set."
                )
        return rows[0]

    def _aligned(self, row: int, text: str) -> Aligned:
        stored = self._value(row, "text").as_buffer().to_pybytes()
        begins = self._numbers(row, "begins").astype(np.int64)
        logprobs, ids = self._numbers(row, "logprobs"), self._numbers(row, "token_ids")
        top: tuple[Any, Any] = (None, None)
        if self.top_k:
            top = tuple(self._numbers(row, name).reshape(-1, self.top_k) for name in ("top_ids", "top_logprobs"))
        share = 1.0
        kept: Any = slice(None)
        given = text.encode()
        if given != stored:
            begins, share = overlap(begins, stored, given)
            kept = np.flatnonzero(begins >= 0)
        return Aligned(
            begins=begins[kept],
            surprisal=-logprobs[kept],
            token_ids=ids[kept].astype(np.int64) if len(ids) else ids.astype(np.int64),
            coverage=share * float(self._value(row, "coverage").as_py()),
            top_ids=None if top[0] is None or not len(top[0]) else top[0][kept].astype(np.int64),
            top_logprobs=None if top[1] is None or not len(top[1]) else top[1][kept].astype(np.float32),
        )

    def _say(self, what: str, message: str, *told: object) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning(message, *told)


def _numpy(array: pa.Array) -> Any:
    """A NumPy view of an array of numbers, without a copy. (Arrow's own conversion imports pandas first.)"""
    if not len(array):
        return np.zeros(0, array.type.to_pandas_dtype())
    return np.frombuffer(array.buffers()[1], array.type.to_pandas_dtype())[array.offset : array.offset + len(array)]


def _again(path: Path, min_coverage: float) -> StoredTeacher:
    return StoredTeacher(path, min_coverage=min_coverage)


def _opened(path: Path) -> pa.ipc.RecordBatchFileReader:
    if not path.is_file():
        raise ValueError(f"There is no store of a teacher's log-probabilities at {path}; check the path.")
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a store of a teacher's log-probabilities ({str(error).splitlines()[0]}). Make "
            "it with distill-sampler teacher-logprobs."
        ) from None
