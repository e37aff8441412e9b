"""Splitting a response into its reasoning steps, and mapping the steps onto tokens exactly.

A *splitter* is any function from text to the positions where new steps begin: `"One. Two.\\nThree" -> [4, 10]`. This
file has `sentences` (the default), `lines`, `paragraphs` and `by_pattern`. `token_steps` turns text positions into
ranges of tokens. With any tokenizer, every token is in exactly one step.
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
"""From a text to the character positions where new steps begin, ascending. 0 and the text's length may be left out."""

# never split inside these: code blocks, display and inline mathematics
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
    """Where sentences and lines begin: `"It is 3.14. Next" -> [11]`.

    Nothing is split inside code blocks and mathematics, nor after abbreviations, initials, list numbers (`1. Add`) and
    decimal points. A space belongs to the sentence after it and a newline to the line before it, as in most tokenizers.
    """
    whole = [match.span() for match in _WHOLE.finditer(text)]
    starts = [start for start, _ in whole]
    positions = []
    for match in _SENTENCE_END.finditer(text):
        position = match.end()
        inside = bisect_left(starts, position) - 1
        if inside >= 0 and position < whole[inside][1]:
            continue
        if match[0].startswith(".") and _ABBREVIATION.search(text, max(0, match.start() - 12), match.start() + 1):
            continue
        positions.append(position)
    return positions


def lines(text: str) -> list[int]:
    """Where lines begin. Empty lines belong to the line before them."""
    return [match.end() for match in re.finditer(r"\n+", text)]


def paragraphs(text: str) -> list[int]:
    """Where paragraphs begin: after an empty line."""
    return [match.end() for match in re.finditer(r"\n\s*\n", text)]


@dataclass(frozen=True)
class by_pattern:  # lower case: used like the functions above
    """A splitter that begins a step after each match of a regular expression."""

    pattern: str

    def __call__(self, text: str) -> list[int]:
        return [match.end() for match in re.finditer(self.pattern, text) if match.end() > match.start()]


def token_steps(
    input_ids: IntArray, tokenizer: Any, splitter: Splitter, *, min_tokens: int, max_tokens: int
) -> list[tuple[int, int]]:
    """The steps of a stretch of tokens, as `(start, stop)` ranges that cover it without gap or overlap.

    A token belongs to the step in which its text begins. A step with fewer than `min_tokens` is joined with the next
    one (the last step with the one before it). A step with more than `max_tokens` is cut into equal pieces.

    Args:
        input_ids: `[tokens]` one contiguous stretch of the response.
        tokenizer: anything with `decode` and `batch_decode`, such as a tokenizer of transformers.
        splitter: where steps begin in the text.
        min_tokens: smallest number of tokens in a step, unless the whole stretch is shorter.
        max_tokens: largest number of tokens in a step.

    Raises:
        ValueError: the splitter does not return ascending positions in the text.
    """
    if len(input_ids) == 0:
        return []
    text, begins = text_and_offsets(input_ids, tokenizer)
    positions = step_positions(text, splitter)
    cuts = np.unique(np.concatenate([[0], np.searchsorted(begins, positions), [len(input_ids)]]))
    bounds = [0]
    for cut in cuts[1:].tolist():
        if cut - bounds[-1] >= min_tokens:
            bounds.append(cut)
    if bounds[-1] != len(input_ids):  # the last step is too short: join it with the one before
        bounds[max(len(bounds) - 1, 1) :] = [len(input_ids)]
    steps: list[tuple[int, int]] = []
    for start, stop in pairwise(bounds):
        pieces = -(-(stop - start) // max_tokens)
        edges = [start + (stop - start) * piece // pieces for piece in range(pieces + 1)]
        steps.extend(pairwise(edges))
    return steps


def step_positions(text: str, splitter: Splitter) -> IntArray:
    """`[steps]` the positions where the splitter says that steps begin, ascending; perhaps without 0.

    Raises:
        ValueError: the splitter does not return ascending positions in the text.
    """
    returned = list(splitter(text))
    positions = np.array([position for position in returned if isinstance(position, int | np.integer)], np.int64)
    inside = len(positions) == len(returned) and ((positions >= 0) & (positions <= len(text))).all()
    if not inside or (np.diff(positions) < 0).any():
        raise ValueError(
            f"The splitter returned {returned[:5]} for a text of {len(text)} characters. It must return the positions "
            "of the characters at which new steps begin, from 0, in ascending order (for spans, their starts)."
        )
    return positions


def text_and_offsets(input_ids: IntArray, tokenizer: Any) -> tuple[str, IntArray]:
    """The text of some tokens, and `[tokens]` the character position at which each token begins.

    With most tokenizers, decoding token by token gives the same text as decoding all tokens at once, so the lengths of
    the pieces give the positions. With others (a character spread over several tokens, a space that appears only after
    another token), tokens are decoded as in streaming: a token's text is what it adds to the text of the few tokens
    before it, once its last character is complete.
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
    """The text that each token adds. A token that leaves a character unfinished adds nothing yet."""
    pieces = []
    start = shown = 0  # decode tokens from `start` on together; tokens before `shown` have their text
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
