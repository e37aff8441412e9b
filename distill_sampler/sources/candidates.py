"""Turns rows into candidates: finds out what each column is for, and reads nested responses and all forms of messages.

Where the user does not say what a column is for, its name decides, and every such guess is printed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from distill_sampler.column_names import GROUPS, TEACHERS
from distill_sampler.dataset import IGNORED_LABEL
from distill_sampler.sources.files import Bad, GivenRows, Row, Sources

Message = dict[str, Any]

PROMPTS = ("prompt", "question", "instruction", "problem", "query", "input")
RESPONSES = ("response", "completion", "output", "solution", "generation", "answer", "text", "content")
MESSAGES = ("messages", "conversations", "conversation")
TOKENS = "input_ids"
"""The column of rows that are already tokenised. It is only read where there is no text, which fits any student."""
MASKS = ("completion_mask", "assistant_masks")
"""Columns that replace labels for tokenised rows: 1 where a token is trained on."""
TEXT = "text"
"""The column that holds prompt and response in one text, if there is no prompt column."""
NESTED = ("candidates", "responses", "completions", "generations", "solutions", "outputs", "traces")

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Roles by their names in ShareGPT's format."""
_EMPTY = (None, "")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which column holds what. None: the user has not said; after `completed`: there is no such column."""

    prompt: str | None = None
    response: str | None = None
    messages: str | None = None
    text: str | None = None
    """Column with prompt and response in one text."""
    candidates: str | None = None
    """Column with several responses to the row's prompt."""
    tokens: str | None = None
    """Column with token ids of prompt and response, where there is no text."""
    group: str | None = None
    teacher: str | None = None

    def completed(self, values: Mapping[str, Any]) -> Layout:
        """The layout with guesses for what the user has not said, from the first row.

        Args:
            values: the columns of the first row with their values.

        Raises:
            ValueError: there is no column of a given name, or no column that can be a response.
        """
        columns = ", ".join(f"'{name}'" for name in values)

        def first(names: Sequence[str], fits: Callable[[Any], bool] = lambda value: True) -> str | None:
            return next((name for name in names if name in values and fits(values[name])), None)

        guess = self
        if not (self.response or self.messages or self.text or self.candidates):
            messages = first(MESSAGES, _is_conversation)
            nested = None if messages else first(NESTED, _is_nested)
            guess = replace(guess, messages=messages, candidates=nested)
        if not (guess.messages or guess.text):
            guess = replace(guess, prompt=guess.prompt or first(PROMPTS))
            if not guess.candidates:
                names = tuple(name for name in RESPONSES if name != guess.prompt)
                guess = replace(guess, response=guess.response or first(names))
            if not guess.prompt and not self.response and guess.response == TEXT and isinstance(values[TEXT], str):
                guess = replace(guess, response=None, text=TEXT)
        text_is_there = guess.messages or guess.text or (guess.prompt and (guess.response or guess.candidates))
        if not text_is_there and not (self.prompt or self.response) and first((TOKENS,), _is_tokens):
            guess = replace(guess, prompt=None, response=None, tokens=TOKENS)
        guess = replace(guess, group=guess.group or first(GROUPS), teacher=guess.teacher or first(TEACHERS))
        for part in fields(self):
            name = getattr(self, part.name)
            # a nested candidate may have its own response and teacher
            if name and name not in values and not (guess.candidates and part.name in ("response", "teacher")):
                raise ValueError(f"--{part.name}-column: the data has no column '{name}', only {columns}.")
        if not text_is_there and not guess.tokens:
            raise ValueError(
                f"None of the columns ({columns}) looks like a prompt with a response, or like messages. Name them "
                "with --prompt-column and --response-column, or with --messages-column. Tokenised rows need a column "
                f"'{TOKENS}'."
            )
        return guess

    def describe(self) -> str:
        """The layout in words, such as `prompt = 'question', response = 'answer'`."""
        parts = (f"{part.name} = '{getattr(self, part.name)}'" for part in fields(self) if getattr(self, part.name))
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One response to one prompt."""

    where: str
    """Its place in the data, for messages: `"candidates.jsonl, line 17"`."""
    messages: list[Message]
    """The conversation. A prompt given as text is one message of the user."""
    first: int
    """The assistant's messages from this one on are the response."""
    as_text: bool
    """Whether prompt and response were given as text, not as messages."""
    group: str
    """Equal for the responses to one prompt."""
    teacher: str | None
    """Who wrote the response."""
    text: str | None = None
    """Prompt and response in one text; then there are no `messages`."""
    input_ids: Sequence[int] | None = None
    """Prompt and response as tokens; then there are no `messages` and no `text`."""
    labels: Sequence[int] | None = None
    """The labels of the tokens, -100 where a token is not trained on; None: all are trained on."""
    tools: Any = None
    """Tools for the chat template."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns with a single value: domain, correctness, the number of the sample."""
    read: Mapping[str, Any] = field(default_factory=dict)
    """The values of the columns that metrics read, of any type."""

    @property
    def content_hash(self) -> int:
        """64 bits of everything that its scores depend on: the text of prompt and response, the tools that the template
        writes, and the values that metrics read. The row's place in the data does not matter."""
        more = {name: value for name, value in (("tools", self.tools), ("read", self.read)) if value}
        if self.input_ids is not None:
            return _hash([list(self.input_ids), self.labels and list(self.labels), more])
        if self.text is not None:
            return _hash([self.text, more] if more else self.text)
        return _hash([self.messages, self.first, more] if more else [self.messages, self.first])

    @property
    def prompt_hash(self) -> int:
        """64 bits of the prompt, or of the group where prompt and response are one text or tokens. Equal for candidates
        that can be compared."""
        return _hash(_asked(self.messages, self.first) if self.messages else self.group)

    @property
    def prompt_text(self) -> str:
        """The user's first message, to be shown; all of a text that holds prompt and response; empty for tokens."""
        if self.text is not None:
            return self.text
        return next((str(message["content"]) for message in self.messages if message["role"] == "user"), "")


def read_candidates(
    sources: Sources | GivenRows,
    given: Layout,
    *,
    read: Sequence[str] = (),
    option: str = "--metrics",
    announce: Callable[[Layout], None] = lambda layout: None,
) -> Iterator[Candidate | Bad]:
    """Every candidate of the data, in order. The layout is guessed once, from the first row.

    Args:
        sources: the data.
        given: the columns that the user has named.
        read: further columns that are needed, such as those that metrics read.
        option: which option needs them, for error messages.
        announce: called with the layout once it is complete.

    Raises:
        ValueError: the layout cannot be guessed, a column that is needed is missing, or there are no rows.
    """
    layout: Layout | None = None
    empty = True
    for row in sources:
        empty = False
        if isinstance(row, Bad):
            yield row
            continue
        if layout is None:
            layout = given.completed(row.values)
            if not layout.candidates and (lacking := [name for name in read if name not in row.values]):
                raise ValueError(
                    f"{option}: the column '{lacking[0]}' is needed, but is not in the data, only "
                    f"{', '.join(map(repr, row.values))}. Add the column, or leave out what reads it."
                )
            announce(layout)
        try:
            found = list(_candidates(row, layout, read))
            # JSON can hold half of a surrogate pair, which cannot be stored or tokenised as text
            json.dumps([[c.messages, c.text, c.group, c.teacher, c.extra] for c in found], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            yield Bad(where=row.where, reason="its text holds half a surrogate pair, which is not a character")
        except ValueError as error:
            yield Bad(where=row.where, reason=str(error))
        else:
            yield from found
    if empty:
        raise ValueError(f"There are no rows in {', '.join(sources.data)}.")


def _candidates(row: Row, layout: Layout, read: Sequence[str]) -> Iterator[Candidate]:
    values = row.values
    for part in ("prompt", "response", "messages", "text", "candidates", "tokens"):
        name = getattr(layout, part)
        if name and name not in values and not (layout.candidates and part == "response"):
            raise ValueError(f"it has no column '{name}' (only {', '.join(values)}), unlike the first row")
    tools = values.get("tools") or None
    used = {*vars(layout).values(), "tools"}
    extra = {k: v for k, v in values.items() if k not in used and isinstance(v, (str, bool, int, float, type(None)))}
    group, teacher = values.get(layout.group or ""), values.get(layout.teacher or "")
    common: dict[str, Any] = {"group": group, "tools": tools}
    if layout.messages:
        messages = _conversation(values[layout.messages], layout.messages)
        common |= {"teacher": teacher, "extra": extra, "read": _values_of(values, read)}
        yield _candidate(row.where, messages, 0, False, **common)
        return
    if layout.tokens:
        yield _tokenised(row.where, values, group, teacher, extra, _values_of(values, read))
        return
    if layout.text:
        yield _written(row.where, values[layout.text], group, teacher, extra, _values_of(values, read))
        return
    prompt = values[layout.prompt or ""]
    before = [_user(prompt, layout.prompt)] if not _is_conversation(prompt) else _conversation(prompt, layout.prompt)
    if not layout.candidates:
        common |= {"teacher": teacher, "extra": extra, "read": _values_of(values, read)}
        yield _answered(row.where, prompt, before, values[layout.response or ""], **common)
        return
    nested = values[layout.candidates]
    if not _is_nested(nested):
        raise ValueError(f"'{layout.candidates}' holds no responses")
    names: Sequence[str | None] = [None] * len(nested)
    if isinstance(nested, Mapping):
        names, nested = list(nested), list(nested.values())
    for number, (name, response) in enumerate(zip(names, nested, strict=True), 1):
        who, own, own_values = name or teacher, extra, values
        if isinstance(response, Mapping):
            own_values = {**values, **response}
            of = [key for key in (layout.response, *RESPONSES) if key in response]
            by = [key for key in (layout.teacher, *TEACHERS) if key in response]
            if not of:
                raise ValueError(f"candidate {number} has no response (only {', '.join(response)})")
            who = response[by[0]] if by else who
            scalars = {k: v for k, v in response.items() if isinstance(v, (str, bool, int, float, type(None)))}
            own = {**extra, **{k: v for k, v in scalars.items() if k not in (of[0], *by[:1])}}
            response = response[of[0]]
        where = f"{row.where}, candidate {number}"
        common |= {"teacher": who, "extra": own, "read": _values_of(own_values, read)}
        yield _answered(where, prompt, before, response, **common)


def _values_of(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The values of the columns that metrics read."""
    if lacking := [name for name in names if name not in values]:
        raise ValueError(f"it has no column '{lacking[0]}', which a metric reads")
    return {name: values[name] for name in names}


def _answered(where: str, prompt: Any, before: list[Message], response: Any, **common: Any) -> Candidate:
    """A candidate from a prompt (`before`: its messages) and a response."""
    if _is_conversation(response):
        messages = [*before, *_conversation(response, "response")]
    elif isinstance(response, str):
        messages = [*before, {"role": "assistant", "content": response}]
    else:
        raise ValueError(f"the response is {_kind(response)}, not text")
    as_text = isinstance(prompt, str) and isinstance(response, str)
    return _candidate(where, messages, len(before), as_text, **common)


def _candidate(
    where: str, messages: list[Message], first: int, as_text: bool, *, group: Any, teacher: Any, **common: Any
) -> Candidate:
    """A candidate from a conversation."""
    responses = [message for message in messages[first:] if message["role"] == "assistant"]
    if not responses:
        raise ValueError("no message is by the assistant, so there is no response")
    if not any(str(message["content"] or "").strip() for message in responses):
        raise ValueError("the response is empty")
    return Candidate(
        where=where,
        messages=messages,
        first=first,
        as_text=as_text,
        group=f"{_hash(_asked(messages, first)):016x}" if group in _EMPTY else str(group),
        teacher=None if teacher in _EMPTY else str(teacher),
        **common,
    )


def _written(where: str, text: Any, group: Any, teacher: Any, extra: Any, read: Any) -> Candidate:
    """A candidate from one text."""
    if not isinstance(text, str):
        raise ValueError(f"the text is {_kind(text)}, not text")
    if not text.strip():
        raise ValueError("the text is empty")
    return Candidate(
        where=where,
        messages=[],
        first=0,
        as_text=True,
        group=f"{_hash(text):016x}" if group in _EMPTY else str(group),
        teacher=None if teacher in _EMPTY else str(teacher),
        text=text,
        extra=extra,
        read=read,
    )


def _tokenised(where: str, values: Mapping[str, Any], group: Any, teacher: Any, extra: Any, read: Any) -> Candidate:
    """A candidate from a tokenised row."""
    input_ids = values[TOKENS]
    if not _is_tokens(input_ids):
        raise ValueError(f"'{TOKENS}' is {_kind(input_ids)}, not a list of token ids")
    labels = values.get("labels")
    masks = [values[name] for name in MASKS if values.get(name) is not None]
    if any(len(each) != len(input_ids) for each in (*masks, *([labels] if labels is not None else []))):
        raise ValueError(f"its labels or masks do not have the length of its {len(input_ids)} token ids")
    if labels is None and masks:
        labels = [token if all(bits) else IGNORED_LABEL for token, *bits in zip(input_ids, *masks, strict=True)]
    if group in _EMPTY:
        first = next((place for place, label in enumerate(labels or ()) if label != IGNORED_LABEL), 0)
        # if all tokens are trained on, the prompt is not known yet; its last token may be merged with the response
        group = f"{_hash(list(input_ids[: first - 1] if first else input_ids)):016x}"
    return Candidate(
        where=where,
        messages=[],
        first=0,
        as_text=False,
        group=str(group),
        teacher=None if teacher in _EMPTY else str(teacher),
        input_ids=input_ids,
        labels=labels,
        extra=extra,
        read=read,
    )


def _asked(messages: list[Message], first: int) -> list[Message]:
    """The messages before the response; in a whole conversation, those before the assistant's first turn."""
    return messages[: first or next(number for number, m in enumerate(messages) if m["role"] == "assistant")]


def _conversation(value: Any, name: str | None) -> list[Message]:
    if not _is_conversation(value):
        raise ValueError(f"'{name}' holds no messages with role and content")
    messages = []
    for message in value:
        # tables fill keys that only other rows have with nulls
        rest = {key: part for key, part in message.items() if part is not None}
        role = rest.pop("role", None) or _ROLES.get(rest.pop("from", ""))
        content = rest.pop("content", None) or rest.pop("value", None) or ""
        if role is None:
            raise ValueError(f"a message of '{name}' has no role")
        if not isinstance(content, str):
            raise ValueError(f"a message of '{name}' holds {_kind(content)}, not text")
        messages.append({"role": role, "content": content, **rest})
    return messages


def _user(prompt: Any, name: str | None) -> Message:
    if not isinstance(prompt, str):
        raise ValueError(f"'{name}' is {_kind(prompt)}, not text or messages")
    return {"role": "user", "content": prompt}


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in value)
    )


def _is_tokens(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0 and type(value[0]) is int


def _is_nested(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) == 0 or _is_conversation(value):
        return False
    return all(isinstance(each, (str, Mapping)) or _is_conversation(each) for each in value)


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    return "a number" if isinstance(value, (bool, int, float)) else f"a {type(value).__name__}"


def _hash(value: Any) -> int:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest())
