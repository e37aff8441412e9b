"""From candidates to tokens and labels, for the command line: how `templates` is applied to what the files hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
    labels: list[int]
    """-100 outside the response."""
    text: str
    ends: list[int]
    """Where in the text each token ends."""
    tokens_cut: int
    """Tokens of the response that `max_length` cut off."""

    def token_text(self, token: int) -> str:
        """What a token adds to the text: empty if it completes a character that one before it began."""
        start = max(self.ends[:token], default=0) if token else 0
        return self.text[start : self.ends[token]]


def choose_template(first: Candidate, tokenizer: Any, *, plain: bool) -> tuple[bool, str]:
    """Whether the chat template is applied to data that begins with this candidate, and a sentence that says so.

    Messages need the template. A prompt and a response that are text are wrapped as a conversation, unless they are
    written in the template already, the tokenizer has none, or `plain` asks for them as they are. TRL's `SFTTrainer`
    differs there: it never applies a template to text.

    Raises:
        ValueError: `plain`, and the data holds messages.
    """
    marks = markers(tokenizer)
    found = "the response lies between the chat template's markers"
    if first.text is not None:
        return False, f"none is applied: each text is read as it is, and {found}."
    if first.input_ids is not None:
        return False, (
            "none is applied: rows are token ids, taken to be this student's. The response is what is labelled, and "
            "where every token is, it lies between the chat template's markers."
        )
    if not first.as_text:
        if plain:
            raise ValueError("--plain reads text, but the data holds messages; leave --plain out.")
        return True, "the model's chat template, conversations; the end marker is not scored."
    prompt, response = (str(message["content"]) for message in first.messages)
    if is_in_template(prompt, response, marks):
        return False, f"none is applied: prompt and response are written in it already, and {found}."
    if plain or not tokenizer.chat_template:
        why = "--plain" if plain else "the tokenizer has no chat template"
        return False, f"none ({why}): prompt and response as they are, as SFTTrainer reads them."
    return True, (
        "the model's chat template, prompt and response wrapped as a conversation; the end marker is not scored. "
        "SFTTrainer applies no template to a prompt and completion that are text; --plain scores them as it reads them."
    )


class Encoder:
    """Turns candidates into tokens with a tokenizer.

    Args:
        tokenizer: of transformers, with offsets (a fast one).
        template: apply its chat template; False reads prompt and response as plain text, one after the other.
        max_length: tokens after which a row is cut off; None: never.
        whole_text: score all of a text in which no response can be found, its prompt too.

    Raises:
        ValueError: there is no chat template to apply, or the tokenizer cannot tell where tokens are.
    """

    def __init__(self, tokenizer: Any, *, template: bool, max_length: int | None, whole_text: bool = False) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} cannot tell where its tokens lie; use a fast tokenizer.")
        if template and not tokenizer.chat_template:
            raise ValueError(
                "The data holds messages, but the model's tokenizer has no chat template to write them with. Use the "
                "instruction-tuned model, or give a template with --chat-template FILE."
            )
        self._tokenizer = tokenizer
        self._markers = markers(tokenizer)
        self.template = template
        self._max_length = max_length
        self._whole_text = whole_text
        self.lost_turns = 0
        """Assistant turns that the template writes differently once others follow; they are not scored."""
        self.whole_texts = 0
        """Texts in which no response was found, scored whole."""
        self.wrapped_twice = 0
        """Prompts that were written in the template already, unlike the first, and were wrapped once more."""

    def __call__(self, candidates: Sequence[Candidate], end_token_ids: Sequence[int] = ()) -> list[Encoded]:
        """The tokens of some candidates.

        Args:
            candidates: what to encode.
            end_token_ids: markers that end a response, the last of its tokens that truncation can cut off.

        Raises:
            ValueError: nothing in a row says which part is the response, or a token is not the student's.
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
        strange = [token for token in input_ids if not 0 <= token < len(self._tokenizer)]
        if strange:
            raise ValueError(
                f"{candidate.where}: the token {strange[0]} is none of the {len(self._tokenizer)} of the student's "
                "tokenizer, so another one has made these rows. Tokenise them with this student's, or give the text."
            )
        text, _, ends = text_of(input_ids, self._tokenizer)
        labels = candidate.labels
        if labels is not None and IGNORED_LABEL in labels:
            is_response = np.array(labels) != IGNORED_LABEL
        else:
            is_response = responses_of(input_ids, self._tokenizer, self._markers)
            if not is_response.any():
                self._whole(candidate)
                is_response = np.ones(len(input_ids), bool)
        return text, Tokens(input_ids=input_ids, is_response=is_response, ends=ends.tolist())

    def _whole(self, candidate: Candidate) -> None:
        """Refuse a row in which no response is found, or count it if it is to be scored whole.

        Raises:
            ValueError: it is not.
        """
        if not self._whole_text:
            what, cure = "text", "name the template that the text is written in with --chat-template FILE"
            if candidate.input_ids is not None:
                what, cure = "row is all trained on and", "give labels that are -100 outside of it"
            raise ValueError(
                f"{candidate.where}: the {what} holds no turn of the assistant in the model's chat template, so "
                "nothing says which part of it is the response. Give prompt and response as two columns, or as "
                f"messages; {cure}; or score all of it, the prompt too, with --whole-text."
            )
        self.whole_texts += 1

    def _write(self, candidate: Candidate) -> Written:
        if candidate.text is not None:
            written = plain_text(candidate.text, self._markers)
            if written.responses:
                return written
            self._whole(candidate)
            return all_of(written)
        if not self.template:
            prompt, response = (str(message["content"]) for message in candidate.messages)
            return prompt_and_completion(prompt, response, self._markers)
        if candidate.as_text:
            prompt, response = (str(message["content"]) for message in candidate.messages)
            self.wrapped_twice += is_in_template(prompt, response, self._markers)
        options = {"tools": candidate.tools} if candidate.tools else {}
        written = conversation(candidate.messages, candidate.first, self._tokenizer, self._markers, **options)
        self.lost_turns += written.lost_turns
        return written
