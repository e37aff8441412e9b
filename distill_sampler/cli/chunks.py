"""From a data set to chunks of encoded candidates: what is read together, scored together and kept together.

Chunks depend on the data and the settings alone, so an interrupted run makes those of an uninterrupted one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from rich.console import Console

from distill_sampler.dataset import response_mask
from distill_sampler.sources.candidates import Candidate, Layout, read_candidates
from distill_sampler.sources.encoding import Encoded, Encoder
from distill_sampler.sources.files import Bad, Sources
from distill_sampler.types import BoolArray, HashArray, IntArray

ROWS_PER_READ = 64
"""Candidates that are tokenised together; a chunk is a whole number of these."""
MAX_ROWS = 4096
SHOWN_BAD = 5
"""Bad rows that are shown one by one; all are counted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Some candidates, in the order of the data."""

    candidates: Sequence[Candidate]
    encoded: Sequence[Encoded]
    traced: BoolArray
    """`[rows]` whether what the student makes of each token is kept."""
    end_token_ids: Sequence[int]
    """End-of-turn markers, which are not scored."""

    def __len__(self) -> int:
        return len(self.candidates)

    def take(self, rows: IntArray) -> Chunk:
        """Some of its rows, in this order."""
        places = rows.tolist()
        return Chunk(
            candidates=[self.candidates[place] for place in places],
            encoded=[self.encoded[place] for place in places],
            traced=self.traced[rows],
            end_token_ids=self.end_token_ids,
        )

    @cached_property
    def hashes(self) -> HashArray:
        """`[rows]` hashes of the content."""
        return np.array([candidate.content_hash for candidate in self.candidates], np.uint64)

    @cached_property
    def offsets(self) -> IntArray:
        """`[rows + 1]` where each row's tokens begin, and the end."""
        offsets: IntArray = np.cumsum([0, *(len(row.input_ids) for row in self.encoded)])
        return offsets

    @cached_property
    def _scored(self) -> BoolArray:
        """`[tokens]` which tokens are response content."""
        if not len(self):
            return np.zeros(0, bool)
        input_ids, labels = (
            np.concatenate([np.asarray(getattr(row, name), np.int64) for row in self.encoded])
            for name in ("input_ids", "labels")
        )
        return response_mask(input_ids, labels, self.offsets, self.end_token_ids)

    @property
    def masks(self) -> list[BoolArray]:
        """For each row, `[tokens]` which tokens are response content."""
        return np.split(self._scored, self.offsets[1:-1]) if len(self) else []

    @cached_property
    def counts(self) -> IntArray:
        """`[rows]` tokens of response content."""
        counts: IntArray = np.diff(np.r_[0, np.cumsum(self._scored)][self.offsets])
        return counts


class Intake:
    """Reads the data of one run: first a look at its beginning, then chunk by chunk.

    Args:
        sources: the data.
        said: what the user has said of its columns.
        read: columns that metrics read.
        prompts: score only the candidates of so many prompts, the first ones; None: of all.
        traces: prompts whose candidates are kept token by token.
        on_error: whether a row that cannot be used ends the run.
        say: where to tell what is read, and what is left out.
    """

    def __init__(
        self,
        sources: Sources,
        said: Layout,
        *,
        read: Sequence[str],
        prompts: int | None,
        traces: int,
        on_error: Literal["skip", "stop"],
        say: Console,
    ) -> None:
        self.sources = sources
        self.bad = 0
        """Rows that were left out."""
        self.before = 0
        """Bytes of the data that were read before this chunk's."""
        self._read = tuple(read)
        self._prompts = prompts
        self._traces = traces
        self._stop = on_error == "stop"
        self._say = say
        self.layout = said
        self.first = self._look()
        """The first candidate that can be used."""

    def _look(self) -> Candidate:
        """Settle the columns, and see that there is something to score, before a model is loaded."""
        layouts: list[Layout] = []
        reasons: list[str] = []
        for item in read_candidates(self.sources, self.layout, read=self._read, announce=layouts.append):
            if isinstance(item, Candidate):
                self.layout = layouts[0]
                self._announce()
                self.bad = 0  # they are met again
                return item
            self._refuse(item, show=False)
            if len(reasons) < SHOWN_BAD:
                reasons.append(f"{item.where}: {item.reason}")
        raise ValueError(f"None of the {self.bad} rows could be used. {'; '.join(reasons)}.")

    def candidates(self, misfit: Callable[[Candidate], str | None] = lambda candidate: None) -> Iterator[Candidate]:
        """Those that are scored, in order.

        Args:
            misfit: why a candidate cannot be used, or None.

        Raises:
            ValueError: a row cannot be used, and the run is to stop there.
        """
        wanted = _OfTheFirst(self._prompts)
        for item in read_candidates(self.sources, self.layout, read=self._read):
            if isinstance(item, Bad):
                self._refuse(item)
            elif not wanted(item):
                continue
            elif reason := misfit(item):
                self._refuse(Bad(where=item.where, reason=reason))
            else:
                yield item

    def content_hashes(self) -> Iterator[int]:
        """Of all candidates that can be read. Nothing is said of the others, which are met again."""
        for item in read_candidates(self.sources, self.layout, read=self._read):
            if isinstance(item, Candidate):
                yield item.content_hash

    def chunks(
        self,
        encoder: Encoder,
        end_token_ids: Sequence[int],
        *,
        tokens: int,
        skip: int,
        misfit: Callable[[Candidate], str | None],
    ) -> Iterator[Chunk]:
        """Candidates in pieces of about so many tokens.

        Args:
            encoder: turns them into tokens.
            end_token_ids: markers that are not scored.
            tokens: of a chunk.
            skip: candidates that are done.
            misfit: why a candidate cannot be used, or None.
        """
        traced = _OfTheFirst(self._traces)
        waiting: list[tuple[Candidate, Encoded, bool]] = []
        size = position = 0
        stream = self.candidates(misfit)
        while several := list(itertools.islice(stream, ROWS_PER_READ)):
            keep = [traced(candidate) for candidate in several]
            done = min(max(skip - position, 0), len(several))
            position += len(several)
            if done == len(several):
                continue
            fresh = several[done:]
            encoded = encoder(fresh, end_token_ids)
            waiting += zip(fresh, encoded, keep[done:], strict=True)
            size += sum(len(each.input_ids) for each in encoded)
            if size >= tokens or len(waiting) >= MAX_ROWS:
                yield _chunk(waiting, end_token_ids)
                waiting, size, self.before = [], 0, self.sources.position
        if waiting:
            yield _chunk(waiting, end_token_ids)

    def _refuse(self, bad: Bad, *, show: bool = True) -> None:
        if self._stop:
            raise ValueError(
                f"{bad.where}: {bad.reason}. Repair it, or leave such rows out with --on-error skip; what is scored so "
                "far is kept."
            )
        self.bad += 1
        if show and self.bad <= SHOWN_BAD:
            self._say.print(f"  left out: {bad.where}: {bad.reason}", markup=False, highlight=False)

    def _announce(self) -> None:
        self._say.print(f"Columns: {self.layout.describe()}", markup=False)
        if self.layout.teacher is None and self.layout.candidates is None:
            self._say.print("  No column says who wrote a response; name it with --teacher-column to compare teachers.")
        if self.layout.group is None and self.layout.tokens:
            self._say.print(
                "  Rows whose tokens before the first labelled one are the same are one group; name the column that "
                "says which answer the same prompt with --group-column."
            )
        elif self.layout.group is None and self.layout.text:
            self._say.print(
                "  Each text is a group of its own; name the column that says which answer the same prompt with "
                "--group-column."
            )
        elif self.layout.group is None:
            self._say.print("  Rows with the same prompt are one group ('prompt_id' is a hash of the prompt).")


class _OfTheFirst:
    """Whether a candidate is of one of the first `number` prompts; of any for None."""

    def __init__(self, number: int | None) -> None:
        self._number = number
        self._groups: set[str] = set()

    def __call__(self, candidate: Candidate) -> bool:
        if self._number is None:
            return True
        if len(self._groups) < self._number:
            self._groups.add(candidate.group)
        return candidate.group in self._groups


def _chunk(rows: Sequence[tuple[Candidate, Encoded, bool]], end_token_ids: Sequence[int]) -> Chunk:
    candidates, encoded, traced = zip(*rows, strict=True)
    return Chunk(candidates=candidates, encoded=encoded, traced=np.array(traced, bool), end_token_ids=end_token_ids)
