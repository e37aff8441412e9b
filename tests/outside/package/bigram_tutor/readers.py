"""A reader that is no neural network: a bigram language model, read out of a table of counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from distill_sampler import Reader, TokenStats, View
from distill_sampler.protocols import PassInfo, Read
from distill_sampler.serialize import hash_of


@dataclass(frozen=True)
class Bigrams(Reader):
    """p(token | the token before) from counts, with additive smoothing."""

    path: str
    """A file of numpy with `[vocabulary, vocabulary]` counts: how often the second token follows the first."""
    smoothing: float = 0.5
    """Added to every count."""

    @cached_property
    def table(self) -> npt.NDArray[np.float64]:
        """`[vocabulary, vocabulary]` probabilities."""
        counts = np.load(self.path).astype(np.float64) + self.smoothing
        probabilities: npt.NDArray[np.float64] = counts / counts.sum(axis=1, keepdims=True)
        return probabilities

    @property
    def identity(self) -> str:
        return f"bigrams {hash_of(self.table.tobytes())}"

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("surprisal", "rank")

    @contextmanager
    def open(self, info: PassInfo) -> Iterator[Read]:
        def read(views: Sequence[View]) -> list[TokenStats]:
            return [self._stats(view, info) for view in views]

        yield read

    def _stats(self, view: View, info: PassInfo) -> TokenStats:
        places = np.flatnonzero(view.scored)
        rows = self.table[view.input_ids[places - 1]]
        own = rows[np.arange(len(places)), view.input_ids[places]]
        info.progress(len(view.input_ids))
        return TokenStats(surprisal=-np.log(own).astype(np.float32), rank=1 + (rows > own[:, None]).sum(axis=1))


def count_bigrams(rows: Sequence[Sequence[int]], vocabulary: int) -> npt.NDArray[np.int64]:
    """`[vocabulary, vocabulary]` how often each token follows each other one."""
    counts = np.zeros((vocabulary, vocabulary), np.int64)
    for row in rows:
        np.add.at(counts, (np.asarray(row[:-1]), np.asarray(row[1:])), 1)
    return counts
