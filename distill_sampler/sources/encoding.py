"""From candidates to tokens and labels, with the chat template applied as TRL does: the prompt is what the template
writes up to the assistant's header, the response is what it writes after that.

Each row is rendered to text, tokenised once, and its labels are found by where each token starts in the text. A token
that begins in the prompt is the prompt's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distill_sampler.dataset import IGNORED_LABEL
from distill_sampler.sources.candidates import Candidate


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A candidate as the student reads it."""

    input_ids: list[int]
    labels: list[int]
    """-100 outside the response."""
    text: str
    ends: list[int]
    """Where in the text each token ends."""

    def token_text(self, token: int) -> str:
        """What a token adds to the text: empty if it completes a character that one before it began."""
        start = max(self.ends[:token], default=0) if token else 0
        return self.text[start : self.ends[token]]


class Encoder:
    """Turns candidates into tokens with a tokenizer.

    Args:
        tokenizer: of transformers, with offsets (a fast one).
        template: apply its chat template; False reads prompt and response as plain text, one after the other.
        max_length: tokens after which a row is cut off; None: never.

    Raises:
        ValueError: there is no chat template to apply, or the tokenizer cannot tell where tokens are.
    """

    def __init__(self, tokenizer: Any, *, template: bool, max_length: int | None) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} cannot tell where its tokens lie; use a fast tokenizer.")
        if template and not tokenizer.chat_template:
            raise ValueError(
                "The data holds messages, but the model's tokenizer has no chat template to write them with. Use the "
                "instruction-tuned model, or give a template with --chat-template FILE."
            )
        self._tokenizer = tokenizer
        self.template = template
        self._max_length = max_length
        self.lost_turns = 0
        """Assistant turns that the template writes differently once others follow; they are not scored."""

    def __call__(self, candidates: Sequence[Candidate]) -> list[Encoded]:
        rendered = [self._render(candidate) for candidate in candidates]
        tokens = self._tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=not self.template,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        return [
            self._labelled(text, spans, input_ids, offsets)
            for (text, spans), input_ids, offsets in zip(
                rendered, tokens["input_ids"], tokens["offset_mapping"], strict=True
            )
        ]

    def _labelled(
        self, text: str, spans: list[tuple[int, int]], input_ids: list[int], offsets: list[tuple[int, int]]
    ) -> Encoded:
        input_ids, offsets = input_ids[: self._max_length], offsets[: self._max_length]
        labels = [IGNORED_LABEL] * len(input_ids)
        for begin, stop in spans:
            for place, (start, end) in enumerate(offsets):
                if begin <= start and end <= stop and end > start:
                    labels[place] = input_ids[place]
        return Encoded(input_ids=input_ids, labels=labels, text=text, ends=[end for _, end in offsets])

    def _render(self, candidate: Candidate) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from where to where in it the response's turns reach."""
        if not self.template:
            prompt, response = (str(message["content"]) for message in candidate.messages)
            return prompt + response, [(len(prompt), len(prompt) + len(response))]
        messages = candidate.messages
        text = self._apply(candidate, len(messages))
        return text, list(self._spans(candidate, text))

    def _spans(self, candidate: Candidate, text: str) -> Iterator[tuple[int, int]]:
        for turn in range(candidate.first, len(candidate.messages)):
            if candidate.messages[turn]["role"] != "assistant":
                continue
            until = text if turn + 1 == len(candidate.messages) else self._apply(candidate, turn + 1)
            before = self._apply(candidate, turn, generate=True)
            if not text.startswith(until):
                self.lost_turns += 1
                continue
            yield _common(before, text), len(until)

    def _apply(self, candidate: Candidate, stop: int, *, generate: bool = False) -> str:
        options = {"tools": candidate.tools} if candidate.tools else {}
        text: str = self._tokenizer.apply_chat_template(
            candidate.messages[:stop], tokenize=False, add_generation_prompt=generate, **options
        )
        return text


def _common(left: str, right: str) -> int:
    """Characters that both begin with."""
    if right.startswith(left):
        return len(left)
    return next(place for place, (a, b) in enumerate(zip(left + "\0", right + "\1", strict=False)) if a != b)
