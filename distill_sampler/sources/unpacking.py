"""Take rows that somebody packed apart into their samples, by a column that names the sample of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

_OF_PACKS = ("seq_lengths", "position_ids", "attention_mask")
"""Columns that describe a packed row. They are dropped, because they do not describe its samples."""


def unpack(dataset: datasets.Dataset, *, by: str) -> datasets.Dataset:
    """The samples of packed rows, one row each, so that a curriculum can choose them singly.

    `{"input_ids": [5, 6, 7], "sample": [0, 0, 1], "teacher": ["a", "b"]}`
    `-> {"input_ids": [5, 6], "teacher": "a"}, {"input_ids": [7], "teacher": "b"}`

    A column with a value for each token is cut with the tokens. One with a value for each sample of the row gives each
    sample its value. Any other value is repeated. Negative sample ids mark padding, which is left out.

    Args:
        dataset: packed rows, with the column `input_ids`.
        by: column with the sample id of each token. Ids need to differ only between the samples of one row.

    Raises:
        ValueError: the data set lacks a column, a row does not have one sample id for each token, or a sample of a row
            is in several parts.
    """
    for name in ("input_ids", by):
        if name not in dataset.column_names:
            raise ValueError(
                f"unpack(by={by!r}): the data set has no column {name!r}. It has {', '.join(dataset.column_names)}."
            )
    dropped = [name for name in _OF_PACKS if name in dataset.column_names]
    return dataset.with_format(None).map(
        _take_apart,
        batched=True,
        with_indices=True,
        fn_kwargs={"by": by, "kept": [name for name in dataset.column_names if name not in (by, *dropped)]},
        remove_columns=dataset.column_names,
        desc="Taking packs apart",
    )


def _take_apart(
    batch: Mapping[str, Sequence[Any]], rows: Sequence[int], *, by: str, kept: Sequence[str]
) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {name: [] for name in kept}
    for at, row in enumerate(rows):
        ids, num_tokens = batch[by][at], len(batch["input_ids"][at])
        if not isinstance(ids, list) or len(ids) != num_tokens:
            number = len(ids) if isinstance(ids, list) else "no list of"
            raise ValueError(
                f"unpack(by={by!r}): row {row} has {num_tokens} tokens, but {number} sample ids. Give a column "
                "with the sample id of each token."
            )
        spans, start = [], 0
        for sample, tokens in groupby(ids):
            stop = start + len(list(tokens))
            if sample >= 0:
                spans.append((sample, start, stop))
            start = stop
        if len({sample for sample, _, _ in spans}) < len(spans):
            raise ValueError(
                f"unpack(by={by!r}): a sample of row {row} is in several parts. Give a column in which the tokens of a "
                "sample are next to each other."
            )
        for number, (_, start, stop) in enumerate(spans):
            for name in kept:
                value = batch[name][at]
                if isinstance(value, list) and len(value) == num_tokens:
                    value = value[start:stop]
                elif isinstance(value, list) and len(value) == len(spans):
                    value = value[number]
                found[name].append(value)
    return found
