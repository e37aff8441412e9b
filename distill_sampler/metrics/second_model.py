"""The base of metrics that let a second model, such as a teacher, read the response too.

A second model with the student's tokenizer reads the student's tokens. One with another tokenizer reads the same text
in its own tokens: first the context, then each turn of the response. Each turn is tokenised separately, as it is after
a generation prompt, so that both models read exactly the same bytes of the response.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.response import response_view
from distill_sampler.metrics.spans import (
    SentenceLogProbs,
    common_sentences,
    log_probs_of_sentences,
    sentence_starts,
    stretches,
    text_and_begins,
    tokens_and_begins,
)
from distill_sampler.metrics.steps import Splitter, sentences
from distill_sampler.protocols import Metric, Reader
from distill_sampler.serialize import described
from distill_sampler.types import IntArray, Sample, TokenStats, View

_TEXTS: WeakKeyDictionary[Sample, dict[int, ResponseText]] = WeakKeyDictionary()
_VIEWS: WeakKeyDictionary[Sample, dict[tuple[str, str, str | None], OwnTokens]] = WeakKeyDictionary()
"""Caches for the samples that are being scored, so that a metric's `reduce` does not repeat the work of `views`."""


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class ResponseText:
    """The text of a sample's response."""

    turns: tuple[str, ...]
    """The text of each turn."""
    begins: IntArray
    """`[tokens]` the byte at which each of the student's tokens begins, in the text of all turns end to end."""

    @property
    def turn_starts(self) -> list[int]:
        """The byte at which each turn begins, and at the end the number of bytes."""
        return [0, *accumulate(len(turn.encode(errors="surrogatepass")) for turn in self.turns)]


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class OwnTokens:
    """A sample as a second model reads it."""

    view: View
    """The sample in the model's own tokens, with those of the response scored."""
    begins: IntArray | None
    """`[scored tokens]` the byte of the response's text at which each token begins. None: they are the student's."""


def response_text(sample: Sample, tokenizer: Any) -> ResponseText:
    """The text of a sample's response, as the student's tokenizer decodes it."""
    known = _TEXTS.setdefault(sample, {})
    if id(tokenizer) not in known:
        turns, begins, num_bytes = [], [], 0
        for start, stop in stretches(sample.scored):
            text, own = text_and_begins(sample.input_ids[start:stop], tokenizer)
            turns.append(text)
            begins.append(own + num_bytes)
            num_bytes += len(text.encode(errors="surrogatepass"))
        known[id(tokenizer)] = ResponseText(turns=tuple(turns), begins=np.concatenate(begins))
    return known[id(tokenizer)]


def own_tokens(sample: Sample, name: str, reader: Reader, tokenizer: Any, prompt: str | None) -> OwnTokens | None:
    """A sample as a second model reads it; None if no token of the response can be scored.

    Args:
        sample: the sample, with the column `prompt` if that is given.
        name: the metric's name for the reader.
        reader: the second model, which has its own tokenizer.
        tokenizer: the student's tokenizer.
        prompt: the column with the prompt, as text or messages, to be formatted with the second model's chat template.
            None: the model reads the text before the response as the student's template wrote it.
    """
    known = _VIEWS.setdefault(sample, {})
    key = (name, reader.identity, prompt)
    if key not in known:
        made = _own_tokens(sample, name, reader.tokenizer, tokenizer, prompt)
        if made is None:
            return None
        known[key] = made
    return known[key]


def _own_tokens(sample: Sample, name: str, own: Any, tokenizer: Any, prompt: str | None) -> OwnTokens | None:
    response = response_text(sample, tokenizer)
    input_ids: list[IntArray] = []
    scored, begins = [], []
    before = 0
    for turn, (start, stop), first_byte in zip(
        response.turns, stretches(sample.scored), response.turn_starts, strict=False
    ):
        if before == 0 and prompt is not None:
            context = _prompt_in_template(sample.columns[prompt], own, prompt)
        else:
            written = tokenizer.decode(sample.input_ids[before:start].tolist(), clean_up_tokenization_spaces=False)
            context = own(written, add_special_tokens=before == 0)["input_ids"]
        tokens, at = tokens_and_begins(turn, own)
        input_ids += [np.array(context, np.int64), tokens]
        scored += [np.zeros(len(context), bool), np.ones(len(tokens), bool)]
        begins.append(at + first_byte)
        before = stop
    flags = np.concatenate(scored)
    if len(flags) and flags[0]:  # there is no context, so nothing predicts the first token
        flags[0], begins[0] = False, begins[0][1:]
    if not flags.any():
        return None
    view = View(input_ids=np.concatenate(input_ids), scored=flags, reader=name)
    return OwnTokens(view=view, begins=np.concatenate(begins))


def _prompt_in_template(value: Any, tokenizer: Any, column: str) -> list[int]:
    """The tokens of a prompt in a model's own chat template, up to where its turn begins."""
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, Sequence) or not all(isinstance(each, Mapping) for each in messages):
        raise ValueError(
            f"prompt='{column}': the column holds a {type(value).__name__}. It must hold text, or messages with role "
            "and content."
        )
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"prompt='{column}': {type(tokenizer).__name__} has no chat template to format the prompt with. Leave "
            "prompt= out; the model then reads the prompt as the student does."
        )
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


@documents_fields
@dataclass(frozen=True, kw_only=True, repr=False)
class SecondModelMetric(Metric):
    """Abstract base of metrics that compare the student's statistics of a response with those of another model."""

    name: str = ""
    """Its name in policies, and the column of the score."""
    prompt: str | None = None
    """Column with the prompt, as text or messages, which a second model with its own tokenizer reads in its own chat
    template. None: it reads the text before the response as the student's template wrote it."""
    tokenizer: Any = field(default=None, compare=False)
    """Decodes the student's tokens. `attach` and the command line fill it in; in your own loop, pass it yourself."""

    def __repr__(self) -> str:
        """The configuration as text, the same in every process."""
        return described(self)

    @property
    @abstractmethod
    def readers(self) -> Mapping[str, Reader]:
        """The second model, under the name of its field."""

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return () if self.prompt is None else (self.prompt,)

    def with_tokenizer(self, tokenizer: Any) -> Self:
        return replace(self, tokenizer=tokenizer) if self.tokenizer is None else self

    def views(self, sample: Sample) -> Sequence[View] | None:
        own = self.own_tokens(sample)
        return None if own is None else (response_view(sample), own.view)

    def own_tokens(self, sample: Sample) -> OwnTokens | None:
        """The sample as the second model reads it; None if no token of the response can be scored.

        Raises:
            ValueError: the second model has a tokenizer of its own, and there is none to decode the sample's tokens.
        """
        ((name, reader),) = self.readers.items()
        if reader.tokenizer is None or reader.tokenizer is self.tokenizer:
            return OwnTokens(view=replace(response_view(sample), reader=name), begins=None)
        self._require_tokenizer()
        return own_tokens(sample, name, reader, self.tokenizer, self.prompt)

    def _require_tokenizer(self) -> None:
        if self.tokenizer is None:
            kind = type(self).__name__
            raise ValueError(f"{kind} reads text, so it needs a tokenizer: pass {kind}(tokenizer=…). attach does this.")


@documents_fields
@dataclass(frozen=True, kw_only=True, repr=False)
class SentenceMetric(SecondModelMetric):
    """Abstract base of metrics that compare the teacher's and the student's log-probabilities of each sentence."""

    teacher: Reader
    """The teacher: a `ModelReader`, with `tokenizer=` if that is not the student's."""
    splitter: Splitter = sentences
    """Function from text to the positions where sentences begin; see `distill_sampler.metrics.steps`."""
    bytes_per_token: float | None = None
    """How a sentence's log-probability is normalised. None: by the number of the model's own tokens, as in the paper. A
    number, such as 4: by the sentence's bytes divided by it, which does not favour tokenizers with many tokens."""

    @property
    def readers(self) -> Mapping[str, Reader]:
        return {"teacher": self.teacher}

    def by_sentence(self, sample: Sample, stats: Sequence[TokenStats]) -> tuple[SentenceLogProbs, SentenceLogProbs]:
        """The log-probabilities of each sentence of the response by the teacher and by the student, in this order.

        Raises:
            ValueError: there is no tokenizer, or the splitter does not return ascending positions in the text.
        """
        self._require_tokenizer()
        own = self.own_tokens(sample)
        assert own is not None, "there was a view"
        response = response_text(sample, self.tokenizer)
        begins = response.begins if own.begins is None else own.begins
        *turn_starts, num_bytes = response.turn_starts
        try:
            starts = np.concatenate(
                [
                    sentence_starts(turn, self.splitter) + first
                    for turn, first in zip(response.turns, turn_starts, strict=True)
                ]
            )
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}, sample {sample.index}: {error}") from error
        starts = common_sentences(starts, begins, response.begins)
        student, teacher = stats
        return (
            log_probs_of_sentences(starts, num_bytes, begins, teacher.surprisal),
            log_probs_of_sentences(starts, num_bytes, response.begins, student.surprisal),
        )
