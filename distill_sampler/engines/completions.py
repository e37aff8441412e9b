"""How an engine is asked for the log-probabilities of given tokens, and what it answers.

Both forms use the completions endpoint of OpenAI's interface, with token ids as the prompt, and let the engine generate
one token:

| form | asks for | answers | engines |
|---|---|---|---|
| `"prompt_logprobs"` | `prompt_logprobs=k` | each token and the k likeliest by id, with ranks | vLLM |
| `"echo"` | `echo=true`, `logprobs=1` | each token, and the one that was generated | vLLM, SGLang |

vLLM counts ranks with `>=`: a token that shares its logit with two others has the rank of the last of the three.
`TokenStats.rank` counts only larger logits, so ranks are counted again from the k likeliest (`strict_ranks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from distill_sampler.engines.client import Refusal
from distill_sampler.field_docs import documents_fields
from distill_sampler.types import FloatArray, IntArray

Form = Literal["prompt_logprobs", "echo"]

_LOWEST = -9999.0
"""What vLLM writes for minus infinity, which JSON does not have."""
_ROUNDING = 1e-3
"""A log-probability above 0 by no more than this is 0, rounded."""
_TOKEN_ID = "token_id:"
"""How vLLM writes a token id in place of its text."""


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What an engine says of given tokens."""

    logprob: FloatArray
    """`[length]` log-probability of each token given those before it, in nats; NaN for the first, which nothing
    predicts."""
    rank: IntArray | None = None
    """`[length]` the ranks as the engine counts them; 0 for the first token. None: it gives none."""
    top_ids: IntArray | None = None
    """`[length, k]` the likeliest tokens in each place, the likeliest first; -1 for the first token. None: none were
    asked for."""
    top_logprobs: FloatArray | None = None
    """`[length, k]` their log-probabilities; NaN for the first token."""
    text: str | None = None
    """The text of the tokens in the engine's vocabulary; None: it does not say."""
    generated: tuple[int | str, float] | None = None
    """The token that an echo ends with, its id or text, and its log-probability. None: the text ended there."""


def request(form: Form, model: str, input_ids: Sequence[int], top_k: int) -> dict[str, Any]:
    """The body of a request.

    Args:
        form: how to ask.
        model: the engine's name for the model.
        input_ids: the tokens.
        top_k: likeliest tokens wanted in each place.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(input_ids),
        "max_tokens": 1,
        # without these, a server may take other defaults from the model's generation_config.json
        "temperature": 1.0,
        "top_p": 1.0,
    }
    if form == "echo":
        return {**body, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
    return {**body, "repetition_penalty": 1.0, "add_special_tokens": False, "prompt_logprobs": top_k}


def answer(form: Form, found: Mapping[str, Any], input_ids: Sequence[int], top_k: int) -> Answer:
    """What an engine answered.

    Args:
        form: how it was asked.
        found: its answer.
        input_ids: the tokens that it was asked about.
        top_k: likeliest tokens that were wanted in each place.

    Raises:
        Refusal: the answer is of another shape, or of other tokens.
    """
    choices = found.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Refusal("The answer has no list of one choice. Give the address of a completions endpoint.")
    usage = found.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    told = usage.get("prompt_tokens")
    if told != len(input_ids):
        raise Refusal(
            f"The server counts {told} tokens (usage.prompt_tokens) where {len(input_ids)} were sent. Use a server "
            "that reads token ids as they are, and adds none of its own."
        )
    try:
        if form == "echo":
            assert not top_k, "not every server's echo tells apart tokens with the same text"
            return _from_echo(choices[0], input_ids, int(usage["completion_tokens"]))
        return _from_prompt_logprobs(choices[0], input_ids, top_k)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal(f"The answer to '{form}' has another shape ({type(error).__name__}: {error}).") from None


def _from_prompt_logprobs(choice: Mapping[str, Any], input_ids: Sequence[int], top_k: int) -> Answer:
    places = choice.get("prompt_logprobs")
    if places is None:
        raise Refusal(
            "The server ignores prompt_logprobs, which vLLM has. Ask with form='echo' (--form echo) where the server "
            "can echo a prompt's log-probabilities."
        )
    _require_length(len(places), len(input_ids))
    size = len(input_ids)
    logprob, rank = np.full(size, np.nan), np.zeros(size, np.int64)
    top_ids, top_logprobs = np.full((size, top_k), -1), np.full((size, top_k), np.nan)
    texts: list[str | None] = []
    for at, (token, entries) in enumerate(zip(input_ids, places, strict=True)):
        if at == 0:
            continue
        if str(token) not in entries:
            raise Refusal(f"Token {at} of the answer is not the one that was sent ({token}).")
        own = entries[str(token)]
        logprob[at], rank[at] = _number(own["logprob"]), own.get("rank") or 0
        texts.append(own.get("decoded_token"))
        if top_k:
            likeliest = sorted(((-_number(each["logprob"]), int(name)) for name, each in entries.items()))[:top_k]
            if len(likeliest) < top_k:
                raise Refusal(
                    f"The server gives {len(likeliest)} likeliest tokens in place {at}, and {top_k} were asked for."
                )
            top_ids[at] = [number for _, number in likeliest]
            top_logprobs[at] = [-negative for negative, _ in likeliest]
    return Answer(
        logprob=logprob,
        rank=rank if (rank[1:] > 0).all() else None,
        top_ids=top_ids if top_k else None,
        top_logprobs=top_logprobs if top_k else None,
        text=None if None in texts else "".join(text for text in texts if text is not None),
    )


def _from_echo(choice: Mapping[str, Any], input_ids: Sequence[int], generated: int) -> Answer:
    given = choice.get("logprobs")
    numbers = given.get("token_logprobs") if isinstance(given, dict) else None
    size = len(input_ids)
    if not isinstance(given, dict) or not isinstance(numbers, list) or len(numbers) <= generated < size:
        raise Refusal(
            "The server gives no log-probabilities of the prompt, only of what it generates, as llama.cpp's own server "
            "does. Use an engine that echoes those of the prompt, such as vLLM or SGLang."
        )
    _require_length(len(numbers) - generated, size)
    tokens = [_token(token) for token in given["tokens"]]
    _require_length(len(tokens) - generated, size)
    by_id = isinstance(tokens[0], int)
    if by_id and tokens[:size] != list(input_ids):
        raise Refusal("The tokens of the answer are not those that were sent.")
    return Answer(
        logprob=np.array([np.nan, *(_number(number) for number in numbers[1:size])]),
        text=choice.get("text") if by_id else "".join(map(str, tokens[1:size])),
        generated=(tokens[size], _number(numbers[size])) if generated else None,
    )


def _token(token: str) -> int | str:
    """The id of a token, if it is given, else its text."""
    return int(token.removeprefix(_TOKEN_ID)) if token.startswith(_TOKEN_ID) else token


def _require_length(found: int, wanted: int) -> None:
    if found != wanted:
        raise Refusal(f"The answer has log-probabilities of {found} tokens, and {wanted} were sent.")


def _number(value: Any) -> float:
    """A log-probability as a number."""
    number = float(value)
    if number > _ROUNDING:
        raise Refusal(f"The answer has a log-probability of {number:.4g}, but none is above 0.")
    return float("-inf") if number <= _LOWEST else min(number, 0.0)


def strict_ranks(found: Answer) -> IntArray:
    """`[length]` 1 + the number of tokens with a larger logit, from ranks that count equal logits too.

    Exact for a token that is as likely as one of the k likeliest, since all larger logits are then among these. A less
    likely token keeps the engine's rank, which counts the tokens with exactly its logit.
    """
    assert found.rank is not None
    assert found.top_logprobs is not None
    larger = (found.top_logprobs > found.logprob[:, None]).sum(axis=1)
    return np.where(larger < found.top_logprobs.shape[1], larger + 1, found.rank)
