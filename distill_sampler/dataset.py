"""Identity of samples: which tokens are response, which rows belong together, and a hash of the content.

`ScoredDataset` wraps the *prepared* data set, after tokenisation, truncation and filtering, so its indices are the
trainer's own. It changes nothing: `scored_dataset[i]` is the row that the trainer would get.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch.utils.data

from distill_sampler.hashing import splitmix64
from distill_sampler.serialize import hash_of
from distill_sampler.types import BoolArray, EncodedColumn, HashArray, IntArray, Sample, unknown_name

IGNORED_LABEL = -100
"""Label of tokens that are not trained on, as everywhere in PyTorch."""

TEMPLATE_TAIL = 2
"""Chat templates write at most this many tokens after the end-of-turn marker (ChatML: one newline)."""

_ROWS = 4096
"""Rows that are read at a time."""

_LONGEST_TEXT = 200
"""Longest text, in characters, that may identify a row. Longer ones are prompts and responses."""


class Rows(Protocol):
    """A map-style data set whose rows are dictionaries."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def response_mask(
    input_ids: IntArray, labels: IntArray, offsets: IntArray, end_token_ids: Iterable[int] = ()
) -> BoolArray:
    """Which tokens are response content, for many rows laid end to end.

    A token counts if it is labelled, with two exceptions: the first token of a row, which nothing predicts, and the end
    of a turn. If a stretch of labelled tokens ends in an end marker, with at most the template's newline after it,
    marker and newline do not count (arXiv:2601.14249 scores only the assistant's content). A stretch without a marker,
    cut off by truncation, counts to its end.

    Args:
        input_ids: `[tokens]` the rows' tokens.
        labels: `[tokens]` -100 where a token is not trained on.
        offsets: `[rows + 1]` where each row starts, and the end.
        end_token_ids: the end-of-turn markers to leave out. If empty, markers count.

    Returns:
        `[tokens]` True where the token counts.
    """
    scored: BoolArray = labels != IGNORED_LABEL
    row_start = np.zeros(len(scored) + 1, bool)
    row_start[offsets] = True
    row_start = row_start[:-1]
    stretch_start = scored & (row_start | ~np.r_[False, scored[:-1]])
    positions = np.flatnonzero(scored)
    starts = np.flatnonzero(stretch_start)
    if len(starts):
        stretch = np.cumsum(stretch_start)[positions] - 1
        stops = np.r_[positions[np.searchsorted(positions, starts[1:]) - 1], positions[-1]] + 1
        markers = np.isin(input_ids[positions], np.fromiter(end_token_ids, np.int64))
        last_marker = np.full(len(starts), -1)
        np.maximum.at(last_marker, stretch[markers], positions[markers])
        cut = np.where((last_marker >= 0) & (stops - last_marker <= 1 + TEMPLATE_TAIL), last_marker, stops)
        scored[positions] = positions < cut[stretch]
    scored[row_start] = False
    return scored


class ScoredDataset(torch.utils.data.Dataset[Any]):
    """The user's prepared data set, with what scoring and planning need to know about it.

    Args:
        dataset: rows with `input_ids` and labels: a `datasets.Dataset` (read column by column) or any map-style
            data set of dictionaries (read row by row, once).
        labels: column of the labels; tokens labelled -100 are not scored. None: every token is trained on and scored.
        end_token_ids: end-of-turn markers that are trained on but not scored. `attach` finds them itself.
        unscorable: what to do about rows without any token to score: `"error"`, or `"drop"` to leave them out of every
            plan.

    Raises:
        ValueError: the data set is empty, has no row numbers, or lacks a column, or some rows have nothing to score.
    """

    lengths: IntArray
    """`[samples]` tokens in the row, prompt included."""
    num_scored: IntArray
    """`[samples]` response tokens."""
    content_hash: HashArray
    """`[samples]` a hash of the row's tokens and of which ones count."""

    def __init__(
        self,
        dataset: Rows,
        *,
        labels: str | None = "labels",
        end_token_ids: Iterable[int] = (),
        unscorable: Literal["error", "drop"] = "error",
    ) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"A {type(dataset).__name__} has no row numbers, so its rows cannot be chosen or ordered. Load the "
                "data set without streaming=True, or materialise it with Dataset.from_generator."
            )
        if len(dataset) == 0:
            raise ValueError("The data set is empty: there is nothing to score.")
        self.rows = dataset
        self._added: dict[str, pa.Array] = {}
        self._labels = labels
        self._end_token_ids = tuple(end_token_ids)
        for needed, argument in (("input_ids", "the data set"), (labels, "labels=")):
            if needed is not None and needed not in self.column_names:
                cure = " If every token is trained on, pass labels=None." if argument == "labels=" else ""
                if needed == "input_ids":
                    cure = " Wrap the data set after tokenisation (attach wraps the trainer's prepared one)."
                raise ValueError(unknown_name("column", needed, self.column_names, "in the data set") + cure)
        self._read_tokens()
        self.scorable: BoolArray = self.num_scored > 0
        self.tokens_cut: IntArray = np.zeros(len(self), np.int64)
        """`[samples]` tokens of the response that truncation cut off; -1: some, nobody knows how many. `attach` sets
        it."""
        self.source_rows: IntArray = np.arange(len(self))
        """`[samples]` the number of each row in the data that the trainer was given, which may have had more rows, or
        another order. `attach` sets it."""
        self.dropped: pa.Table | None = None
        """The rows that the trainer dropped, with their plain columns; None if it dropped none. `attach` sets it."""
        missing = np.flatnonzero(~self.scorable)
        if len(missing) and (unscorable == "error" or len(missing) == len(self)):
            raise ValueError(
                f"{len(missing)} of {len(self)} rows have no response token to score (first: row {missing[0]}). Their "
                "labels are all -100, or only the end marker is labelled. Remove these rows, or pass unscorable='drop' "
                "to leave them out of every epoch."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]

    @property
    def column_names(self) -> Sequence[str]:
        own = cast("list[str]", self.rows.column_names) if _is_arrow(self.rows) else self.rows[0]  # type: ignore[attr-defined]
        return [*own, *self._added]

    def add_column(self, name: str, values: Sequence[Any]) -> None:
        """Add a column for metrics, policies and reports. The trainer's rows do not get it.

        Args:
            name: a new name.
            values: a value for each row.

        Raises:
            ValueError: the data set has such a column.
        """
        if name in self.column_names:
            raise ValueError(
                f"The data set has a column '{name}' already. Give the one to add another name, or leave it out."
            )
        self._added[name] = pa.array(values)

    @property
    def cut(self) -> BoolArray:
        """`[samples]` True where truncation cut off the response, or some of it."""
        cut: BoolArray = self.tokens_cut != 0
        return cut

    @cached_property
    def fingerprint(self) -> str:
        """A hash, 16 hex digits, of the whole content in order: every row's tokens and which ones count."""
        return hashlib.blake2b(self.content_hash.tobytes(), digest_size=8).hexdigest()

    @property
    def prompt_hash(self) -> HashArray:
        """`[samples]` a hash of the tokens before the response: equal for responses to the same prompt.

        The last of them is left out: a tokenizer may have merged it with the beginning of the response.
        """
        return self._prompts[0]

    @property
    def prompt_lengths(self) -> IntArray:
        """`[samples]` how many tokens `prompt_hash` is a hash of."""
        return self._prompts[1]

    @cached_property
    def _prompts(self) -> tuple[HashArray, IntArray]:
        hashes, lengths = [], []
        for input_ids, labels, offsets in self._blocks():
            scored = response_mask(input_ids, labels, offsets, self._end_token_ids)
            place = np.arange(len(input_ids))
            first = np.minimum.reduceat(np.where(scored, place, len(input_ids)), offsets[:-1])
            before = place < np.repeat(np.minimum(first, offsets[1:]) - 1, np.diff(offsets))
            kept = np.r_[0, np.cumsum(before)][offsets]
            hashes.append(row_hashes(input_ids[before], np.zeros(kept[-1], bool), kept))
            lengths.append(np.diff(kept))
        return np.concatenate(hashes), np.concatenate(lengths)

    def identifying_columns(self, *needed: str) -> list[str]:
        """The columns that identify a row for people: those that are needed, and all with short single values."""
        first = self[0]

        def is_short(value: Any) -> bool:
            return isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= _LONGEST_TEXT)

        return list(dict.fromkeys([*needed, *(name for name in self.column_names if is_short(first.get(name)))]))

    def sample(self, index: int, columns: Sequence[str] = ()) -> Sample:
        """One row's tokens, and which ones count; see `samples`."""
        return self.samples([index], columns)[0]

    def samples(self, indices: Sequence[int] | IntArray, columns: Sequence[str] = ()) -> list[Sample]:
        """Several rows at once, which is much faster than one by one.

        Args:
            indices: row numbers.
            columns: columns of the data set whose values go into `Sample.columns`.

        Raises:
            ValueError: there is no such column.
        """
        if len(indices) == 0:
            return []
        rows = [int(index) for index in indices]
        input_ids, labels, offsets = self._tokens(rows)
        scored = response_mask(input_ids, labels, offsets, self._end_token_ids)
        return [
            Sample(index=index, input_ids=input_ids[start:stop], scored=scored[start:stop], columns=values)
            for index, (start, stop), values in zip(
                rows, pairwise(offsets.tolist()), self._values(rows, columns), strict=True
            )
        ]

    def scoring_hash(self, columns: Sequence[str] = ()) -> HashArray:
        """`[samples]` a hash of everything in each row that its scores depend on: its tokens, which ones count, and the
        values of the columns that metrics read.

        Raises:
            ValueError: there is no such column.
        """
        if not columns:
            return self.content_hash
        blocks = (list(range(start, min(start + _ROWS, len(self)))) for start in range(0, len(self), _ROWS))
        return np.concatenate([with_values(self.content_hash[rows], self._values(rows, columns)) for rows in blocks])

    def _values(self, rows: list[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """The values of some columns in some rows, one dictionary for each row."""
        if not columns:
            return [{} for _ in rows]
        for name in columns:
            if name not in self.column_names:
                raise ValueError(unknown_name("column", name, self.column_names, "in the data set"))
        own = [name for name in columns if name not in self._added]
        found: list[dict[str, Any]] = [{} for _ in rows]
        if own and _is_arrow(self.rows):
            found = self.rows.select_columns(own).with_format("arrow")[rows].to_pylist()  # type: ignore[attr-defined]
        elif own:
            found = [{name: self.rows[row][name] for name in own} for row in rows]
        for name in columns:
            if name in self._added:
                for row, values in zip(rows, found, strict=True):
                    values[name] = self._added[name][row].as_py()
        return found

    def column_fingerprint(self, name: str) -> str:
        """A hash, 16 hex digits, of a column's values in order.

        Raises:
            ValueError: there is no such column.
        """
        column = self.column(name)
        values = json.dumps([str(value) for value in column.values])
        return hash_of(column.codes.tobytes(), values.encode(errors="surrogatepass"))

    def column(self, name: str, *, complete: bool = False) -> EncodedColumn:
        """A column, dictionary-encoded. Lists and dictionaries are compared by value.

        Args:
            name: the column.
            complete: whether to refuse missing values.

        Raises:
            ValueError: there is no such column, or a value is missing.
        """
        if name not in self.column_names:
            raise ValueError(unknown_name("column", name, self.column_names, "in the data set"))
        if name in self._added:
            values: pa.Array = self._added[name]
        elif _is_arrow(self.rows):
            table = self.rows.select_columns([name]).with_format("arrow")[:]  # type: ignore[attr-defined]
            values = table.column(name).combine_chunks()
        else:
            values = _as_arrow([self.rows[row][name] for row in range(len(self))])
        if complete and values.null_count:
            first = int(np.flatnonzero(np.asarray(values.is_null()))[0])
            raise ValueError(
                f"Column '{name}' has no value in {values.null_count} of {len(self)} rows (first: row {first})."
            )
        if pa.types.is_nested(values.type):
            values = pa.array([json.dumps(value.as_py(), sort_keys=True, default=str) for value in values])
        encoded = values.dictionary_encode(null_encoding="encode")
        return EncodedColumn(
            codes=np.asarray(encoded.indices.to_numpy(zero_copy_only=False), np.int64),
            values=encoded.dictionary.to_pylist(),
        )

    @cached_property
    def _token_columns(self) -> Any:
        names = ["input_ids"] if self._labels is None else ["input_ids", self._labels]
        return self.rows.select_columns(names).with_format("arrow")  # type: ignore[attr-defined]

    def _read_tokens(self) -> None:
        """Compute lengths, counts and hashes of all rows, one block of rows at a time."""
        lengths, num_scored, hashes = [], [], []
        for input_ids, labels, offsets in self._blocks():
            scored = response_mask(input_ids, labels, offsets, self._end_token_ids)
            counts = np.concatenate([[0], np.cumsum(scored)])
            lengths.append(np.diff(offsets))
            num_scored.append(np.diff(counts[offsets]))
            hashes.append(row_hashes(input_ids, scored, offsets))
        self.lengths = np.concatenate(lengths)
        self.num_scored = np.concatenate(num_scored)
        self.content_hash = np.concatenate(hashes)

    def _blocks(self) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
        """`_tokens` of consecutive blocks of rows."""
        for start in range(0, len(self), _ROWS):
            stop = min(start + _ROWS, len(self))
            yield self._tokens(slice(start, stop) if _is_arrow(self.rows) else range(start, stop))

    def _tokens(self, rows: slice | Sequence[int]) -> tuple[IntArray, IntArray, IntArray]:
        """`(input_ids [tokens], labels [tokens], offsets [rows + 1])` of some rows, laid end to end."""
        label_column = "input_ids" if self._labels is None else self._labels
        if _is_arrow(self.rows):
            table = self._token_columns[rows]
            row_lengths = np.asarray(pc.list_value_length(table.column("input_ids")), np.int64)
            input_ids, labels = (
                np.asarray(pc.list_flatten(table.column(name)), np.int64) for name in ("input_ids", label_column)
            )
        else:
            assert not isinstance(rows, slice)
            loaded = [self.rows[row] for row in rows]
            row_lengths = np.array([len(row["input_ids"]) for row in loaded], np.int64)
            input_ids, labels = (
                np.concatenate([np.asarray(row[name], np.int64) for row in loaded])
                for name in ("input_ids", label_column)
            )
        if len(labels) != len(input_ids):
            raise ValueError(
                f"{len(row_lengths)} rows have {len(input_ids)} tokens but {len(labels)} labels. Column "
                f"'{label_column}' must hold one label for each token."
            )
        return input_ids, labels, np.concatenate([[0], np.cumsum(row_lengths)])


def row_hashes(input_ids: IntArray, scored: BoolArray, offsets: IntArray) -> HashArray:
    """`[rows]` a 64-bit hash of each row: its tokens, their order, and which ones count.

    Args:
        input_ids: `[tokens]` the rows' tokens, laid end to end.
        scored: `[tokens]` which ones count.
        offsets: `[rows + 1]` where each row starts, and the end.
    """
    row_lengths = np.diff(offsets)
    position = np.arange(len(input_ids)) - np.repeat(offsets[:-1], row_lengths)
    tokens = (input_ids.astype(np.uint64) << np.uint64(1)) | scored.astype(np.uint64)
    mixed = splitmix64(splitmix64(tokens) + position.astype(np.uint64))
    totals: npt.NDArray[np.uint64] = np.zeros(len(row_lengths), np.uint64)
    filled = row_lengths > 0
    if filled.any():
        totals[filled] = np.add.reduceat(mixed, offsets[:-1][filled])
    return splitmix64(totals ^ row_lengths.astype(np.uint64))


def with_values(hashes: HashArray, values: Sequence[Mapping[str, Any]]) -> HashArray:
    """`[rows]` hashes of rows together with the values that metrics read in them.

    Args:
        hashes: `[rows]` hashes of the tokens (`row_hashes`).
        values: for each row, the columns that metrics read; empty if they read none.
    """
    if not any(values):
        return hashes
    texts = (json.dumps(each, sort_keys=True, default=str).encode(errors="surrogatepass") for each in values)
    return splitmix64(hashes ^ np.array([int(hash_of(text), 16) for text in texts], np.uint64))


def _as_arrow(values: list[Any]) -> pa.Array:
    """Values of any kind. Those that Arrow has no common type for, such as integers beyond 64 bits, become text."""
    try:
        return pa.array(values)
    except (OverflowError, pa.ArrowException):
        return pa.array([None if value is None else json.dumps(value, sort_keys=True, default=str) for value in values])


def _is_arrow(rows: object) -> bool:
    """Whether it is a `datasets.Dataset`. Does not import `datasets`, which the user may not have."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(rows, datasets.Dataset)
