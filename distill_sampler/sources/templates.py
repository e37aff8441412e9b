"""Which tokens of a row are the response: one answer, for the command line and for trainers.

A row is written as text, the text is tokenised once, and a token is the response's by where it lies in the text:

- a **conversation** is written with the chat template; the response is what the template writes for each turn of the
  assistant after the generation prompt;
- a **prompt and a completion** that are text are read one after the other, without a template; the response is the
  completion, or the assistant's turns in it where it is written in the chat template already;
- in **one text** the assistant's turns are found between the chat template's own markers, which a probe conversation
  shows.

One rule for tokens at the edge: a token is the response's if all of it lies in the response. A token that begins in the
prompt is the prompt's, such as the `"\\n\\n"` that a tokenizer makes of a header's newline and a response's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream

from distill_sampler.field_docs import documents_fields
from distill_sampler.types import BoolArray, IntArray

Message = Mapping[str, Any]
Span = tuple[int, int]
"""`(first character, the one after the last)`"""

_QUESTION, _ANSWER, _NEXT = "probe-question-1", "probe-answer-1", "probe-question-2"


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Markers:
    """What a chat template writes around a turn of the assistant."""

    header: str
    """Before it: `"<|im_start|>assistant\\n"` in ChatML. Empty where the template writes nothing there."""
    end: str
    """Behind it: `"<|im_end|>\\n"` in ChatML. Blank where the template writes nothing there."""
    next_turn: str
    """Between it and the user's next message: where a turn without an end marker is over."""


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Written:
    """A row as text, with the places of the response."""

    text: str
    """What the student reads."""
    responses: tuple[Span, ...]
    """Where each turn of the response lies, its end marker included. Empty: nothing says which part is the response."""
    special_tokens: bool
    """Whether the tokenizer adds its own first and last tokens (BOS, EOS); a chat template writes them itself."""
    lost_turns: int = 0
    """Turns of the response that could not be told apart: the template writes them differently once others follow."""


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A row as the student reads it."""

    input_ids: list[int]
    """`[tokens]`"""
    is_response: BoolArray
    """`[tokens]` whether the token is the response's, by the rule of this module."""
    ends: list[int]
    """`[tokens]` where in the text each token ends."""


# ---- Rows as text ----


def markers(tokenizer: Any, chat_template: str | None = None) -> Markers | None:
    """The markers of a chat template, taken from a probe conversation that it writes.

    Args:
        tokenizer: of transformers.
        chat_template: to use instead of the tokenizer's own.

    Returns:
        The markers; None if there is no template, or it does not write such a conversation.
    """
    if not (chat_template or tokenizer.chat_template):
        return None
    user, assistant = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}

    def written(*messages: Message, generate: bool = False) -> str:
        return _apply(tokenizer, messages, generate=generate, chat_template=chat_template)

    try:
        whole = written(user, assistant)
        closing = written(user).partition(_QUESTION)[2]
        waiting = written(user, generate=True).partition(_QUESTION)[2]
        more = written(user, assistant, {"role": "user", "content": _NEXT})
    except TemplateError:
        return None
    if not (_QUESTION in whole and _ANSWER in whole):
        return None
    between = whole.partition(_QUESTION)[2].partition(_ANSWER)[0]
    # the generation prompt; without one, what stands before the answer; else what ends the question (Llama 2's [/INST])
    waiting = between[: _common_prefix(waiting, between)]
    candidates = (waiting.removeprefix(closing), between.removeprefix(closing), waiting)
    header = next((candidate for candidate in candidates if candidate.strip()), "")
    next_turn = more.partition(_ANSWER)[2].partition(_NEXT)[0]
    return Markers(header=header, end=whole.partition(_ANSWER)[2], next_turn=next_turn)


def conversation(
    messages: Sequence[Message], first: int, tokenizer: Any, marks: Markers | None = None, **options: Any
) -> Written:
    """A conversation as the chat template writes it.

    Args:
        messages: with roles and contents.
        first: the assistant's messages from here on are the response.
        tokenizer: of transformers.
        marks: the template's markers. They show the header where the template has no generation prompt, and the places
            of turns that it writes differently once others follow (without their reasoning, say).
        options: of `apply_chat_template`: `chat_template`, `tools` and what the template itself takes.
    """
    text = _apply(tokenizer, messages, **options)
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    marked: Sequence[Span | None] = _turns(text, marks)
    if len(marked) != len(turns):
        marked = [None] * len(turns)
    responses, lost = [], 0
    for turn, span in zip(turns, marked, strict=True):
        if turn < first:
            continue
        until = text if turn + 1 == len(messages) else _apply(tokenizer, messages[: turn + 1], **options)
        if text.startswith(until):
            before = _apply(tokenizer, messages[:turn], generate=True, **options) if turn else ""
            begin = _common_prefix(before, text)
            span = max(begin, span[0] if span else 0), len(until)
        if span is None:
            lost += 1
        else:
            responses.append(span)
    return Written(text=text, responses=tuple(responses), special_tokens=False, lost_turns=lost)


def prompt_and_completion(prompt: str, completion: str, marks: Markers | None) -> Written:
    """A prompt and a completion that are text, one after the other, as TRL's `SFTTrainer` reads them.

    Args:
        prompt: plain, or written in a chat template up to the assistant's turn.
        completion: what follows it. Where the template's markers are in it, the response lies between them.
        marks: the template's markers.
    """
    text, start = prompt + completion, len(prompt)
    turns = tuple((max(begin, start), end) for begin, end in _turns(text, marks) if end > start)
    return Written(text=text, responses=turns or ((start, len(text)),), special_tokens=True)


def plain_text(text: str, marks: Markers | None) -> Written:
    """One text that holds prompt and response; all turns of the assistant are the response."""
    return Written(text=text, responses=_turns(text, marks), special_tokens=True)


def all_of(written: Written) -> Written:
    """The same with all of the text as the response."""
    return Written(text=written.text, responses=((0, len(written.text)),), special_tokens=written.special_tokens)


def is_in_template(prompt: str, completion: str, marks: Markers | None) -> bool:
    """Whether a prompt and a completion are written in the chat template already: its header stands between them."""
    header = "" if marks is None else marks.header.strip()
    return bool(header) and (prompt.rstrip().endswith(header) or completion.lstrip().startswith(header))


def _turns(text: str, marks: Markers | None) -> tuple[Span, ...]:
    """What lies between headers and end markers; a turn without an end marker reaches to the end of the text."""
    if marks is None:
        return ()
    turns: list[Span] = []
    found = _find(text, marks.header, 0)
    while found is not None:
        begin = found[1]
        if marks.end.strip():
            stop = (_find(text, marks.end, begin) or (0, len(text)))[1]
        else:
            stop = (_find(text, marks.next_turn, begin) or (len(text), 0))[0]
        if begin < stop:
            turns.append((begin, stop))
        found = _find(text, marks.header, stop)
    return tuple(turns)


def _find(text: str, marker: str, start: int) -> Span | None:
    """Where a marker stands at or after `start`. White space behind it belongs to it as far as the text has it."""
    core = marker.strip()
    place = text.find(core, start) if core else -1
    if place < 0:
        return None
    end = place + len(core)
    behind = marker[marker.index(core) + len(core) :]
    return place, end + _common_prefix(behind, text[end : end + len(behind)])


def _apply(tokenizer: Any, messages: Sequence[Message], *, generate: bool = False, **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate, **options)
    return text


# ---- Text as tokens ----


def tokenised(rows: Sequence[Written], tokenizer: Any) -> list[Tokens]:
    """The tokens of rows, and which of them are the response's.

    Args:
        rows: as text.
        tokenizer: of transformers, one that tells where its tokens lie (`is_fast`).
    """
    if not rows:
        return []
    tokens: list[Tokens | None] = [None] * len(rows)
    reach_back = _reaches_back(tokenizer)
    for special in (False, True):
        places = [place for place, row in enumerate(rows) if row.special_tokens is special]
        if not places:
            continue
        encoded = tokenizer(
            [rows[place].text for place in places],
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        for place, input_ids, offsets in zip(places, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
            if reach_back:
                starts = np.minimum(starts, np.r_[0, np.maximum.accumulate(ends)][:-1])
            starts = np.where(ends == 0, -1, starts)  # what the tokenizer added lies nowhere in the text
            tokens[place] = Tokens(
                input_ids=input_ids, is_response=_inside(starts, ends, rows[place].responses), ends=ends.tolist()
            )
    return [each for each in tokens if each is not None]


def text_of(input_ids: Sequence[int], tokenizer: Any) -> tuple[str, IntArray, IntArray]:
    """The text that tokens stand for.

    Args:
        input_ids: of one row, perhaps cut off within a character.
        tokenizer: of transformers, a fast one.

    Returns:
        The text, and `[tokens]` where in it each token begins and ends.
    """
    stream = DecodeStream(skip_special_tokens=False)
    pieces: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    length = 0
    for token in input_ids:
        starts.append(length)
        # None: the token is the beginning of a character
        if (piece := stream.step(tokenizer.backend_tokenizer, token)) is not None:
            length += len(piece)
            pieces.append(piece)
            ends += [length] * (len(starts) - len(ends))
    if len(ends) < len(starts):
        pieces.append("\ufffd")
        ends += [length + 1] * (len(starts) - len(ends))
    return "".join(pieces), np.array(starts, np.int64), np.array(ends, np.int64)


def responses_of(input_ids: Sequence[int], tokenizer: Any, marks: Markers | None) -> BoolArray:
    """`[tokens]` which tokens of a tokenised row are the response's, by the template's markers; none if it has none."""
    text, starts, ends = text_of(input_ids, tokenizer)
    return _inside(starts, ends, _turns(text, marks))


def cut_off(whole: Sequence[int], kept: Sequence[int]) -> int | None:
    """How many tokens truncation took from the front of `whole`; None if `kept` is no piece of it.

    A prepared row may end in an EOS that is not in the text: `whole` is then its beginning.
    """
    length = min(len(whole), len(kept))
    if whole[:length] == kept[:length] and len(kept) <= len(whole) + 1:
        return 0
    if kept == whole[len(whole) - length :]:
        return len(whole) - length
    return None


def _inside(starts: IntArray, ends: IntArray, spans: Sequence[Span]) -> BoolArray:
    """The rule for tokens at the edge: all of the token lies in the span."""
    inside = np.zeros(len(starts), bool)
    for begin, stop in spans:
        inside |= (begin <= starts) & (ends <= stop)
    return inside


def _reaches_back(tokenizer: Any) -> bool:
    """Whether tokens hold white space that the tokenizer does not count among their characters (`trim_offsets`).

    Such a token begins where the one before it ends. A tokenizer that throws white space away is another matter.
    """
    probe = "a  a"
    encoded = tokenizer(probe, add_special_tokens=False, return_offsets_mapping=True)
    covered = sum(end - start for start, end in encoded["offset_mapping"])
    return bool(covered < len(probe) and tokenizer.decode(encoded["input_ids"]).strip() == probe)


def _common_prefix(left: str, right: str) -> int:
    """Characters that both begin with."""
    if right.startswith(left):
        return len(left)
    length = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        length += 1
    return length
