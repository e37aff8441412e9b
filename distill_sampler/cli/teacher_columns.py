"""A teacher's log-probabilities from columns that were written when the responses were generated."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill_sampler.cli.teacher_sources import aligned_row, key_of
from distill_sampler.engines.token_bytes import token_bytes
from distill_sampler.engines.writing import StoredRow, key_hash
from distill_sampler.serialize import decode_facts, encode_facts
from distill_sampler.sources.candidates import Candidate
from distill_sampler.sources.files import Bad, Sources
from distill_sampler.types import BoolArray, FloatArray, HashArray, IntArray

_SPECIAL = re.compile(r"<\|.*\|>|</?s>|<(bos|eos|pad|start_of_turn|end_of_turn)>")
"""Texts of special tokens, where tokens are given as text and no tokenizer tells."""
_ROUNDING = 1e-3
"""A log-probability above 0 by no more than this is 0, rounded."""
_ROWS = 256
"""Rows that are copied together."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns with a teacher's numbers."""

    logprobs: str
    tokens: str | None = None
    """Token ids, or the tokens' texts. None: the response's text is tokenised."""
    key: str | None = None

    @property
    def names(self) -> list[str]:
        """The columns that are read beside the response."""
        return [name for name in (self.key, self.tokens, self.logprobs) if name is not None]


class FromColumns:
    """Takes the numbers that were written when the responses were generated.

    Args:
        columns: the columns.
        tokenizer: the teacher's; None where tokens are given as text.
        beside: numbers in other files, joined by key; None: they are in the data itself.
    """

    def __init__(self, columns: Columns, tokenizer: Any, beside: LogprobFiles | None) -> None:
        self._columns = columns
        self._tokenizer = tokenizer
        self._beside = beside

    @property
    def known_by_content(self) -> bool:
        return True

    def misfit(self, candidate: Candidate) -> str | None:
        if candidate.messages:
            return None
        return "nothing says which part of it is the response. Give prompt and response as columns, or as messages"

    def rows(self, candidates: Sequence[Candidate], advance: Callable[[float], None]) -> list[StoredRow | str]:
        found: list[StoredRow | str] = []
        for number, candidate in enumerate(candidates, 1):
            try:
                found.append(self._row(candidate))
            except ValueError as error:
                found.append(str(error))
            advance(number / len(candidates))
        return found

    def notes(self) -> list[tuple[int, str]]:
        if self._beside is None:
            return []
        return [(self._beside.unused, "rows of --logprobs-file whose key no row of the data has")]

    def _row(self, candidate: Candidate) -> StoredRow:
        if self._beside is None:
            columns = self._columns
            given = candidate.read[columns.tokens] if columns.tokens else None
            tokens, logprobs = numbers_of(given, candidate.read[columns.logprobs])
        else:
            tokens, logprobs = self._beside.find(key_of(candidate, self._columns.key) or "")
        text = response_of(candidate)
        if tokens is None:
            ids = np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
            if len(logprobs) == len(ids) + 1:  # the end of the turn
                logprobs = logprobs[:-1]
            if len(logprobs) != len(ids):
                raise ValueError(
                    f"its text has {len(ids)} tokens in the teacher's tokenizer, but there are {len(logprobs)} "
                    "log-probabilities; name the column with the token ids (--tokens-column)"
                )
            tokens = ids
        if isinstance(tokens, np.ndarray):
            known = token_bytes(self._tokenizer)
            pieces, apart = known(tokens), known.apart(tokens)
            return aligned_row(candidate, text, tokens, pieces, apart, -logprobs, key=self._columns.key)
        apart = np.array([bool(_SPECIAL.fullmatch(token)) for token in tokens], bool)
        pieces = [token.encode() for token in tokens]
        return aligned_row(candidate, text, None, pieces, apart, -logprobs, key=self._columns.key)


def response_of(candidate: Candidate) -> str:
    """The text of a response as it stands in the data: what the assistant says, end to end."""
    said = candidate.messages[candidate.first :]
    return "".join(str(message["content"]) for message in said if message["role"] == "assistant")


def numbers_of(tokens: Any, logprobs: Any) -> tuple[IntArray | list[str] | None, FloatArray]:
    """A row's tokens and log-probabilities, checked.

    Args:
        tokens: token ids, or the tokens' texts; None: not given.
        logprobs: a number for each.

    Raises:
        ValueError: they are no such lists, their lengths differ, or a number is no log-probability.
    """
    try:
        values = np.array([np.nan if value is None else value for value in logprobs], np.float64)
    except (TypeError, ValueError):
        raise ValueError("its log-probabilities are no list of numbers; check --logprobs-column") from None
    if tokens is not None:
        if isinstance(tokens, str) or not hasattr(tokens, "__len__"):
            raise ValueError("its tokens are no list; check --tokens-column")
        if len(tokens) != len(values):
            raise ValueError(
                f"it has {len(tokens)} tokens, but {len(values)} log-probabilities; each token needs one (of a model "
                "that wrote some for the prompt too, keep those of the response)"
            )
    if values.ndim != 1 or not len(values):
        raise ValueError("it has no log-probabilities; check --logprobs-column")
    if np.isnan(values).any():
        raise ValueError(f"log-probability {int(np.isnan(values).argmax())} is NaN or missing")
    if (values > _ROUNDING).any():
        first = int((values > _ROUNDING).argmax())
        raise ValueError(
            f"log-probability {first} is {values[first]:.4g}, but none is above 0; if the column holds surprisals or "
            "probabilities, write log-probabilities (natural logarithm)"
        )
    if np.isinf(values).any():
        raise ValueError(
            f"log-probability {int(np.isinf(values).argmax())} is infinite: the numbers were cut to the likeliest "
            "tokens (processed); write them before top-k and top-p"
        )
    values = np.minimum(values, 0)
    if tokens is None:
        return None, values
    if all(isinstance(token, str) for token in tokens):
        return list(tokens), values
    try:
        ids = np.array(tokens)
        assert ids.dtype.kind in "iu"
    except (AssertionError, TypeError, ValueError):
        raise ValueError("its tokens are neither token ids nor texts; check --tokens-column") from None
    return ids.astype(np.int64), values


@dataclass(kw_only=True, eq=False)
class LogprobFiles:
    """A teacher's numbers in files of their own, found by key. They are copied once into a file that is memory-mapped,
    so that they may be in any order and of any size.

    Raises:
        ValueError: a key is missing or stands twice, or a row cannot be used.
    """

    sources: Sources
    """The files."""
    columns: Columns
    """Their columns."""
    copy: Path
    """Where the copy lies while the store is made."""
    say: Callable[[str], None]
    """Tells the user."""
    used: set[int] = field(default_factory=set)
    """Rows that were joined."""

    def __post_init__(self) -> None:
        told = {"contents": self.sources.contents(), "columns": self.columns.names}
        if self._facts() != encode_facts(told):
            self.say("Copying the log-probabilities, to find them by key ...")
            self._write(told)
        file = pa.ipc.open_file(pa.memory_map(str(self.copy)))
        self._batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        self._starts: IntArray = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        every = np.concatenate([np.zeros(0, np.uint64), *(batch["key_hash"].to_numpy() for batch in self._batches)])
        self._order = np.argsort(every, kind="stable")
        self._hashes: HashArray = every[self._order]
        for twice in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]).tolist():
            one, other = (self._value(int(self._order[at]), "key").as_py() for at in (twice, twice + 1))
            if one == other:
                raise ValueError(
                    f"The key {one!r} ({self.columns.key}) stands twice in --logprobs-file, so it does not tell which "
                    "numbers belong to a sample. Name a column that does with --key-column, or remove the repeated "
                    "rows."
                )

    @property
    def unused(self) -> int:
        """Rows that nothing was joined with."""
        return int(self._starts[-1]) - len(self.used)

    def has(self, hashes: HashArray) -> BoolArray:
        """`[n]` whether there are numbers for keys of these hashes."""
        found: BoolArray = np.isin(hashes, self._hashes)
        return found

    def find(self, key: str) -> tuple[IntArray | list[str] | None, FloatArray]:
        """The tokens and log-probabilities of a sample.

        Raises:
            ValueError: there are none, or they cannot be used.
        """
        value = np.uint64(key_hash(key))
        first, last = (int(np.searchsorted(self._hashes, value, side)) for side in ("left", "right"))
        for row in self._order[first:last].tolist():
            if self._value(row, "key").as_py() == key:
                self.used.add(row)
                problem = self._value(row, "problem").as_py()
                if problem:
                    raise ValueError(problem)
                texts = self._value(row, "texts").as_py()
                ids = self._value(row, "ids")
                logprobs = self._value(row, "logprobs").values.to_numpy()
                return texts if texts is not None else ids.values.to_numpy() if ids.is_valid else None, logprobs
        raise ValueError(f"--logprobs-file has no row with {self.columns.key} = {key!r}")

    def _value(self, row: int, column: str) -> Any:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[batch][column][row - int(self._starts[batch])]

    def _facts(self) -> Mapping[bytes, bytes] | None:
        try:
            with pa.memory_map(str(self.copy)) as file:
                return encode_facts(decode_facts(pa.ipc.open_file(file).schema.metadata))
        except (OSError, pa.ArrowException):
            return None

    def _write(self, told: Mapping[str, Any]) -> None:
        fields = [("key", pa.string()), ("key_hash", pa.uint64()), ("problem", pa.string())]
        fields += [
            ("texts", pa.list_(pa.string())),
            ("ids", pa.list_(pa.int64())),
            ("logprobs", pa.list_(pa.float64())),
        ]
        described = pa.schema(fields, metadata=encode_facts(told))
        unfinished = self.copy.with_name(self.copy.name + ".unfinished")
        with pa.ipc.new_file(str(unfinished), described) as writer:
            waiting: list[dict[str, Any]] = []
            for row in self.sources:
                if isinstance(row, Bad):
                    raise ValueError(f"{row.where}: {row.reason}. Correct the row of --logprobs-file.")
                waiting.append(self._copied(row.where, row.values))
                if len(waiting) >= _ROWS:
                    writer.write_table(pa.Table.from_pylist(waiting, schema=described))
                    waiting = []
            writer.write_table(pa.Table.from_pylist(waiting, schema=described))
        unfinished.rename(self.copy)

    def _copied(self, where: str, values: Mapping[str, Any]) -> dict[str, Any]:
        assert self.columns.key is not None
        for name in self.columns.names:
            if name not in values:
                raise ValueError(
                    f"{where}: --logprobs-file has no column '{name}' (only {', '.join(map(repr, values))}). Name its "
                    "columns with --key-column, --tokens-column and --logprobs-column."
                )
        key = str(values[self.columns.key])
        found: dict[str, Any] = {"key": key, "key_hash": key_hash(key)}
        try:
            tokens, logprobs = numbers_of(
                values[self.columns.tokens] if self.columns.tokens else None, values[self.columns.logprobs]
            )
        except ValueError as error:
            return {**found, "problem": f"{where}: {error}"}
        return {**found, "logprobs": logprobs, ("texts" if isinstance(tokens, list) else "ids"): tokens}
