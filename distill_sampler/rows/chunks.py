"""From a data set to chunks of encoded candidates, which are read, scored and kept together.

Chunks depend on the data and the settings alone, so an interrupted run makes the same chunks as an uninterrupted one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from rich.console import Console

from distill_sampler.dataset import response_mask, row_hashes, with_values
from distill_sampler.sources.candidates import Candidate, Layout, read_candidates
from distill_sampler.sources.encoding import Encoded, Encoder
from distill_sampler.sources.files import Bad, GivenRows, Sources
from distill_sampler.types import BoolArray, HashArray, IntArray

ROWS_PER_READ = 64
"""How many candidates are tokenised together. A chunk is a whole number of these."""
MAX_ROWS = 4096
"""How many candidates a chunk has at most, approximately."""
ROWS_PER_TURN = 16
"""Shards take turns of so many candidates: few enough to give all the same work, enough to keep most prompts whole."""
ROWS_TO_SETTLE = 1024
"""How many candidates decide which types the user's columns have. All shards look at the same ones."""
SHOWN_BAD = 5
"""How many bad rows are shown; all are counted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Some candidates, in the order of the data."""

    candidates: Sequence[Candidate]
    encoded: Sequence[Encoded]
    traced: BoolArray
    """`[rows]` whether the scores of each token are kept."""
    end_token_ids: Sequence[int]
    """End-of-turn markers, which are not scored."""
    places: IntArray
    """`[rows]` the number of each among all candidates of the data that can be read."""

    def __len__(self) -> int:
        return len(self.candidates)

    def take(self, rows: IntArray) -> Chunk:
        """The chunk with these rows, in this order."""
        places = rows.tolist()
        return Chunk(
            candidates=[self.candidates[place] for place in places],
            encoded=[self.encoded[place] for place in places],
            traced=self.traced[rows],
            end_token_ids=self.end_token_ids,
            places=self.places[rows],
        )

    @cached_property
    def hashes(self) -> HashArray:
        """`[rows]` the candidates' content hashes."""
        return np.array([candidate.content_hash for candidate in self.candidates], np.uint64)

    @cached_property
    def offsets(self) -> IntArray:
        """`[rows + 1]` where each row begins among all tokens, and where the last one ends."""
        offsets: IntArray = np.cumsum([0, *(len(row.input_ids) for row in self.encoded)])
        return offsets

    @cached_property
    def _input_ids(self) -> IntArray:
        """`[tokens]` the rows' tokens, laid end to end."""
        return self._laid_out("input_ids")

    @cached_property
    def _scored(self) -> BoolArray:
        """`[tokens]` which tokens are response content."""
        if not len(self):
            return np.zeros(0, bool)
        return response_mask(self._input_ids, self._laid_out("labels"), self.offsets, self.end_token_ids)

    def _laid_out(self, name: str) -> IntArray:
        arrays = [np.asarray(getattr(row, name), np.int64) for row in self.encoded]
        return np.concatenate([np.zeros(0, np.int64), *arrays])

    @property
    def scoring_hashes(self) -> HashArray:
        """`[rows]` what `ScoredDataset.scoring_hash` gives for these rows in a trainer's data set."""
        hashes = row_hashes(self._input_ids, self._scored, self.offsets)
        return with_values(hashes, [candidate.read for candidate in self.candidates])

    @property
    def masks(self) -> list[BoolArray]:
        """For each row, `[tokens]` which tokens are response content."""
        return np.split(self._scored, self.offsets[1:-1]) if len(self) else []

    @cached_property
    def counts(self) -> IntArray:
        """`[rows]` how many tokens are response content."""
        counts: IntArray = np.diff(np.r_[0, np.cumsum(self._scored)][self.offsets])
        return counts


class Intake:
    """Reads the data of one run: first its beginning, to settle the columns, then chunk by chunk.

    Args:
        sources: the data.
        given: the columns that the user has named.
        read: columns that metrics read.
        prompts: score only the candidates of this many prompts, the first ones; None: of all.
        traces: for this many prompts, the first ones, the scores of every token are kept.
        on_error: `"stop"`: a row that cannot be used ends the run. `"skip"`: it is left out.
        say: the console for messages about what is read and what is left out.
        shard: `(number, of)`, from 1: score only this share of the candidates; None: all.
        kept: the sentence that says what becomes of the scores so far when a row ends the run.
    """

    def __init__(
        self,
        sources: Sources | GivenRows,
        given: Layout,
        *,
        read: Sequence[str],
        prompts: int | None,
        traces: int,
        on_error: Literal["skip", "stop"],
        say: Console,
        shard: tuple[int, int] | None = None,
        kept: str = "The scores so far are kept.",
    ) -> None:
        self.sources = sources
        self.shard = shard
        self.bad = 0
        """How many rows were left out."""
        self.before = 0
        """The `position` before the current chunk."""
        self._read = tuple(read)
        self._prompts = prompts
        self._traces = traces
        self._stop = on_error == "stop"
        self._say = say
        self._kept = kept
        self._wanted = _OfTheFirst(prompts)
        self.layout = given
        self.kinds: dict[str, set[type]] = {}
        """The types of values that the user's other columns have in the first rows, by name."""
        self.first = self._find_first()
        """The first candidate that can be used."""

    def _find_first(self) -> Candidate:
        """The first candidate. Settles the columns, and refuses data without candidates before a model is loaded."""
        layouts: list[Layout] = []
        reasons: list[str] = []
        first: Candidate | None = None
        seen = 0
        for item in read_candidates(self.sources, self.layout, read=self._read, announce=layouts.append):
            if isinstance(item, Candidate):
                first = first or item
                for name, value in item.extra.items():
                    self.kinds.setdefault(name, set()).add(type(value))
                seen += 1
                if seen == ROWS_TO_SETTLE:
                    break
            elif first is None:
                self._refuse(item, show=False)
                if len(reasons) < SHOWN_BAD:
                    reasons.append(f"{item.where}: {item.reason}")
        if first is None:
            raise ValueError(f"None of the {self.bad} rows could be used. {'; '.join(reasons)}.")
        self.layout = layouts[0]
        self._announce()
        self.bad = 0  # the rows before it will be read and counted again
        return first

    @property
    def size(self) -> int:
        """How much there is to do: the number of prompts if only some are scored, otherwise the bytes of the data."""
        return self._prompts or self.sources.size

    @property
    def position(self) -> int:
        """How much of `size` has been read."""
        return self._wanted.seen if self._prompts else self.sources.position

    def candidates(self, misfit: Callable[[Candidate], str | None] = lambda candidate: None) -> Iterator[Candidate]:
        """The candidates that are to be scored, in the order of the data.

        Args:
            misfit: returns why a candidate cannot be used, or None.

        Raises:
            ValueError: a row cannot be used, and `on_error` is `"stop"`.
        """
        return (candidate for _, _, candidate in self._mine(misfit))

    def _mine(self, misfit: Callable[[Candidate], str | None]) -> Iterator[tuple[int, bool, Candidate]]:
        """The candidates of `candidates` that belong to the shard, each with its number among all, and whether the
        scores of its tokens are kept."""
        wanted, traced = _OfTheFirst(self._prompts), _OfTheFirst(self._traces)
        self._wanted = wanted
        number, of = self.shard or (1, 1)
        place = -1
        for item in read_candidates(self.sources, self.layout, read=self._read):
            if isinstance(item, Bad):
                self._refuse(item)
                continue
            if not wanted(item):
                continue
            place += 1
            keep = traced(item)
            if place // ROWS_PER_TURN % of != number - 1:
                continue
            if reason := misfit(item):
                self._refuse(Bad(where=item.where, reason=reason))
            else:
                yield place, keep, item

    def readable(self) -> Iterator[Candidate]:
        """All candidates that can be read. Other rows are passed over without a message here."""
        for item in read_candidates(self.sources, self.layout, read=self._read):
            if isinstance(item, Candidate):
                yield item

    def content_hashes(self) -> Iterator[int]:
        """The content hashes of all candidates that can be read."""
        return (candidate.content_hash for candidate in self.readable())

    def chunks(
        self,
        encoder: Encoder,
        end_token_ids: Sequence[int],
        *,
        tokens: int,
        skip: int,
        misfit: Callable[[Candidate], str | None],
    ) -> Iterator[Chunk]:
        """The candidates in chunks of about `tokens` tokens.

        Args:
            encoder: turns candidates into tokens.
            end_token_ids: end-of-turn markers, which are not scored.
            tokens: about how many tokens a chunk has.
            skip: how many candidates, the first ones, are already scored.
            misfit: returns why a candidate cannot be used, or None.
        """
        waiting: list[_Waiting] = []
        size = position = 0
        stream = self._mine(misfit)
        while several := list(itertools.islice(stream, ROWS_PER_READ)):
            done = min(max(skip - position, 0), len(several))
            position += len(several)
            if done == len(several):
                continue
            fresh = several[done:]
            encoded = encoder([candidate for _, _, candidate in fresh], end_token_ids)
            waiting += [(*each, tokens) for each, tokens in zip(fresh, encoded, strict=True)]
            size += sum(len(each.input_ids) for each in encoded)
            if size >= tokens or len(waiting) >= MAX_ROWS:
                yield chunk_of(waiting, end_token_ids)
                waiting, size, self.before = [], 0, self.position
        if waiting:
            yield chunk_of(waiting, end_token_ids)

    def _refuse(self, bad: Bad, *, show: bool = True) -> None:
        if self._stop:
            raise ValueError(
                f"{bad.where}: {bad.reason}. Correct the row, or leave such rows out with --on-error skip. {self._kept}"
            )
        self.bad += 1
        if show and self.bad <= SHOWN_BAD:
            self._say.print(f"  left out: {bad.where}: {bad.reason}", markup=False, highlight=False)

    def _announce(self) -> None:
        self._say.print(f"Columns: {self.layout.describe()}", markup=False)
        if self.layout.teacher is None and self.layout.candidates is None:
            self._say.print("  No column names the teachers. To compare teachers, name theirs with --teacher-column.")
        if self.layout.group is None and self.layout.tokens:
            self._say.print(
                "  Rows with the same tokens before the first labelled one are one group. If that is wrong, name the "
                "column that is equal for rows that answer the same prompt with --group-column."
            )
        elif self.layout.group is None and self.layout.text:
            self._say.print(
                "  Each text is a group of its own. If several texts answer the same prompt, name the column that "
                "shows it with --group-column."
            )
        elif self.layout.group is None:
            self._say.print("  Rows with the same prompt are one group ('prompt_id' is a hash of the prompt).")


class _OfTheFirst:
    """Tells whether a candidate belongs to one of the first `number` prompts; with None, every one does."""

    def __init__(self, number: int | None) -> None:
        self._number = number
        self._groups: set[str] = set()

    @property
    def seen(self) -> int:
        """How many of these prompts have been seen."""
        return len(self._groups)

    def __call__(self, candidate: Candidate) -> bool:
        if self._number is None:
            return True
        if len(self._groups) < self._number:
            self._groups.add(candidate.group)
        return candidate.group in self._groups


_Waiting = tuple[int, bool, Candidate, Encoded]
"""A candidate that waits for its chunk: its number, whether its tokens' scores are kept, itself, and its tokens."""


def chunk_of(rows: Sequence[_Waiting], end_token_ids: Sequence[int]) -> Chunk:
    """The chunk of these candidates."""
    return Chunk(
        candidates=[candidate for _, _, candidate, _ in rows],
        encoded=[encoded for _, _, _, encoded in rows],
        traced=np.array([traced for _, traced, _, _ in rows], bool),
        end_token_ids=end_token_ids,
        places=np.array([place for place, _, _, _ in rows], np.int64),
    )
