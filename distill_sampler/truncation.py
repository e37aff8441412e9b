"""What truncation has done to prepared samples: which responses end where the trainer cut them off, and whose they are.

A trainer cuts rows at `max_length` before anything of ours sees them. A row of exactly that length that does not end in
an end-of-turn marker is taken to be one of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from distill_sampler.dataset import TEMPLATE_TAIL, ScoredDataset
from distill_sampler.types import BoolArray, Column

_ROWS = 1024
"""Rows that are read at a time."""


def cut_responses(
    dataset: ScoredDataset,
    *,
    max_length: int | None,
    end_token_ids: Iterable[int],
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start",
) -> BoolArray:
    """Which samples' responses were cut off at `max_length`.

    Only rows that have `max_length` tokens are read. In data whose rows end in no marker at all, the length alone
    decides.

    Args:
        dataset: the prepared samples.
        max_length: where the trainer cuts (`SFTConfig(max_length=)`); None: nowhere.
        end_token_ids: the end-of-turn markers; `attach` finds them with `end_token_ids`.
        truncation_mode: which end of a row was kept. With `"keep_end"`, a response that begins its row is taken
            to be cut off.

    Returns:
        `[samples]`
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


def count_by_teacher(cut: BoolArray, teachers: Column) -> dict[str, tuple[int, int]]:
    """Of each teacher: how many of its responses were cut off, and how many it has.

    Args:
        cut: `[samples]` what `cut_responses` gave.
        teachers: `[samples]` who wrote each: `dataset.column("teacher")`.
    """
    size = len(teachers.values)
    cut_off, all_of = (np.bincount(codes, minlength=size) for codes in (teachers.codes[cut], teachers.codes))
    return {
        str(name): (int(some), int(number)) for name, some, number in zip(teachers.values, cut_off, all_of, strict=True)
    }


def cut_sentence(cut: BoolArray, teachers: Column | None) -> str:
    """How many responses truncation cut off, whose they are, and the cure.

    Args:
        cut: `[samples]` what `cut_responses` gave.
        teachers: who wrote each, if the data say so.
    """
    whose = ""
    if teachers is not None:
        counts = count_by_teacher(cut, teachers)
        whose = f" ({', '.join(f'{name}: {some} of {number}' for name, (some, number) in counts.items() if some)})"
    return (
        f"{cut.sum()} of {len(cut)} responses were cut off at the trainer's max_length{whose}. BestOf prefers whole "
        "responses; a larger max_length keeps more of them whole."
    )
