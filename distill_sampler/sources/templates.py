"""Which tokens of a row are the response, by the same rules on the command line and in trainers.

A row becomes text, the text is tokenised once, and the position of a token in the text decides whether it belongs to
the response:

- a **conversation** is formatted with the chat template. The response is what the template writes for each assistant
  turn, after the generation prompt;
- a **prompt and a completion** that are text are read one after the other, without a template. The response is the
  completion, or only the assistant's turns in it where it is already written in the chat template;
- in a **single text**, the response is the assistant's turns, which stand between the chat template's own markers. The
  markers are taken from a probe conversation.

A token belongs to the response if all of its characters do. A token that begins in the prompt belongs to the prompt,
such as the `"\\n\\n"` that a tokenizer makes of the newline of a header and the first newline of a response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream

from distill_sampler.engines.token_bytes import token_bytes
from distill_sampler.field_docs import documents_fields
from distill_sampler.types import BoolArray, IntArray

Message = Mapping[str, Any]
Span = tuple[int, int]
"""`(first character, one after the last character)`"""

_QUESTION, _ANSWER, _NEXT = "probe-question-1", "probe-answer-1", "probe-question-2"


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Markers:
    """What a chat template writes around a turn of the assistant."""

    header: str
    """Before the turn: `"<|im_start|>assistant\\n"` in ChatML. Empty if the template writes nothing there."""
    end: str
    """After the turn: `"<|im_end|>\\n"` in ChatML. Blank if the template writes nothing there."""
    next_turn: str
    """Between the turn and the user's next message. It ends a turn that has no end marker."""


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Written:
    """A row as text, with the position of the response."""

    text: str
    """What the student reads."""
    responses: tuple[Span, ...]
    """The position of each turn of the response, its end marker included. Empty: nothing shows what is the response."""
    special_tokens: bool
    """Whether the tokenizer adds its own first and last tokens (BOS, EOS). A chat template writes them itself."""
    lost_turns: int = 0
    """Turns of the response that were not found: the template writes them differently when another turn follows."""


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A row as the student reads it."""

    input_ids: list[int]
    """`[tokens]` token ids."""
    is_response: BoolArray
    """`[tokens]` whether the token belongs to the response."""
    ends: list[int]
    """`[tokens]` where in the text each token ends."""


# ---- Rows as text ----


def markers(tokenizer: Any, chat_template: str | None = None) -> Markers | None:
    """The markers of a chat template, found by formatting a probe conversation with it.

    Args:
        tokenizer: a tokenizer of transformers.
        chat_template: a template to use instead of the tokenizer's own.

    Returns:
        The markers; None if there is no template, or it cannot format such a conversation.
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
    # the generation prompt; else what stands before the answer; else what ends the question (Llama 2's [/INST])
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
        messages: the conversation, with roles and contents.
        first: the assistant's messages from this one on are the response.
        tokenizer: a tokenizer of transformers.
        marks: the template's markers. They show where a turn begins if the template has no generation prompt, and find
            turns that it writes differently when another turn follows (without their reasoning, for example).
        options: options of `apply_chat_template`: `chat_template`, `tools`, and the template's own.
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
        prompt: plain text, or text in a chat template up to the assistant's turn.
        completion: what follows the prompt. If it holds the template's markers, only what stands between them is the
            response.
        marks: the template's markers.
    """
    text, start = prompt + completion, len(prompt)
    turns = tuple((max(begin, start), end) for begin, end in _turns(text, marks) if end > start)
    return Written(text=text, responses=turns or ((start, len(text)),), special_tokens=True)


def plain_text(text: str, marks: Markers | None) -> Written:
    """A single text that holds prompt and response. All turns of the assistant are the response."""
    return Written(text=text, responses=_turns(text, marks), special_tokens=True)


def all_of(written: Written) -> Written:
    """The same row with all of its text as the response."""
    return Written(text=written.text, responses=((0, len(written.text)),), special_tokens=written.special_tokens)


def end_token_ids(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """The tokens that end a turn, according to the tokenizer, the generation configuration and the chat template.

    For ChatML models that is `<|im_end|>`, for Llama 3 `<|eot_id|>` and `<|end_of_text|>`. There is no list of models.
    """
    found: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for source in (tokenizer, generation):
        token_ids = getattr(source, "eos_token_id", None)
        found.update([token_ids] if isinstance(token_ids, int) else token_ids or [])
    if getattr(tokenizer, "chat_template", None) and (marks := markers(tokenizer)) is not None:
        tail = tokenizer(marks.end, add_special_tokens=False)["input_ids"]
        found.update(token for token in tail[:1] if token in tokenizer.all_special_ids)
    return tuple(sorted(found))


def is_in_template(prompt: str, completion: str, marks: Markers | None) -> bool:
    """Whether a prompt and a completion are already written in the chat template: its header stands between them."""
    header = "" if marks is None else marks.header.strip()
    return bool(header) and (prompt.rstrip().endswith(header) or completion.lstrip().startswith(header))


def _turns(text: str, marks: Markers | None) -> tuple[Span, ...]:
    """The spans from each header to its end marker, or to the end of the text if there is none."""
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
    """The first span of a marker from `start` on. It includes the white space at the marker's end, as far as it is in
    the text."""
    core = marker.strip()
    place = text.find(core, start) if core else -1
    if place < 0:
        return None
    end = place + len(core)
    tail = marker[marker.index(core) + len(core) :]
    return place, end + _common_prefix(tail, text[end : end + len(tail)])


def _apply(tokenizer: Any, messages: Sequence[Message], *, generate: bool = False, **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate, **options)
    return text


# ---- Text as tokens ----


def tokenised(rows: Sequence[Written], tokenizer: Any) -> list[Tokens]:
    """The tokens of rows, and which of them belong to the response.

    Args:
        rows: the rows as text.
        tokenizer: a fast tokenizer of transformers, which gives the offsets of its tokens.
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
            starts = np.where(ends == 0, -1, starts)  # tokens that the tokenizer added are nowhere in the text
            tokens[place] = Tokens(
                input_ids=input_ids, is_response=_inside(starts, ends, rows[place].responses), ends=ends.tolist()
            )
    return [each for each in tokens if each is not None]


def written_in(row: Written, input_ids: Sequence[int], tokenizer: Any) -> BoolArray | None:
    """Which tokens of a row that was tokenised before belong to its response, without tokenising its text again.

    Args:
        row: the row as text.
        input_ids: the row as tokens, perhaps with one more at the end, such as an EOS.
        tokenizer: a fast tokenizer of transformers.

    Returns:
        `[tokens]`; None if the bytes of the tokens are not those of the text, for example after truncation.
    """
    pieces, text = token_bytes(tokenizer)(input_ids), row.text.encode()
    whole = b"".join(pieces)
    if (whole != text and not (whole.startswith(text) and len(whole) - len(text) == len(pieces[-1]))) or b"" in pieces:
        return None
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    ends = np.cumsum(lengths)
    spans = row.responses
    if len(text) != len(row.text):  # from characters to bytes
        spans = tuple((len(row.text[:begin].encode()), len(row.text[:end].encode())) for begin, end in spans)
    return _inside(ends - lengths, ends, spans)


def text_of(input_ids: Sequence[int], tokenizer: Any) -> tuple[str, IntArray, IntArray]:
    """The text of some tokens.

    Args:
        input_ids: the tokens of one row, perhaps truncated within a character.
        tokenizer: a fast tokenizer of transformers.

    Returns:
        The text, and `[tokens]` where each token begins in it, and `[tokens]` where it ends.
    """
    stream = DecodeStream(skip_special_tokens=False)
    pieces: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    length = 0
    for token in input_ids:
        starts.append(length)
        # None: the token ends within a character
        if (piece := stream.step(tokenizer.backend_tokenizer, token)) is not None:
            length += len(piece)
            pieces.append(piece)
            ends += [length] * (len(starts) - len(ends))
    if len(ends) < len(starts):
        pieces.append("\ufffd")
        ends += [length + 1] * (len(starts) - len(ends))
    return "".join(pieces), np.array(starts, np.int64), np.array(ends, np.int64)


def responses_of(input_ids: Sequence[int], tokenizer: Any, marks: Markers | None) -> BoolArray:
    """`[tokens]` which tokens of a tokenised row belong to the response, by the markers; none without markers."""
    text, starts, ends = text_of(input_ids, tokenizer)
    return _inside(starts, ends, _turns(text, marks))


def cut_off(whole: Sequence[int], kept: Sequence[int]) -> int | None:
    """How many tokens truncation removed from the front of `whole`; None if `kept` is not a piece of it.

    A prepared row may end in an EOS that is not in the text; then `whole` is its beginning.
    """
    length = min(len(whole), len(kept))
    if whole[:length] == kept[:length] and len(kept) <= len(whole) + 1:
        return 0
    if kept == whole[len(whole) - length :]:
        return len(whole) - length
    return None


def _inside(starts: IntArray, ends: IntArray, spans: Sequence[Span]) -> BoolArray:
    """`[tokens]` whether all characters of the token are in one of the spans."""
    inside = np.zeros(len(starts), bool)
    for begin, stop in spans:
        inside |= (begin <= starts) & (ends <= stop)
    return inside


def _reaches_back(tokenizer: Any) -> bool:
    """Whether the tokenizer's offsets leave out white space that its tokens hold (`trim_offsets`).

    Such a token begins where the one before it ends. A tokenizer that discards white space does not count.
    """
    probe = "a  a"
    encoded = tokenizer(probe, add_special_tokens=False, return_offsets_mapping=True)
    covered = sum(end - start for start, end in encoded["offset_mapping"])
    return bool(covered < len(probe) and tokenizer.decode(encoded["input_ids"]).strip() == probe)


def _common_prefix(left: str, right: str) -> int:
    """The number of characters that both begin with."""
    if right.startswith(left):
        return len(left)
    length = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        length += 1
    return length
