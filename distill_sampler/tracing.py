"""Provenance tracing, arXiv:2512.20908: which sentences of responses a distilled model owes to its teacher.

Teacher, student (before distillation) and distilled model read the same responses, one model after the other
(`read_responses`), each in its own tokens and chat template. Their log-probabilities are assigned to the same sentences
(`trace`), and the sentences are counted by class and by position in the response, separately for correct and incorrect
answers (`Trace`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from distill_sampler.engines.stored_teacher import StoredTeacher
from distill_sampler.engines.token_bytes import tokens_of
from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.provenance import (
    CLASSES,
    Provenance,
    area_between,
    class_curves,
    class_shares,
    sensitivity,
)
from distill_sampler.metrics.spans import (
    SentenceLogProbs,
    common_sentences,
    log_probs_of_sentences,
    sentence_starts,
)
from distill_sampler.metrics.steps import Splitter, sentences
from distill_sampler.protocols import PassInfo, Reader
from distill_sampler.types import FloatArray, IntArray, Missing, View

MODELS = ("teacher", "student", "distilled")
"""The models that read, in the order of `Traced.by_model`."""


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Response:
    """A response to be traced."""

    where: str
    """Its place in the data, for messages: `"texts.jsonl, line 17"`."""
    prompt: tuple[Mapping[str, Any], ...]
    """The messages before it."""
    text: str
    """The text that the models read."""
    key: Any = None
    """The value of a store's key column, if the teacher is one."""
    correct: bool | None = None
    """Whether its answer is correct; None: unknown."""


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class TokenLogProbs:
    """One model's log-probabilities of the tokens of one response."""

    begins: IntArray
    """`[tokens]` the byte of the response at which each of the model's own tokens begins."""
    surprisal: FloatArray
    """`[tokens]` -log p of each token, in nats."""


def read_responses(
    reader: Reader,
    responses: Sequence[Response],
    *,
    tokenizer: Any,
    plain: bool = False,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[TokenLogProbs | Missing]:
    """A model's log-probabilities of each response, in its own tokens and chat template; or why it has none.

    Args:
        reader: the model.
        responses: the responses to read.
        tokenizer: the model's tokenizer.
        plain: read prompts without a chat template. (A tokenizer without a template always does.)
        progress: called with the number of tokens that have just been read.
    """
    found: list[TokenLogProbs | Missing] = [Missing.NO_RESPONSE] * len(responses)
    views: dict[int, View] = {}
    begins: dict[int, IntArray] = {}
    for place, response in enumerate(responses):
        context = _context(response, tokenizer, plain=plain)
        tokens, at = tokens_of(response.text, tokenizer)
        scored = np.arange(len(context) + len(tokens)) >= max(len(context), 1)  # nothing predicts a first token
        if len(scored) > reader.positions:
            found[place] = Missing.TOO_LONG
        elif scored.any():
            views[place] = View(input_ids=np.concatenate([context, tokens]), scored=scored)
            begins[place] = at[len(at) - int(scored.sum()) :]
    if not views:
        return found
    order = sorted(views, key=lambda place: -len(views[place].input_ids))
    info = PassInfo(
        tokens=sum(int(view.scored.sum()) for view in views.values()),
        examples=[views[place] for place in reversed(order[-64:])],
        progress=progress,
    )
    with reader.open(info) as read:
        while order:
            lengths = np.cumsum([len(views[place].input_ids) for place in order])
            count = max(int(np.searchsorted(lengths, reader.block_tokens, side="right")), 1)
            block, order = order[:count], order[count:]
            for place, stats in zip(block, read([views[place] for place in block]), strict=True):
                finite = bool(np.isfinite(stats.surprisal).all())
                found[place] = (
                    TokenLogProbs(begins=begins[place], surprisal=stats.surprisal) if finite else Missing.NON_FINITE
                )
    return found


def read_store(store: StoredTeacher, responses: Sequence[Response]) -> list[TokenLogProbs | Missing]:
    """The log-probabilities that a teacher has left on disk for each response; or why there are none."""
    found: list[TokenLogProbs | Missing] = []
    for response in responses:
        aligned = store.find(response.text, response.key)
        if aligned is None or not len(aligned.begins):
            found.append(Missing.NOT_APPLICABLE)
        else:
            found.append(TokenLogProbs(begins=aligned.begins, surprisal=aligned.surprisal))
    return found


def _context(response: Response, tokenizer: Any, *, plain: bool) -> IntArray:
    """`[tokens]` the text before a response, up to where the assistant's turn begins."""
    if plain or not tokenizer.chat_template:
        text = "".join(str(message["content"]) for message in response.prompt)
        return np.array(tokenizer(text)["input_ids"], np.int64)
    text = tokenizer.apply_chat_template(list(response.prompt), tokenize=False, add_generation_prompt=True)
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class Traced:
    """A response, sentence by sentence."""

    response: Response
    """The response."""
    starts: IntArray
    """`[sentences]` the byte at which each sentence begins."""
    by_model: tuple[SentenceLogProbs, SentenceLogProbs, SentenceLogProbs]
    """The log-probabilities of the sentences by teacher, student and distilled model."""
    provenance: Provenance
    """The thresholds."""

    @cached_property
    def classes(self) -> IntArray:
        """`[sentences]` the class of each, as a position in `CLASSES`."""
        return self.provenance.classes(*self.by_model)

    @cached_property
    def other_classes(self) -> IntArray:
        """`[sentences]` the same with probabilities by bytes instead of tokens, or by tokens instead of bytes."""
        return self.provenance.other_way.classes(*self.by_model)

    @cached_property
    def probabilities(self) -> FloatArray:
        """`[3, sentences]` by teacher, student and distilled model."""
        return np.stack([each.probability(self.provenance.bytes_per_token) for each in self.by_model])

    @cached_property
    def texts(self) -> list[str]:
        """The sentences."""
        content = self.response.text.encode(errors="surrogatepass")
        ends = np.r_[self.starts[1:], len(content)]
        return [
            content[start:end].decode(errors="replace") for start, end in zip(self.starts.tolist(), ends, strict=True)
        ]


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """The sentences of all responses that all three models could read."""

    traced: tuple[Traced, ...]
    """These responses, in the order of the data."""
    left_out: tuple[tuple[Response, str, Missing], ...]
    """The other responses, each with a model that could not read it, and why."""
    provenance: Provenance
    """The thresholds."""

    @property
    def shares(self) -> FloatArray:
        """`[classes]` the share of all sentences in each class."""
        return class_shares([each.classes for each in self.traced])

    @property
    def num_sentences(self) -> int:
        """The number of sentences of all responses."""
        return sum(len(each.starts) for each in self.traced)

    @property
    def flips(self) -> int:
        """How many sentences have another class if probabilities are normalised the other way."""
        return sum(int((each.classes != each.other_classes).sum()) for each in self.traced)

    def sensitivity(self, at: Sequence[float] = (0.05, 0.1, 0.15)) -> dict[float, FloatArray]:
        """`[classes]` the shares for several values of alpha and beta together."""
        return sensitivity([each.by_model for each in self.traced], self.provenance, at)

    def of(self, correct: bool | None) -> list[IntArray]:
        """The classes of the sentences of all correct responses, of all incorrect ones, or of all."""
        return [each.classes for each in self.traced if correct is None or each.response.correct is correct]

    def curves(self, correct: bool | None = None, bins: int = 10) -> FloatArray:
        """`[bins, classes]` the share of each class by position in the response; NaN if there is no response."""
        return class_curves(self.of(correct), bins)

    def areas(self, bins: int = 10) -> tuple[FloatArray, FloatArray] | None:
        """`[classes]` the area between the curves of correct and incorrect responses, and the signed one; None unless
        there are both."""
        if not (self.of(True) and self.of(False)):
            return None
        return area_between(self.curves(True, bins), self.curves(False, bins))

    def table(self) -> pa.Table:
        """One row for each sentence."""
        columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        for number, each in enumerate(self.traced):
            count = len(each.starts)
            columns["response"] += [number] * count
            columns["where"] += [each.response.where] * count
            columns["correct"] += [each.response.correct] * count
            columns["sentence"] += range(count)
            columns["start"] += each.starts.tolist()
            columns["text"] += each.texts
            columns["class"] += [CLASSES[code] for code in each.classes]
            columns["class_other_way"] += [CLASSES[code] for code in each.other_classes]
            columns["bytes"] += each.by_model[0].num_bytes.tolist()
            for name, of_model in zip(MODELS, each.by_model, strict=True):
                columns[f"p_{name}"] += of_model.probability(self.provenance.bytes_per_token).tolist()
                columns[f"log_p_{name}"] += of_model.log_prob.tolist()
                columns[f"tokens_{name}"] += of_model.tokens.tolist()
        return pa.table({name: pa.array(columns[name], kind) for name, kind in _COLUMNS.items()})


_COLUMNS = {
    "response": pa.int64(),
    "where": pa.string(),
    "correct": pa.bool_(),
    "sentence": pa.int64(),
    "start": pa.int64(),
    "bytes": pa.int64(),
    "text": pa.string(),
    "class": pa.string(),
    "class_other_way": pa.string(),
    **{f"{what}_{name}": kind for name in MODELS for what, kind in (("p", pa.float64()), ("log_p", pa.float64()))},
    **{f"tokens_{name}": pa.int64() for name in MODELS},
}


def trace(
    responses: Sequence[Response],
    readings: Mapping[str, Sequence[TokenLogProbs | Missing]],
    *,
    provenance: Provenance,
    splitter: Splitter = sentences,
) -> Trace:
    """Assign the log-probabilities of three models to the same sentences.

    Args:
        responses: the responses that they read.
        readings: for each of `MODELS`, its log-probabilities of every response.
        provenance: the thresholds.
        splitter: finds where sentences begin.
    """
    traced, left_out = [], []
    for place, response in enumerate(responses):
        found = [readings[name][place] for name in MODELS]
        missing = [
            (response, name, each) for name, each in zip(MODELS, found, strict=True) if isinstance(each, Missing)
        ]
        left_out += missing[:1]
        read = [each for each in found if isinstance(each, TokenLogProbs)]
        if len(read) < len(MODELS):
            continue
        starts = common_sentences(sentence_starts(response.text, splitter), *(each.begins for each in read))
        num_bytes = len(response.text.encode(errors="surrogatepass"))
        teacher, student, distilled = (
            log_probs_of_sentences(starts, num_bytes, each.begins, each.surprisal) for each in read
        )
        traced.append(
            Traced(response=response, starts=starts, by_model=(teacher, student, distilled), provenance=provenance)
        )
    return Trace(traced=tuple(traced), left_out=tuple(left_out), provenance=provenance)
