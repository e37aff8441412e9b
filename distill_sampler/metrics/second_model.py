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

from distill_sampler.engines.alignment import Aligned
from distill_sampler.engines.stored_teacher import StoredTeacher
from distill_sampler.engines.token_bytes import tokens_of
from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.provenance import Provenance
from distill_sampler.metrics.response import response_view
from distill_sampler.metrics.spans import (
    SentenceLogProbs,
    common_sentences,
    log_probs_of_sentences,
    sentence_starts,
    stretches,
    text_and_begins,
)
from distill_sampler.metrics.steps import Splitter, sentences
from distill_sampler.protocols import Metric, Reader
from distill_sampler.serialize import described
from distill_sampler.types import FloatArray, IntArray, Sample, TokenStats, View
from distill_sampler.vocabulary import shared_columns

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
        tokens, at = tokens_of(turn, own)
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


SecondModel = Reader | StoredTeacher | str
"""A model that reads, numbers that one has left on disk, or the path of such a store (`.arrow`)."""


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

    def __post_init__(self) -> None:
        name, model = self.second
        if isinstance(model, str) and model.endswith(".arrow"):
            object.__setattr__(self, name, StoredTeacher(model))
        elif not isinstance(model, Reader | StoredTeacher | str):
            raise ValueError(f"{type(self).__name__}({name}={model!r}): {_WHAT_IT_TAKES}")

    def __repr__(self) -> str:
        """The configuration as text, the same in every process."""
        return described(self)

    @property
    @abstractmethod
    def second(self) -> tuple[str, SecondModel]:
        """The name of the field with the second model, and its value."""

    @property
    def readers(self) -> Mapping[str, Reader]:
        name, model = self.second
        return {name: model} if isinstance(model, Reader) else {}

    @property
    def uses_columns(self) -> tuple[str, ...]:
        _, model = self.second
        key = model.key_column if isinstance(model, StoredTeacher) else None
        return tuple(dict.fromkeys(name for name in (self.prompt, key) if name is not None))

    def with_tokenizer(self, tokenizer: Any) -> Self:
        made = replace(self, tokenizer=tokenizer) if self.tokenizer is None else self
        made.check_vocabulary()
        return made

    def check_vocabulary(self, sample: Sample | None = None) -> None:
        """Check, as far as sizes tell, that a second model without a tokenizer of its own has the student's vocabulary.

        Args:
            sample: what it is to read.

        Raises:
            ValueError: it has another one.
        """
        name, model = self.second
        size = model.vocabulary if isinstance(model, Reader) and model.tokenizer is None else None
        if size is None:
            return
        if self.tokenizer is not None:
            tokens, told = len(self.tokenizer), "the student's tokenizer has {} tokens"
        elif sample is not None:
            tokens, told = max(size, int(sample.input_ids.max()) + 1), "the student reads tokens up to number {}"
        else:
            return
        wrong = (
            f"{type(self).__name__}({name}=): the model predicts {size} tokens and {told.format(tokens)}, so it has "
            "another vocabulary and cannot read the student's tokens. Give its own tokenizer: "
            f"{name}=ModelReader(model, tokenizer=…)."
        )
        shared_columns(size, tokens=tokens, otherwise=wrong)

    def views(self, sample: Sample) -> Sequence[View] | None:
        name, model = self.second
        if isinstance(model, str):  # as a file of scores names it
            raise ValueError(f"{type(self).__name__}({name}={model!r}): {_WHAT_IT_TAKES}")
        if isinstance(model, StoredTeacher):
            return None if self._stored(sample, model) is None else (response_view(sample),)
        own = self._own(sample, name, model)
        return None if own is None else (response_view(sample), own.view)

    def read_by_second(self, sample: Sample, stats: Sequence[TokenStats]) -> tuple[IntArray | None, FloatArray]:
        """What the second model makes of the response.

        Returns:
            `[tokens]` the byte of the response's text at which each of its tokens begins, or None if they are the
            student's; and `[tokens]` their surprisals in nats.
        """
        name, model = self.second
        if isinstance(model, StoredTeacher):
            stored = self._stored(sample, model)
            assert stored is not None, "there was a view"
            return stored.begins, stored.surprisal
        assert isinstance(model, Reader), "there was a view"
        own = self._own(sample, name, model)
        assert own is not None, "there was a view"
        return own.begins, stats[1].surprisal

    def second_reads_same_tokens(self, sample: Sample) -> bool:
        """Whether the second model's tokens of the response are the student's, one by one."""
        _, model = self.second
        if isinstance(model, StoredTeacher):
            stored = self._stored(sample, model)
            return stored is not None and np.array_equal(stored.token_ids, sample.input_ids[sample.scored])
        return isinstance(model, Reader) and (model.tokenizer is None or model.tokenizer is self.tokenizer)

    def text(self, sample: Sample) -> ResponseText:
        """The text of the response.

        Raises:
            ValueError: there is no tokenizer to decode the sample's tokens.
        """
        if self.tokenizer is None:
            kind = type(self).__name__
            raise ValueError(f"{kind} reads text, so it needs a tokenizer: pass {kind}(tokenizer=…). attach does this.")
        return response_text(sample, self.tokenizer)

    def _own(self, sample: Sample, name: str, reader: Reader) -> OwnTokens | None:
        """The sample as a second model reads it; None if it has no token to say something of."""
        if self.second_reads_same_tokens(sample):
            self.check_vocabulary(sample)
            return OwnTokens(view=replace(response_view(sample), reader=name), begins=None)
        self.text(sample)  # refuses without a tokenizer
        return own_tokens(sample, name, reader, self.tokenizer, self.prompt)

    def _stored(self, sample: Sample, store: StoredTeacher) -> Aligned | None:
        """What a store has of the response; None if that is nothing, or too little of it."""
        key = None if store.key_column is None else sample.columns[store.key_column]
        found = store.find("".join(self.text(sample).turns), key)
        return found if found is not None and len(found.begins) else None


_WHAT_IT_TAKES = (
    "give a store of log-probabilities (a file ending in .arrow, which distill-sampler teacher-logprobs writes) or a "
    "reader, such as ModelReader(model, tokenizer=…)."
)


@documents_fields
@dataclass(frozen=True, kw_only=True, repr=False)
class SentenceMetric(SecondModelMetric):
    """Abstract base of metrics that compare the teacher's and the student's log-probabilities of each sentence."""

    teacher: SecondModel
    """The teacher: the path of a store of its log-probabilities (`.arrow`), or a `ModelReader`, with `tokenizer=` if
    that is not the student's."""
    splitter: Splitter = sentences
    """Function from text to the positions where sentences begin; see `distill_sampler.metrics.steps`."""
    bytes_per_token: float | None = None
    """How a sentence's log-probability is normalised. None: by the number of the model's own tokens, as in the paper. A
    number, such as 4: by the sentence's bytes divided by it, which does not favour tokenizers with many tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Provenance(bytes_per_token=self.bytes_per_token)  # refuses what is no number of bytes

    @property
    def second(self) -> tuple[str, SecondModel]:
        return "teacher", self.teacher

    def views(self, sample: Sample) -> Sequence[View] | None:
        self.text(sample)  # refuses without a tokenizer, before anything is read
        return super().views(sample)

    def by_sentence(self, sample: Sample, stats: Sequence[TokenStats]) -> tuple[SentenceLogProbs, SentenceLogProbs]:
        """The log-probabilities of each sentence of the response by the teacher and by the student, in this order.

        Raises:
            ValueError: there is no tokenizer, or the splitter does not return ascending positions in the text.
        """
        response = self.text(sample)
        *turn_starts, num_bytes = response.turn_starts
        try:
            of_turns = [sentence_starts(turn, self.splitter) for turn in response.turns]
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}, sample {sample.index}: {error}") from error
        starts = np.concatenate([own + first for own, first in zip(of_turns, turn_starts, strict=True)])
        begins, surprisal = self.read_by_second(sample, stats)
        begins = response.begins if begins is None else begins
        starts = common_sentences(starts, begins, response.begins)
        return (
            log_probs_of_sentences(starts, num_bytes, begins, surprisal),
            log_probs_of_sentences(starts, num_bytes, response.begins, stats[0].surprisal),
        )
