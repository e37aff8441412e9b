"""Sentences as spans of bytes of a response's text, which models with different tokenizers have in common.

Every model reads the whole text in its own tokens. Two rules make the log-probability of a sentence unambiguous:

- a token belongs to the sentence in which its text *begins* (the rule of `engines.alignment` and `steps`);
- if no token of some model begins in a sentence, its text is part of a token of the sentence before it, so the two are
  joined, for all models. (The first sentence is joined with the one after it.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_sampler.engines.alignment import byte_starts, per_span
from distill_sampler.engines.token_bytes import token_bytes
from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.steps import Splitter, step_positions, text_and_offsets
from distill_sampler.types import FloatArray, IntArray


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class SentenceLogProbs:
    """One model's log-probabilities of the sentences of one response."""

    log_prob: FloatArray
    """`[sentences]` log-probability of a sentence given all before it, in nats: the sum over its tokens, float64."""
    tokens: IntArray
    """`[sentences]` how many of the model's own tokens begin in the sentence, at least 1."""
    num_bytes: IntArray
    """`[sentences]` bytes of its text in UTF-8, the same for all models."""

    def probability(self, bytes_per_token: float | None = None) -> FloatArray:
        """`[sentences]` the geometric mean of the probabilities of a sentence's tokens, in (0, 1].

        Args:
            bytes_per_token: None: the log-probability is divided by the number of the model's own tokens, as in
                arXiv:2512.20908. A tokenizer with more tokens for the same sentence then gives the higher mean: -12
                nats are 0.47, 0.55 or 0.62 in 16, 20 or 25 tokens. A number: it is divided by the sentence's bytes over
                that number, which is the same for every model.
        """
        tokens = self.tokens if bytes_per_token is None else self.num_bytes / bytes_per_token
        return np.exp(self.log_prob / tokens)


def sentence_starts(text: str, splitter: Splitter) -> IntArray:
    """`[sentences]` the bytes of the text at which sentences begin, the first one at 0: `"é. Yes" -> [0, 3]`.

    Raises:
        ValueError: the splitter does not return ascending positions in the text.
    """
    positions = step_positions(text, splitter)
    inside = positions[(positions > 0) & (positions < len(text))]
    return byte_starts(text, np.unique(np.r_[0, inside]))


def common_sentences(starts: IntArray, *begins: IntArray) -> IntArray:
    """`[sentences]` the starts of those sentences in which a token of every model begins. The others are joined to
    them.

    Args:
        starts: `[all sentences]` bytes at which sentences begin, the first one at 0.
        begins: for each model `[tokens]` the bytes at which its tokens begin, ascending, at least one.
    """
    assert all(len(each) for each in begins), "every model has a token"
    counts = [np.diff(np.r_[np.searchsorted(each, starts), len(each)]) for each in begins]
    kept = starts[np.all([each > 0 for each in counts], axis=0)]
    return np.concatenate([[0], kept[1:]])  # what comes before the first such sentence is joined with it


def log_probs_of_sentences(
    starts: IntArray, num_bytes: int, begins: IntArray, surprisal: FloatArray
) -> SentenceLogProbs:
    """The log-probabilities of sentences from those of tokens.

    Args:
        starts: `[sentences]` from `common_sentences`.
        num_bytes: how many bytes the whole text has.
        begins: `[tokens]` the byte at which each token of the model begins.
        surprisal: `[tokens]` the surprisal of each token, in nats.
    """
    sums, tokens = per_span(begins, surprisal, starts)
    return SentenceLogProbs(log_prob=-sums, tokens=tokens, num_bytes=np.diff(np.r_[starts, num_bytes]))


def text_and_begins(input_ids: IntArray, tokenizer: Any) -> tuple[str, IntArray]:
    """The text of some tokens, and `[tokens]` the byte of it at which each token begins.

    Where the bytes of the tokens are known and are those of the text, positions are exact, and found ten times as fast.
    Else a token that is a later part of a character begins where the character does.
    """
    if getattr(tokenizer, "is_fast", False):
        try:
            pieces = token_bytes(tokenizer)(input_ids)
            text = b"".join(pieces).decode()
        except ValueError:  # cut within a character, or a token that the tokenizer does not have
            pieces, text = [], ""
        if pieces and text == tokenizer.decode(input_ids.tolist(), clean_up_tokenization_spaces=False):
            return text, np.cumsum([0, *map(len, pieces[:-1])], dtype=np.int64)
    text, offsets = text_and_offsets(input_ids, tokenizer)
    return text, byte_starts(text, offsets)


def stretches(scored: Sequence[bool] | np.ndarray[Any, np.dtype[np.bool_]]) -> list[tuple[int, int]]:
    """The ranges of tokens that are scored: one for each turn of the response, `F T T F T -> (1, 3), (4, 5)`."""
    edges = np.flatnonzero(np.diff(np.r_[0, np.asarray(scored, np.int8), 0]))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
