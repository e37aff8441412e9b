"""Splitting a response into its reasoning steps, and mapping the steps onto tokens exactly.

A *splitter* is any function from text to the places where a new step begins: `"One. Two.\\nThree" -> [4, 10]`. Those
here are `sentences` (the default), `lines`, `paragraphs` and `by_pattern`. `token_steps` turns places in the text into
ranges of tokens, so that no token is lost and none counts twice, whatever the tokenizer.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from distill_sampler.types import IntArray

Splitter = Callable[[str], Sequence[int]]
"""From a text to the characters at which a new step begins, in order; 0 and the text's length need not be named."""

# what is never split: code blocks, display and inline mathematics
_WHOLE = re.compile(
    r"```.*?(?:```|\Z)|\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\)|\\begin\{(\w+\*?)\}.*?\\end\{\1\}|(?<![\\$])\$[^$\n]+\$",
    re.DOTALL,
)
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]*_]*(?=\s)|[。！？]|\n+")
_ABBREVIATION = re.compile(
    r"(?:\b(?i:e\.g|i\.e|cf|vs|etc|approx|resp|figs?|eqs?|vol|pp|mr|mrs|ms|dr|prof|et al)"
    r"|(?<![A-Za-z])[A-Z]|^\s*\d+|\n\s*\d+)\.$"
)


def sentences(text: str) -> list[int]:
    """Where sentences and lines begin.

    Never inside a code block, display or inline mathematics, after an abbreviation, an initial or a list's number
    (`1. Add`), and a decimal point is no end: `"It is 3.14. Next" -> [11]`. A space belongs to the sentence that it
    comes before, a newline to the line that it ends, as most tokenizers have it.
    """
    whole = [match.span() for match in _WHOLE.finditer(text)]
    starts = [start for start, _ in whole]
    places = []
    for match in _SENTENCE_END.finditer(text):
        place = match.end()
        inside = bisect_left(starts, place) - 1
        if inside >= 0 and place < whole[inside][1]:
            continue
        if match[0].startswith(".") and _ABBREVIATION.search(text, max(0, match.start() - 12), match.start() + 1):
            continue
        places.append(place)
    return places


def lines(text: str) -> list[int]:
    """Where lines begin; empty lines belong to the line before."""
    return [match.end() for match in re.finditer(r"\n+", text)]


def paragraphs(text: str) -> list[int]:
    """Where paragraphs begin: after an empty line."""
    return [match.end() for match in re.finditer(r"\n\s*\n", text)]


@dataclass(frozen=True)
class by_pattern:  # lower case: used like the functions above
    """A splitter that begins a step behind each match of a regular expression."""

    pattern: str

    def __call__(self, text: str) -> list[int]:
        return [match.end() for match in re.finditer(self.pattern, text) if match.end() > match.start()]


def token_steps(
    input_ids: IntArray, tokenizer: Any, splitter: Splitter, *, min_tokens: int, max_tokens: int
) -> list[tuple[int, int]]:
    """The steps of a stretch of tokens, as ranges that cover it without gap or overlap.

    A token belongs to the step in which it begins. A step of fewer than `min_tokens` is joined with the next (the last
    one with the one before); one of more than `max_tokens` is cut into equal pieces.

    Args:
        input_ids: `[tokens]` of one stretch of response.
        tokenizer: anything with `decode` and `batch_decode`, such as a tokenizer of transformers.
        splitter: where steps begin in the text.
        min_tokens: fewest tokens in a step, where the stretch has as many.
        max_tokens: most tokens in a step.

    Raises:
        ValueError: the splitter gives anything but places in the text, in order.
    """
    if len(input_ids) == 0:
        return []
    text, begins = text_and_offsets(input_ids, tokenizer)
    found = list(splitter(text))
    places = np.array([place for place in found if isinstance(place, int | np.integer)], np.int64)
    inside = len(places) == len(found) and ((places >= 0) & (places <= len(text))).all()
    if not inside or (np.diff(places) < 0).any():
        raise ValueError(
            f"The splitter gave {found[:5]}: not places in a text of {len(text)} characters, in ascending order. It "
            "must return the characters at which new steps begin, counted from 0 (for spans, their starts)."
        )
    cuts = np.unique(np.concatenate([[0], np.searchsorted(begins, places), [len(input_ids)]]))
    bounds = [0]
    for cut in cuts[1:].tolist():
        if cut - bounds[-1] >= min_tokens:
            bounds.append(cut)
    if bounds[-1] != len(input_ids):  # a short last step
        bounds[max(len(bounds) - 1, 1) :] = [len(input_ids)]
    steps: list[tuple[int, int]] = []
    for start, stop in pairwise(bounds):
        pieces = -(-(stop - start) // max_tokens)
        edges = [start + (stop - start) * piece // pieces for piece in range(pieces + 1)]
        steps.extend(pairwise(edges))
    return steps


def text_and_offsets(input_ids: IntArray, tokenizer: Any) -> tuple[str, IntArray]:
    """The text of some tokens, and `[tokens]` the character at which each begins.

    Most tokenizers decode token by token to the same text as all at once; then the pieces' lengths tell. Others (a
    character spread over several tokens, a space that only shows behind another token) are decoded as they would be
    streamed: a token's text is what it adds to that of the few before it, once that is whole.
    """
    ids = input_ids.tolist()
    if not ids:
        return "", np.empty(0, np.int64)
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    pieces: list[str] = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    if "".join(pieces) != text:
        pieces = _streamed(ids, tokenizer)
        text = "".join(pieces)
    begins = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])[:-1]
    return text, begins.astype(np.int64)


def _streamed(ids: list[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text. A token that leaves a character unfinished adds nothing yet."""
    pieces = []
    start = shown = 0  # tokens from `start` on are decoded together; those before `shown` have been given out
    for stop in range(1, len(ids) + 1):
        before: str = tokenizer.decode(ids[start:shown], clean_up_tokenization_spaces=False)
        after: str = tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)
        unfinished = after.endswith("\ufffd") and stop < len(ids) and stop - shown < 8
        if unfinished or len(after) <= len(before):
            pieces.append("")
            continue
        pieces.append(after[len(before) :])
        start, shown = shown, stop
    return pieces
