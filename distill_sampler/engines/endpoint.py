"""A reader in another process or on another machine: an engine behind OpenAI's completions endpoint.

The engine gets token ids and answers with the log-probability of each (`completions.py`). Many requests are under way
at once, since engines batch them; each is tried again on its own (`client.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import Any, get_args

import numpy as np

from distill_sampler.engines.client import Client, Refusal, ServerGone, Unanswered
from distill_sampler.engines.completions import Answer, Form, answer, request, strict_ranks
from distill_sampler.protocols import PassInfo, Read, Reader
from distill_sampler.serialize import digest, hash_of
from distill_sampler.types import TokenStats, View

_TRIAL = "The sum of 17 and 25 is 42, as everybody can verify."
"""What a server is asked about first."""
_RETRIES_OF_TRIAL = 3
"""How often it is sent again at most, because an address may be mistyped: about four seconds."""
_TRIES = 8
"""How often a server is asked to generate a token."""
_SAME = 0.1
"""How much a log-probability may differ, in nats or as a share, when a token is generated and when it is echoed."""
_NO_STOP = threading.Event()


class EndpointReader(Reader):
    """Reads with an engine behind OpenAI's completions endpoint, such as vLLM.

    The engine must be able to say how likely the tokens of a *prompt* are. Tested with a real vLLM (0.32, on a CPU) in
    both forms. By its source, SGLang answers to `"echo"` in the same way, with the texts of tokens; only such answers
    were tested, not SGLang. Servers that only tell about the tokens that they generate, such as llama.cpp's own, are
    refused.

    When a pass begins, a short text is sent, to check that the server answers, knows the tokenizer's vocabulary, adds
    no token of its own and, if it echoes, gives each token its own number.

    Args:
        url: the endpoint, as OpenAI's clients take it: `"http://localhost:8000/v1"`.
        model: the name that the server has for the model.
        tokenizer: the model's tokenizer; a fast one of transformers.
        revision: which weights these are, such as a commit. Numbers are kept under the model's name and this, because
            a server does not tell its weights: change it when they change.
        form: how the engine is asked; see `engines.completions`.
        top_k: likeliest tokens wanted in each place. With `"prompt_logprobs"` only. Servers have limits: for vLLM,
            `--max-logprobs`.
        concurrency: how many requests are under way at once.
        timeout: seconds that a request may take; for a long queue at the server, raise it.
        retries: how often a failed request is sent again (see `engines.client.Client`).
        key_variable: the environment variable with the server's key; None: no key is sent.

    Raises:
        ValueError: an argument is out of range, or the variable is not set.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        tokenizer: Any,
        revision: str | None = None,
        form: Form = "prompt_logprobs",
        top_k: int = 0,
        concurrency: int = 16,
        timeout: float = 300.0,
        retries: int = 6,
        key_variable: str | None = None,
    ) -> None:
        if form not in get_args(Form):
            raise ValueError(f"form={form!r}: choose 'prompt_logprobs' (vLLM) or 'echo'.")
        if top_k < 0 or (top_k and form == "echo"):
            raise ValueError(
                f"top_k={top_k}: give 0 or more, and with form='echo' 0: an echo may give tokens as text, "
                "which several may share."
            )
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency}: give a positive number of requests, such as 16.")
        if tokenizer is None or not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer={tokenizer!r}: give the fast tokenizer of the model that the server runs; its token ids "
                "are sent."
            )
        self._client = Client(
            url.removesuffix("/").removesuffix("/completions"),
            timeout=timeout,
            retries=retries,
            key_variable=key_variable,
        )
        self._model = model
        self._tokenizer = tokenizer
        self._revision = revision
        self._form: Form = form
        self._top_k = top_k
        self._concurrency = concurrency

    @cached_property
    def identity(self) -> str:
        """The model's name and revision, the tokenizer, and how the engine is asked. Not where it is."""
        told = {"tokenizer": hash_of(self._tokenizer.backend_tokenizer.to_str().encode()), "revision": self._revision}
        return f"endpoint {self._model} {digest({**told, **self.numerics})}"

    @property
    def numerics(self) -> dict[str, str]:
        """`engine` (how it was asked), and with ranks `ties` (the rule by which they count equal logits)."""
        ranks = {"ties": f"strict up to rank {self._top_k}, >= above"} if self._top_k else {}
        return {"engine": self._form, **ranks}

    @cached_property
    def positions(self) -> float:
        """One less than the server's limit, since it generates a token; no limit if it names none."""
        try:
            models = self._client.get("/models").get("data")
        except Unanswered:
            raise
        except (ServerGone, Refusal):  # it has no such list
            return float("inf")
        for each in models if isinstance(models, list) else ():
            if isinstance(each, dict) and each.get("id") == self._model and each.get("max_model_len"):
                return int(each["max_model_len"]) - 1
        return float("inf")

    @property
    def statistics(self) -> tuple[str, ...]:
        """`surprisal`, and with `top_k` also `rank`.

        vLLM counts ranks with `>=`. They are counted again from the `top_k` likeliest tokens, so ranks up to `top_k`
        are as `TokenStats` defines them, and also the question whether a rank is larger: clip at `top_k` or less.
        Larger ones stay as the engine counts them: too large by the number of tokens with exactly the same logit.
        Without `top_k` there are no ranks.
        """
        return ("surprisal", "rank") if self._top_k else ("surprisal",)

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def block_tokens(self) -> int:
        return 1 << 16

    @contextmanager
    def open(self, info: PassInfo) -> Iterator[Read]:
        """Check the server, and give the function that reads.

        Raises:
            ValueError: the server is gone, or cannot give what is needed.
        """
        self.check()

        def read(views: Sequence[View]) -> list[TokenStats]:
            stats = []
            for view, found in zip(views, self.each(views), strict=True):
                if isinstance(found, Refusal):
                    raise ValueError(
                        f"A view of {len(view.input_ids)} tokens cannot be read: {found} To go on past such samples, "
                        "make a store with distill-sampler teacher-logprobs --endpoint … --on-error skip."
                    )
                stats.append(found)
                info.progress(len(view.input_ids))
            return stats

        yield read

    def each(self, views: Sequence[View]) -> Iterator[TokenStats | Refusal]:
        """The statistics of each view in turn, or why the server has none for it.

        Raises:
            ServerGone: it answers nothing any more. What was yielded by then is good.
        """
        stop = threading.Event()
        threads = ThreadPoolExecutor(self._concurrency, thread_name_prefix="endpoint")
        waiting: list[Future[TokenStats | Refusal]] = []
        try:
            left = iter(views)
            for view in islice(left, 2 * self._concurrency):
                waiting.append(threads.submit(self._one, view, stop))
            while waiting:
                found = waiting.pop(0).result()
                for view in islice(left, 1):
                    waiting.append(threads.submit(self._one, view, stop))
                yield found
        finally:
            stop.set()
            threads.shutdown(wait=False, cancel_futures=True)

    def _one(self, view: View, stop: threading.Event) -> TokenStats | Refusal:
        try:
            found = self._ask(view.input_ids.tolist(), stop)
        except Refusal as error:
            return error
        except Unanswered as error:
            if stop.is_set():
                raise
            try:  # is it the server, or this request?
                self._ask(self._trial(), stop, most_retries=_RETRIES_OF_TRIAL)
            except (ServerGone, Refusal):
                raise error from None
            return Refusal(f"{error} Other requests are answered.")
        kept = view.scored
        return TokenStats(
            surprisal=(-found.logprob[kept]).astype(np.float32),
            rank=strict_ranks(found)[kept] if self._top_k else None,
            top_ids=None if found.top_ids is None else found.top_ids[kept],
            top_logprobs=None if found.top_logprobs is None else found.top_logprobs[kept].astype(np.float32),
        )

    def check(self) -> None:
        """Ask the server about a short text.

        Raises:
            ServerGone: it does not answer.
            ValueError: its answer cannot be used; the message says why, and the cure.
        """
        ids = self._trial()
        try:
            found = self._ask(ids, _NO_STOP, most_retries=_RETRIES_OF_TRIAL)
            if self._form == "echo":
                self._check_places(ids, found)
        except Refusal as error:
            cure = " A larger top_k than vLLM's --max-logprobs is refused, too." if self._top_k else ""
            raise ValueError(f"The server at {self._client.url} cannot be used as a reader: {error}{cure}") from None
        if found.text is not None and _letters(self._tokenizer.decode(ids[1:])) not in _letters(found.text):
            raise ValueError(
                f"The server at {self._client.url} reads the tokens of {_TRIAL!r} as {found.text!r}: its model has "
                "another vocabulary. Give the tokenizer of the model that it runs (tokenizer=, --tokenizer)."
            )
        if self._top_k and found.rank is None:
            raise ValueError(f"The server at {self._client.url} gives no ranks with prompt_logprobs. Leave top_k out.")

    def _check_places(self, ids: list[int], found: Answer) -> None:
        """Check that a token has the same number when it is generated and when it is echoed.

        llama-cpp-python 0.3.36, for one, gives an echoed token a number of the place after it.

        Raises:
            Refusal: it has not, or none was generated in some tries.
        """
        for _ in range(_TRIES):
            if found.generated is not None:
                token, expected = found.generated
                more = (
                    [token] if isinstance(token, int) else self._tokenizer(token, add_special_tokens=False)["input_ids"]
                )
                if len(more) == 1:
                    echoed = self._ask([*ids, *more], _NO_STOP).logprob[-1]
                    if abs(echoed - expected) > max(_SAME, _SAME * abs(expected)):
                        raise Refusal(
                            f"It gives a token the log-probability {expected:.3f} when it generates it, and "
                            f"{echoed:.3f} when it echoes it in the same place, so its echo is of other places."
                        )
                    return
            found = self._ask(ids, _NO_STOP)
        raise Refusal(f"It generated no token in {_TRIES} tries, so its echo cannot be checked.")

    def _trial(self) -> list[int]:
        ids: list[int] = self._tokenizer(_TRIAL, add_special_tokens=False)["input_ids"]
        return ids

    def _ask(self, input_ids: Sequence[int], stop: threading.Event, *, most_retries: int | None = None) -> Answer:
        body = request(self._form, self._model, input_ids, self._top_k)
        found = self._client.post("/completions", body, stop=stop, most_retries=most_retries)
        return answer(self._form, found, input_ids, self._top_k)


def _letters(text: str) -> str:
    return "".join(text.split())
