"""A teacher that reads gives the rows of a store; what every source of a teacher's log-probabilities has to do.

The teacher is a model in this process, or an engine in another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from distill_sampler import Scorer
from distill_sampler.dataset import IGNORED_LABEL, ScoredDataset, response_mask
from distill_sampler.engines.alignment import place
from distill_sampler.engines.client import ServerGone
from distill_sampler.engines.endpoint import EndpointReader
from distill_sampler.engines.token_bytes import token_bytes
from distill_sampler.engines.writing import StoredRow
from distill_sampler.reading.model_reader import ModelReader
from distill_sampler.sources.candidates import Candidate
from distill_sampler.sources.encoding import Encoded, Encoder
from distill_sampler.types import BoolArray, FloatArray, IntArray, TokenStats, View


class TeacherSource(Protocol):
    """Gives the rows of a store for candidates."""

    @property
    def known_by_content(self) -> bool:
        """Whether what the numbers come from is identified by its content, so that it cannot have changed unnoticed."""
        ...

    def misfit(self, candidate: Candidate) -> str | None:
        """Why a candidate is not to be asked for; None if it is."""
        ...

    def rows(self, candidates: Sequence[Candidate], advance: Callable[[float], None]) -> list[StoredRow | str]:
        """A row for each candidate, or why it cannot have one.

        Args:
            candidates: what to look up or read.
            advance: to be told the share of them that is done.
        """
        ...

    def notes(self) -> list[tuple[int, str]]:
        """What to tell at the end: a number, and of what."""
        ...


class Outage(str):
    """Why this candidate and those after it cannot have a row now: the run must end here, and can go on later."""


Ask = Callable[[Sequence[View], Callable[[float], None]], Iterator[tuple[int, TokenStats | str]]]
"""Has a teacher read some views. Gives, in any order, the number of a view and its statistics, or why it has none."""


def model_reads(reader: ModelReader, scorer: Scorer) -> Ask:
    """A model in this process as the one that reads.

    Args:
        reader: the model, with its `top_k`.
        scorer: how it reads.
    """

    def ask(views: Sequence[View], advance: Callable[[float], None]) -> Iterator[tuple[int, TokenStats]]:
        read = [
            {"input_ids": view.input_ids, "labels": np.where(view.scored, view.input_ids, IGNORED_LABEL)}
            for view in views
        ]
        dataset = ScoredDataset(read)
        total, done = int(dataset.lengths.sum()), 0
        every = np.arange(len(views))
        for block in scorer.score(reader, dataset, [], every, traces=every.tolist()):
            yield from block.traces.items()
            done += int(dataset.lengths[block.indices].sum())
            advance(done / total)

    return ask


def engine_reads(reader: EndpointReader) -> Ask:
    """An engine in another process as the one that reads."""

    def ask(views: Sequence[View], advance: Callable[[float], None]) -> Iterator[tuple[int, TokenStats | str]]:
        done = 0
        try:
            for done, found in enumerate(reader.each(views), 1):
                yield done - 1, found if isinstance(found, TokenStats) else str(found)
                advance(done / len(views))
        except ServerGone as error:
            for number in range(done, len(views)):
                yield number, Outage(error)

    return ask


class FromReader:
    """Lets the teacher read the candidates, as `distill-sampler score` lets the student.

    Args:
        ask: has the teacher read.
        positions: the longest view that it can read, in tokens.
        encoder: turns candidates into its tokens.
        end_token_ids: end-of-turn markers, which are not part of the response.
        tokenizer: the teacher's.
        system_prompt: put before conversations that have none; None: nothing.
        key: the column that tells samples apart.
        known_by_content: whether the teacher's weights are known.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        positions: float,
        encoder: Encoder,
        end_token_ids: Sequence[int],
        tokenizer: Any,
        system_prompt: str | None,
        key: str | None,
        known_by_content: bool,
    ) -> None:
        self._known_by_content = known_by_content
        self._ask = ask
        self._positions = positions
        self._encoder = encoder
        self._end_token_ids = end_token_ids
        self._bytes = token_bytes(tokenizer)
        self._system_prompt = system_prompt
        self._key = key
        self._empty = self._too_long = self._non_finite = 0

    @property
    def known_by_content(self) -> bool:
        return self._known_by_content

    def misfit(self, candidate: Candidate) -> str | None:
        return self._encoder.misfit(candidate)

    def rows(self, candidates: Sequence[Candidate], advance: Callable[[float], None]) -> list[StoredRow | str]:
        asked = [_with_system(candidate, self._system_prompt) for candidate in candidates]
        encoded = self._encoder(asked, self._end_token_ids)
        masks = [self._mask(row) for row in encoded]
        usable = np.array([number for number, mask in enumerate(masks) if mask.any()], np.int64)
        fits = np.array([len(encoded[number].input_ids) <= self._positions for number in usable], bool)
        self._empty += len(encoded) - len(usable)
        self._too_long += int((~fits).sum())
        usable = usable[fits]
        found: dict[int, StoredRow | str] = {}
        views = [View(input_ids=np.array(encoded[n].input_ids, np.int64), scored=masks[n]) for n in usable.tolist()]
        for number, stats in self._ask(views, advance) if views else ():
            at = int(usable[number])
            if isinstance(stats, str):
                found[at] = stats
            else:
                found[at] = self._row(candidates[at], encoded[at], masks[at], stats)
        return [
            found.get(number) or without_numbers(candidates[number], self._key) for number in range(len(candidates))
        ]

    def notes(self) -> list[tuple[int, str]]:
        return [
            (self._empty, "responses without numbers, because --max-length cut off all of them"),
            (self._too_long, "responses without numbers, because the teacher has too few positions for them"),
            (self._non_finite, "responses without numbers, because the teacher's logits for them are NaN or infinite"),
            (self._encoder.lost_turns, "earlier turns left out, because the template rewrites them"),
            (self._encoder.whole_texts, "texts read whole, prompt included, because of --whole-text"),
        ]

    def _mask(self, row: Encoded) -> BoolArray:
        ids, labels = np.array(row.input_ids, np.int64), np.array(row.labels, np.int64)
        return response_mask(ids, labels, np.array([0, len(ids)]), self._end_token_ids)

    def _row(self, candidate: Candidate, encoded: Encoded, mask: BoolArray, stats: TokenStats) -> StoredRow:
        if not np.isfinite(stats.surprisal).all():
            self._non_finite += 1
            return without_numbers(candidate, self._key)
        ids = np.array(encoded.input_ids, np.int64)[mask]
        return aligned_row(
            candidate,
            _text_of(encoded, mask),
            ids,
            self._bytes(ids),
            self._bytes.apart(ids),
            stats.surprisal,
            key=self._key,
            top_ids=stats.top_ids,
            top_logprobs=stats.top_logprobs,
        )


def _with_system(candidate: Candidate, system: str | None) -> Candidate:
    if system is None or not candidate.messages or candidate.messages[0]["role"] == "system":
        return candidate
    messages = [{"role": "system", "content": system}, *candidate.messages]
    return replace(candidate, messages=messages, first=candidate.first + 1, as_text=False)


def _text_of(encoded: Encoded, mask: BoolArray) -> str:
    """The text of the response: what its stretches of tokens add to the text, end to end."""
    ends = np.maximum.accumulate(np.array(encoded.ends, np.int64))
    edges = np.flatnonzero(np.diff(np.r_[False, mask, False])).reshape(-1, 2)
    return "".join(encoded.text[ends[start - 1] : ends[stop - 1]] for start, stop in edges.tolist())


def without_numbers(candidate: Candidate, key: str | None) -> StoredRow:
    """A row without numbers: nobody finds it."""
    return StoredRow(
        text="",
        key=key_of(candidate, key),
        surprisal=np.zeros(0),
        begins=np.zeros(0, np.int64),
        coverage=0.0,
        content_hash=candidate.content_hash,
    )


def key_of(candidate: Candidate, key: str | None) -> str | None:
    """The value of the key column, as text; None without one."""
    return None if key is None else str(candidate.read[key])


def aligned_row(
    candidate: Candidate,
    text: str,
    token_ids: IntArray | None,
    pieces: Sequence[bytes],
    apart: BoolArray,
    surprisal: FloatArray,
    *,
    key: str | None,
    top_ids: IntArray | None = None,
    top_logprobs: FloatArray | None = None,
) -> StoredRow:
    """A row of the store from a teacher's tokens on a response's text.

    Args:
        candidate: whose response it is.
        text: the response.
        token_ids: `[tokens]`; None if they are not known.
        pieces: `[tokens]` their bytes.
        apart: `[tokens]` True for special tokens.
        surprisal: `[tokens]` in nats.
        key: the column that tells samples apart.
        top_ids: `[tokens, k]` the likeliest tokens in each place.
        top_logprobs: `[tokens, k]` their log-probabilities.
    """
    begins, coverage = place(pieces, text.encode(), apart=apart)
    kept = begins >= 0
    return StoredRow(
        text=text,
        key=key_of(candidate, key),
        surprisal=surprisal[kept],
        begins=begins[kept],
        token_ids=None if token_ids is None else token_ids[kept],
        coverage=coverage,
        absent=int((~kept).sum()),
        content_hash=candidate.content_hash,
        top_ids=None if top_ids is None else top_ids[kept],
        top_logprobs=None if top_logprobs is None else top_logprobs[kept],
    )
