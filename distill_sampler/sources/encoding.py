"""Turns the command line's candidates into tokens and labels, with the rules of `templates`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from distill_sampler.dataset import IGNORED_LABEL
from distill_sampler.sources.candidates import Candidate
from distill_sampler.sources.templates import (
    Tokens,
    Written,
    all_of,
    conversation,
    is_in_template,
    markers,
    plain_text,
    prompt_and_completion,
    responses_of,
    text_of,
    tokenised,
)
from distill_sampler.truncation import response_tokens_cut


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A candidate as the student reads it."""

    input_ids: list[int]
    """`[tokens]`"""
    labels: list[int]
    """`[tokens]` the token id in the response, -100 outside of it."""
    text: str
    """The text that was tokenised."""
    ends: list[int]
    """`[tokens]` where in the text each token ends."""
    tokens_cut: int
    """How many tokens of the response `max_length` cut off."""

    def token_text(self, token: int) -> str:
        """What a token adds to the text. A character of several tokens belongs to the first of them."""
        start = max(self.ends[:token], default=0) if token else 0
        return self.text[start : self.ends[token]]


def choose_template(first: Candidate, tokenizer: Any, *, plain: bool) -> tuple[bool, str]:
    """Whether the chat template is applied to data that begins with this candidate, and a sentence that says so.

    Messages need the template. A prompt and a response that are text are wrapped as a conversation, unless they are
    already written in the template, the tokenizer has none, or `plain` is set. TRL's `SFTTrainer` differs: it never
    applies a template to text.

    Raises:
        ValueError: `plain` is set, and the data holds messages.
    """
    marks = markers(tokenizer)
    found = "the response is what stands between the chat template's markers"
    if first.text is not None:
        return False, f"none is applied. Each text is read as it is, and {found}."
    if first.input_ids is not None:
        return False, (
            "none is applied. Rows are token ids, which must be the student's. The response is the labelled tokens, "
            "or, if all are labelled, what stands between the chat template's markers."
        )
    if not first.as_text:
        if plain:
            raise ValueError("--plain reads text, but the data holds messages. Leave --plain out.")
        return True, "the model's chat template, applied to conversations. The end marker is not scored."
    prompt, response = (str(message["content"]) for message in first.messages)
    if is_in_template(prompt, response, marks):
        return False, f"none is applied. Prompt and response are written in it already, and {found}."
    if plain or not tokenizer.chat_template:
        why = "--plain" if plain else "the tokenizer has no chat template"
        return False, f"none is applied ({why}). Prompt and response are read as they are, as SFTTrainer does."
    return True, (
        "the model's chat template, with prompt and response wrapped as a conversation. The end marker is not scored. "
        "SFTTrainer applies no template to a prompt and a completion that are text; --plain scores them like that."
    )


class Encoder:
    """Turns candidates into tokens with a tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers, which gives the offsets of its tokens.
        template: apply its chat template. False: read prompt and response as plain text, one after the other.
        max_length: truncate rows to this many tokens; None: never.
        whole_text: score all of a text, with its prompt, in which no response can be found.

    Raises:
        ValueError: there is no chat template to apply, or the tokenizer gives no offsets.
    """

    def __init__(self, tokenizer: Any, *, template: bool, max_length: int | None, whole_text: bool = False) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} gives no offsets of its tokens. Use a fast tokenizer.")
        if template and not tokenizer.chat_template:
            raise ValueError(
                "The data holds messages, but the model's tokenizer has no chat template to format them with. Use the "
                "instruction-tuned model, or give a template with --chat-template FILE."
            )
        self._tokenizer = tokenizer
        self._markers = markers(tokenizer)
        self.template = template
        self._max_length = max_length
        self._whole_text = whole_text
        self.lost_turns = 0
        """Assistant turns that are not scored: the template writes them differently when another turn follows."""
        self.whole_texts = 0
        """Texts that are scored whole, because no response was found in them."""
        self.wrapped_twice = 0
        """Prompts that were already written in the template, unlike the first, and were wrapped again."""

    def __call__(self, candidates: Sequence[Candidate], end_token_ids: Sequence[int] = ()) -> list[Encoded]:
        """The tokens of some candidates.

        Args:
            candidates: what to encode, for which `misfit` is None.
            end_token_ids: end-of-turn markers; template text after such a marker does not count as cut off.

        Raises:
            ValueError: the chat template refuses a conversation.
        """
        written = [None if candidate.input_ids is not None else self._write(candidate) for candidate in candidates]
        read = iter(tokenised([row for row in written if row is not None], self._tokenizer))
        return [
            self._cut(*(self._tokens(candidate) if row is None else (row.text, next(read))), end_token_ids)
            for candidate, row in zip(candidates, written, strict=True)
        ]

    def _cut(self, text: str, tokens: Tokens, end_token_ids: Sequence[int]) -> Encoded:
        kept = slice(0, len(tokens.input_ids) if self._max_length is None else self._max_length)
        input_ids = tokens.input_ids[kept]
        return Encoded(
            input_ids=input_ids,
            labels=np.where(tokens.is_response[kept], input_ids, IGNORED_LABEL).tolist(),
            text=text,
            ends=tokens.ends[kept],
            tokens_cut=response_tokens_cut(tokens.input_ids, tokens.is_response, kept, end_token_ids),
        )

    def _tokens(self, candidate: Candidate) -> tuple[str, Tokens]:
        """The text and the response of a row of tokens."""
        input_ids = list(candidate.input_ids or ())
        text, _, ends = text_of(input_ids, self._tokenizer)
        labels = candidate.labels
        if labels is not None and IGNORED_LABEL in labels:
            is_response = np.array(labels) != IGNORED_LABEL
        else:
            is_response = responses_of(input_ids, self._tokenizer, self._markers)
            if not is_response.any():
                self._count_whole()
                is_response = np.ones(len(input_ids), bool)
        return text, Tokens(input_ids=input_ids, is_response=is_response, ends=ends.tolist())

    def _count_whole(self) -> None:
        assert self._whole_text, "misfit refuses it otherwise"
        self.whole_texts += 1

    def misfit(self, candidate: Candidate) -> str | None:
        """Why a candidate cannot be encoded: nothing in it shows which part is the response, or a token is not the
        student's. None if it can be."""
        if candidate.input_ids is not None:
            size = len(self._tokenizer)
            strange = next((token for token in candidate.input_ids if not 0 <= token < size), None)
            if strange is not None:
                return (
                    f"the token {strange} is not one of the {size} of the student's tokenizer, so another tokenizer "
                    "made these rows. Tokenise them with the student's, or give the text"
                )
        if self._whole_text or self._shows_its_response(candidate):
            return None
        what, cure = "text", "give the template that the text is written in with --chat-template FILE"
        if candidate.input_ids is not None:
            what, cure = "row is all trained on and", "give labels that are -100 outside of the response"
        return (
            f"the {what} holds no assistant turn in the model's chat template, so nothing shows which part of it is "
            f"the response. Give prompt and response as two columns, or as messages; {cure}; or score all of it, with "
            "its prompt, with --whole-text"
        )

    def _shows_its_response(self, candidate: Candidate) -> bool:
        if candidate.input_ids is not None:
            labelled = candidate.labels is not None and IGNORED_LABEL in candidate.labels
            return labelled or bool(responses_of(list(candidate.input_ids), self._tokenizer, self._markers).any())
        return candidate.text is None or bool(plain_text(candidate.text, self._markers).responses)

    def _write(self, candidate: Candidate) -> Written:
        if candidate.text is not None:
            written = plain_text(candidate.text, self._markers)
            if written.responses:
                return written
            self._count_whole()
            return all_of(written)
        if not self.template:
            prompt, response = (str(message["content"]) for message in candidate.messages)
            return prompt_and_completion(prompt, response, self._markers)
        if candidate.as_text:
            prompt, response = (str(message["content"]) for message in candidate.messages)
            self.wrapped_twice += is_in_template(prompt, response, self._markers)
        options = {"tools": candidate.tools} if candidate.tools else {}
        try:
            written = conversation(candidate.messages, candidate.first, self._tokenizer, self._markers, **options)
        except TemplateError as error:
            raise ValueError(
                f"{candidate.where}: the chat template refuses this conversation ({error}). Correct the row, or give "
                "a template that takes it with --chat-template FILE."
            ) from None
        self.lost_turns += written.lost_turns
        return written
