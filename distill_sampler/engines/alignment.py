"""Aligns a model's tokens with a response's text, by bytes, for any tokenizer.

Two models with different tokenizers are compared on spans of bytes of the response's UTF-8 text. Each reads the text in
its own tokens, and one rule decides which span a token counts for:

    A token belongs to the span in which its text begins: the span of the first of its bytes that is in the text.

A token may be a part of a UTF-8 character (byte-level BPE, byte fallback). Positions are bytes, so it has a position of
its own. A token that is not in the text (`<|channel|>`, `<|end|>`, a header that the text leaves out) has none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.hashing import splitmix64
from distill_sampler.types import BoolArray, FloatArray, HashArray, IntArray

_EDITED = 64
"""A stretch of at least this many bytes that is not in the text as a whole is looked for piece by piece."""
_PIECE = 16
"""The size of the smallest such piece in bytes. Shorter ones would match by chance."""
_MOST_PIECES = 1024
"""How many pieces of one stretch are looked for, the longest ones. A text that needs more is a different text."""


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class Aligned:
    """A model's surprisals of the tokens of one response, and the tokens' positions in the response's text."""

    begins: IntArray
    """`[tokens]` the byte of the response's UTF-8 text at which each token begins, ascending."""
    surprisal: FloatArray
    """`[tokens]` -log p of each token, in nats, float32."""
    token_ids: IntArray
    """`[tokens]` token ids of the model's own vocabulary. Empty if they are not known."""
    coverage: float
    """Share of the text's bytes that are part of a token, from 0 to 1."""
    top_ids: IntArray | None = None
    """`[tokens, k]` the most likely tokens at each position, the likeliest first."""
    top_logprobs: FloatArray | None = None
    """`[tokens, k]` their log-probabilities."""

    def per_span(self, starts: IntArray) -> tuple[FloatArray, IntArray]:
        """`per_span` of these tokens."""
        return per_span(self.begins, self.surprisal, starts)


def per_span(begins: IntArray, surprisal: FloatArray, starts: IntArray) -> tuple[FloatArray, IntArray]:
    """Sums over spans of a text, by the rule of this module.

    Args:
        begins: `[tokens]` the byte at which each token begins, ascending.
        surprisal: `[tokens]` in nats.
        starts: `[spans]` the byte at which each span begins, ascending, the first one 0. A span reaches to the start of
            the next one, the last one to the end of the text.

    Returns:
        `[spans]` the sum of the surprisals (float64), and `[spans]` the number of tokens. A span in which no token
        begins has 0 of both.
    """
    starts = np.asarray(starts, np.int64)
    assert starts[:1].tolist() == [0], "spans cover the text"
    assert (np.diff(starts) >= 0).all(), "spans are in order"
    span = np.searchsorted(starts, begins, side="right") - 1
    sums = np.bincount(span, np.asarray(surprisal, np.float64), minlength=len(starts)).astype(np.float64)
    return sums, np.bincount(span, minlength=len(starts)).astype(np.int64)


def byte_starts(text: str, characters: Sequence[int] | IntArray) -> IntArray:
    """Positions in a text as bytes of its UTF-8: `("né.", [2]) -> [3]`.

    Args:
        text: the text.
        characters: `[n]` positions of characters, ascending.
    """
    edges = [0, *(int(place) for place in characters)]
    sizes = [len(text[start:stop].encode()) for start, stop in pairwise(edges)]
    starts: IntArray = np.cumsum(np.array(sizes, np.int64))
    return starts


def place(pieces: Sequence[bytes], text: bytes, *, apart: BoolArray | None = None) -> tuple[IntArray, float]:
    """The positions of tokens in a text.

    Usually the tokens are exactly the text. If not, the stretches between special tokens are looked for, the longest
    first, each between those that have been found: first the stretches that occur once in the text, then the pieces of
    long stretches that were edited, then the rest, such as short headers.

    Args:
        pieces: `[tokens]` the bytes of each token.
        text: the bytes of the response's text.
        apart: `[tokens]` True for special tokens, which may be absent from the text. None: there are none.

    Returns:
        `[tokens]` the byte at which each token begins, ascending; -1 for one that is not in the text. And the share of
        the text's bytes that are part of a token, without white space at the text's ends.
    """
    ends: IntArray = np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)))
    starts = np.r_[0, ends][:-1]
    stream = b"".join(pieces)
    if stream == text:
        runs = [(0, 0, len(text))]
    else:
        edges = {0, len(stream)}
        if apart is not None:
            edges |= {*starts[apart].tolist(), *ends[apart].tolist()}
        runs = _runs(stream, sorted(edges), text)
    return _begins(starts, ends, runs), _share(runs, text)


def overlap(begins: IntArray, text: bytes, other: bytes) -> tuple[IntArray, float]:
    """The positions of one text's tokens in another text: the same text truncated, trimmed or edited.

    Args:
        begins: `[tokens]` where the tokens begin in `text`, ascending.
        text: the text of the tokens.
        other: the other text.

    Returns:
        `[tokens]` where they begin in `other`; -1 for one that is not in it. And the share of its bytes that
        `text` has.
    """
    runs = _runs(text, [0, len(text)], other) if not text.startswith(other) else [(0, 0, len(other))]
    return _begins(begins, np.r_[begins[1:], len(text)], runs), _share(runs, other)


Run = tuple[int, int, int]
"""Bytes that the tokens and the text have in common: where they begin in the tokens, where in the text, how many."""


def _share(runs: Sequence[Run], text: bytes) -> float:
    """Which share of a text is covered by runs. White space at its ends may have been trimmed, so it does not count."""
    begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
    covered = sum(max(0, min(at + length, end) - max(at, begin)) for _, at, length in runs)
    return covered / (end - begin) if begin < end else 0.0


def _begins(starts: IntArray, ends: IntArray, runs: Sequence[Run]) -> IntArray:
    """`[tokens]` the position in the text of each token's first byte that is in a run; -1 if none is."""
    if not runs:
        return np.full(len(starts), -1)
    begin, at, length = np.array(runs, np.int64).T
    run = np.searchsorted(begin + length, starts, side="right")
    first = np.maximum(starts, begin[np.minimum(run, len(runs) - 1)])
    inside = (run < len(runs)) & (first < ends)
    run = np.minimum(run, len(runs) - 1)
    return np.where(inside, at[run] + first - begin[run], -1)


def _runs(stream: bytes, edges: Sequence[int], text: bytes) -> list[Run]:
    """The bytes that stretches of the tokens have in common with the text, in order.

    Args:
        stream: the tokens' bytes.
        edges: where stretches begin, ascending, and the end.
        text: the text's bytes.
    """
    stretches = list(pairwise(edges))
    longest_first = sorted(range(len(stretches)), key=lambda number: stretches[number][0] - stretches[number][1])
    found: dict[int, list[Run]] = {}
    placed: list[int] = []  # the numbers of the stretches that are found, ascending
    for search in (_once_whole, _in_pieces, _whole):
        for number in longest_first:
            begin, end = stretches[number]
            if number in found or begin == end:
                continue
            here = bisect_left(placed, number)
            low = sum(found[placed[here - 1]][-1][1:]) if here else 0
            high = found[placed[here]][0][1] if here < len(placed) else len(text)
            runs = search(stream[begin:end], text[low:high])
            if runs:
                found[number] = [(begin + start, low + at, length) for start, at, length in runs]
                placed.insert(here, number)
    return [run for number in placed for run in found[number]]


def _once_whole(stretch: bytes, window: bytes) -> list[Run]:
    """The run of a stretch that occurs exactly once in a window, so that its position is certain."""
    runs = _whole(stretch, window) if len(stretch) >= _PIECE else []
    return runs if all(window.count(stretch[start : start + length]) == 1 for start, _, length in runs) else []


def _whole(stretch: bytes, window: bytes) -> list[Run]:
    """The run of a stretch at its first occurrence in a window, with or without the white space at its ends."""
    left, right = len(stretch) - len(stretch.lstrip()), len(stretch) - len(stretch.rstrip())
    for before, behind in dict.fromkeys([(0, 0), (left, 0), (0, right), (left, right)]):
        wanted = stretch[before : len(stretch) - behind]
        if wanted and (at := window.find(wanted)) >= 0:
            return [(before, at, len(wanted))]
    return []


def _in_pieces(stretch: bytes, window: bytes) -> list[Run]:
    """The runs of those pieces of a long stretch that are in a window, if not all of it is."""
    return _pieces(stretch, window) if len(stretch) >= _EDITED and window else []


def _pieces(left: bytes, right: bytes) -> list[Run]:
    """Pieces that both have, in order: what both begin and end with, and what holds something that stands once in each.
    Every piece is taken as far as it reaches."""
    (hashes, starts), (others, places) = _once(left), _once(right)
    _, some, same = np.intersect1d(hashes, others, assume_unique=True, return_indices=True)
    starts, places = starts[some], places[same]
    order = np.argsort(starts)
    starts, places = starts[order], places[order]
    cuts = np.flatnonzero((np.diff(starts) != 1) | (np.diff(places) != 1)) + 1
    bounds = np.r_[0, cuts, len(starts)] if len(starts) else np.zeros(1, np.int64)
    found = [
        (int(starts[first]), int(places[first]), int(last - first) + _PIECE - 1) for first, last in pairwise(bounds)
    ]
    chain: list[Run] = [(0, 0, 0), (len(left), len(right), 0)]
    for run in sorted(found, key=lambda run: -run[2])[:_MOST_PIECES]:
        here = bisect_left(chain, run)
        if chain[here - 1][1] <= run[1] < chain[here][1]:
            chain.insert(here, run)
    runs: list[Run] = []
    for number, (start, at, length) in enumerate(chain):
        low, low_at = (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]) if runs else (0, 0)
        high, high_at = chain[number + 1][:2] if number + 1 < len(chain) else (len(left), len(right))
        cut = max(low - start, low_at - at, 0)
        start, at, length = start + cut, at + cut, length - cut
        if length < 0 or left[start : start + length] != right[at : at + length]:
            continue  # inside the one before it, or another piece with the same hash
        back = _equal(left[low:start][::-1], right[low_at:at][::-1])
        on = _equal(left[start + length : high], right[at + length : high_at])
        runs.append((start - back, at - back, back + length + on))
    return [run for run in runs if run[2] >= _PIECE]


def _once(content: bytes) -> tuple[HashArray, IntArray]:
    """The hashes of the windows of `_PIECE` bytes that stand once in a content, and where."""
    if len(content) < _PIECE:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(content, np.uint8), _PIECE)
    with np.errstate(over="ignore"):
        halves = np.ascontiguousarray(windows).view(np.uint64)
        hashes, at, counts = np.unique(splitmix64(halves[:, 0]) + halves[:, 1], return_index=True, return_counts=True)
    return hashes[counts == 1], at[counts == 1]


def _equal(left: bytes, right: bytes) -> int:
    """How many bytes both begin with."""
    length = min(len(left), len(right))
    differ = np.frombuffer(left[:length], np.uint8) != np.frombuffer(right[:length], np.uint8)
    return int(differ.argmax()) if differ.any() else length
