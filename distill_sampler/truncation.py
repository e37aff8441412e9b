"""What a trainer's `max_length` did to the data: which responses it truncated, by how much, and which rows it dropped.

A trainer truncates rows at `max_length` before the library sees them. If a row's text is still there, the lost tokens
of the response are counted in it (`response_tokens_cut`). If only tokens are left, a row of exactly `max_length` tokens
that does not end in an end-of-turn marker counts as truncated, by an unknown number of tokens (`cut_responses`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_sampler.dataset import TEMPLATE_TAIL, ScoredDataset
from distill_sampler.types import BoolArray, EncodedColumn, IntArray

_ROWS = 1024
"""How many rows are read at a time."""

UNKNOWN = -1
"""Replaces the number of lost tokens where a response was truncated by an unknown number."""


def response_tokens_cut(
    input_ids: Sequence[int], is_response: BoolArray, kept: slice, end_token_ids: Iterable[int] = ()
) -> int:
    """How many tokens of a row's response truncation cut off.

    The end-of-turn marker counts. What the template writes after the marker does not, so a row that lost only that is
    not truncated.

    Args:
        input_ids: `[tokens]` the row before truncation.
        is_response: `[tokens]` True for the tokens of the response, markers included.
        kept: the part of the row that truncation kept.
        end_token_ids: the end-of-turn markers.
    """
    places = np.flatnonzero(is_response)
    tail = places[-1 - TEMPLATE_TAIL :]
    ends = tail[np.isin(np.asarray(input_ids)[tail], np.fromiter(end_token_ids, np.int64))]
    if len(ends):
        places = places[places <= ends[-1]]
    return int(((places < kept.start) | (places >= kept.stop)).sum())


def cut_responses(
    dataset: ScoredDataset,
    *,
    max_length: int | None,
    end_token_ids: Iterable[int],
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start",
) -> BoolArray:
    """Which samples' responses were cut off at `max_length`.

    Only rows of `max_length` tokens are looked at. If the rows of the data do not end in markers at all, the length
    alone decides.

    Args:
        dataset: the prepared samples.
        max_length: where the trainer truncates (`SFTConfig(max_length=)`); None: nowhere.
        end_token_ids: the end-of-turn markers, as `integrations.transformers.end_token_ids` finds them.
        truncation_mode: which end of a row was kept. With `"keep_end"`, a response at the very beginning of its row
            counts as cut off.

    Returns:
        `[samples]` True where the response was cut off.
    """
    cut: BoolArray = np.zeros(len(dataset), bool)
    if max_length is None:
        return cut
    ends = np.fromiter(end_token_ids, np.int64)
    longest = np.flatnonzero(dataset.lengths >= max_length)
    for start in range(0, len(longest), _ROWS):
        for sample in dataset.samples(longest[start : start + _ROWS]):
            if truncation_mode == "keep_start":
                cut[sample.index] = not np.isin(sample.input_ids[-1 - TEMPLATE_TAIL :], ends).any()
            else:
                # the first token is never scored, because nothing predicts it
                cut[sample.index] = sample.scored[1:2].any()
    return cut


def cut_sentence(tokens_cut: IntArray, teachers: EncodedColumn | None, *, by: str) -> str:
    """A sentence on how many responses were truncated, by how much and for which teachers, with the cure.

    Args:
        tokens_cut: `[samples]` how many tokens of each response truncation cut off, or `UNKNOWN`.
        teachers: the teacher of each response, if the data names them.
        by: the setting that truncated them.
    """
    cut = tokens_cut != 0
    if teachers is None:
        by_how_much = f", {_lost(tokens_cut[cut])}"
    else:
        whose = []
        for code, name in enumerate(teachers.values):
            own = teachers.codes == code
            if (cut & own).any():
                whose.append(f"{name}: {(cut & own).sum()} of {own.sum()} {_lost(tokens_cut[cut & own])}")
        by_how_much = f" ({'; '.join(whose)})"
    return (
        f"{cut.sum()} of {len(cut)} responses were cut off at {by}{by_how_much}. BestOf prefers whole responses. To "
        "keep more of them whole, raise it."
    )


def truncation_notes(dataset: ScoredDataset, *, teacher: str, group: str | None) -> list[str]:
    """What the trainer's `max_length` did to the data: a sentence on dropped rows, and one on truncated responses.

    Args:
        dataset: the rows that are left. Its `dropped` has the others.
        teacher: the column with the teachers, which the data may lack.
        group: the column that is equal for rows that answer the same prompt, if there is one.
    """
    notes = []
    if dataset.dropped is not None:
        notes.append(_dropped_sentence(dataset, dataset.dropped, teacher, group))
    if dataset.cut.any():
        teachers = dataset.column(teacher) if teacher in dataset.column_names else None
        notes.append(cut_sentence(dataset.tokens_cut, teachers, by="the trainer's max_length"))
    return notes


def _dropped_sentence(dataset: ScoredDataset, dropped: pa.Table, teacher: str, group: str | None) -> str:
    whose = gone = ""
    if teacher in dropped.column_names:
        counts = pc.value_counts(dropped[teacher]).to_pylist()
        whose = " ({})".format(", ".join(f"{one['values']}: {one['counts']}" for one in counts))
    if group is not None and group in dropped.column_names:
        lost = set(dropped[group].to_pylist()) - set(dataset.column(group).values)
        if lost:
            prompts = "1 prompt has" if len(lost) == 1 else f"{len(lost)} prompts have"
            gone = f" {prompts} no row left (such as {group} = {min(map(str, lost))})."
    return (
        f"the trainer dropped {len(dropped)} of {len(dropped) + len(dataset)} rows{whose}, because its max_length left "
        f"no token of their response.{gone}"
    )


def _lost(tokens_cut: IntArray) -> str:
    """By how much some responses were cut: `by 35 tokens on average`."""
    known = tokens_cut[tokens_cut != UNKNOWN]
    if not len(known):
        return "by an unknown number of tokens"
    mean = round(known.mean())
    lost = f"by {mean} token{'' if mean == 1 else 's'}{' on average' if len(known) > 1 else ''}"
    return lost if len(known) == len(tokens_cut) else f"{lost} where that is known"
