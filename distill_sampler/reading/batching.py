"""Which views are read together: batches of a given number of tokens, and prompts that are read once for several views.

A *wave* is a batch of prompts followed by the batches of views that continue them. Views that share no prompt form a
wave of whole sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from distill_sampler.types import IntArray, View

WORTH_SHARING = 5
"""A prompt is read once for several views if that saves at least one in this many of their tokens. Continuing from keys
and values has a cost of its own: on a CPU, saving 13 % of the tokens made a pass 11 % slower, and saving 18 % made it
6 % faster."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Wave:
    """A batch of prompts, and the batches that continue them. Without prompts: batches of whole sequences."""

    prompts: Sequence[IntArray] = ()
    row: Mapping[int, int] = field(default_factory=dict)
    """By the position of a view, the number of its prompt."""
    batches: Sequence[Sequence[int]]
    """The positions of each batch's views in the sequence of views."""

    def renumbered(self, places: IntArray) -> Wave:
        """The same wave for views at other positions: `places[old] = new`."""
        return Wave(
            prompts=self.prompts,
            row={int(places[old]): row for old, row in self.row.items()},
            batches=[places[batch].tolist() for batch in self.batches],
        )


def waves(
    views: Sequence[View], prompts: Sequence[IntArray | None], budget: int, *, apart: float = math.inf
) -> Iterator[Wave]:
    """A wave of whole sequences, then waves that share prompts, if sharing saves more than a forward pass costs.

    Args:
        views: what is to be read.
        prompts: for each view, the tokens at its start that may be shared; None: it is read whole.
        budget: tokens in a batch, padding included.
        apart: whole sequences of up to this many tokens do not share a batch with longer ones.
    """
    members: dict[bytes, list[int]] = {}
    for place, prompt in enumerate(prompts):
        if prompt is not None:
            members.setdefault(prompt.tobytes(), []).append(place)
    groups: list[tuple[IntArray, list[int]]] = []
    saved = 0
    for key, places_of_group in members.items():
        prompt = np.frombuffer(key, np.int64)
        saves = (len(places_of_group) - 1) * len(prompt)
        if saves and saves * WORTH_SHARING >= sum(len(views[place].input_ids) for place in places_of_group):
            groups.append((prompt, places_of_group))
            saved += saves
    if saved * 8 < budget:  # an additional forward costs about as much as an eighth of a batch
        groups = []
    alone = np.array(sorted(set(range(len(views))) - {place for _, group in groups for place in group}), np.int64)
    if len(alone):
        lengths = np.array([len(views[place].input_ids) for place in alone])
        yield Wave(batches=[alone[batch].tolist() for batch in token_batches(lengths, budget, apart=apart)])
    starts = np.array([len(prompt) for prompt, _ in groups], np.int64)
    for some in token_batches(starts, budget):
        row = {place: number for number, group in enumerate(some) for place in groups[group][1]}
        places = np.array(list(row), np.int64)
        start = np.array([starts[some[number]] for number in row.values()])
        # in each row that continues a prompt, its keys and values take memory too, but less than tokens that are read
        lengths = np.array([len(views[place].input_ids) for place in row]) - start + start // 4
        yield Wave(
            prompts=[groups[group][0] for group in some],
            row=row,
            batches=[places[batch].tolist() for batch in token_batches(lengths, budget)],
        )


def token_batches(lengths: IntArray, batch_tokens: int, *, apart: float = math.inf) -> Iterator[list[int]]:
    """Positions in `lengths`, in batches of at most `batch_tokens` padded tokens, the longest first.

    `lengths [5, 9, 4], batch_tokens 10 -> [1], [0, 2]`: the 9 alone, then two rows of 5, one of them padded.

    Sequences of up to `apart` tokens do not share a batch with longer ones.
    """
    batch: list[int] = []
    for place in np.argsort(-lengths, kind="stable").tolist():
        longest = lengths[batch[0]] if batch else 0
        if batch and ((len(batch) + 1) * longest > batch_tokens or lengths[place] <= apart < longest):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
