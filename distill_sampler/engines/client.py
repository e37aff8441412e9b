"""Sends requests to an HTTP server that may be slow, busy or gone for a while, and tells these cases apart."""

from __future__ import annotations

import http.client
import json
import logging
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
"""Status codes after which the same request may succeed later."""
_OF_THE_REQUEST = (400, 413, 422)
"""Status codes with which a server refuses one request, such as one with too many tokens."""
_LONGEST_WAIT = 60.0
"""Seconds between two tries at most, also if the server asks for more."""
_FIRST_WAIT = 0.5


class ServerGone(ValueError):
    """The server does not answer, or answers nobody: nothing else can be asked of it now."""


class Unanswered(ServerGone):
    """All tries of one request failed. The server may be gone, or fail at this request alone."""


class Refusal(ValueError):
    """The server refuses or fails at one request; it may answer others."""


class Client:
    """Requests and answers in JSON, over HTTP.

    Args:
        url: what all paths begin with: `"http://localhost:8000/v1"`.
        timeout: seconds that a connection may be silent.
        retries: how often a request is sent again after a failure that may pass: no connection, no answer in time, half
            an answer, or a status such as 429 and 503. The waits double from half a second, with some randomness, up
            to a minute; a server's `Retry-After` is followed up to that.
        key_variable: the environment variable with the key that the server asks for; None: no key is sent.

    Raises:
        ValueError: the address cannot be used, a number is out of range, or the variable is not set.
    """

    def __init__(self, url: str, *, timeout: float, retries: int, key_variable: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={url!r}: give the address of a server, such as http://localhost:8000/v1.")
        if not timeout > 0:
            raise ValueError(f"timeout={timeout}: give a positive number of seconds, such as 300.")
        if retries < 0:
            raise ValueError(f"retries={retries}: give the number of further tries, 0 or more.")
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._retries = retries
        self._in_trouble = False
        """Whether the last answer was a failure, which is told once."""
        self._key_variable = key_variable
        if key_variable is not None and not os.environ.get(key_variable):
            raise ValueError(
                f"key_variable={key_variable!r}: there is no such environment variable. Set it to the server's key."
            )

    def post(
        self, path: str, body: Mapping[str, Any], *, stop: threading.Event, most_retries: int | None = None
    ) -> dict[str, Any]:
        """The answer to a request.

        Args:
            path: what follows the address: `"/completions"`.
            body: the request.
            stop: when it is set, nothing is tried again.
            most_retries: how often it is sent again at most; None: as often as any request.

        Raises:
            Refusal: the server refuses this request.
            Unanswered: all tries failed.
            ServerGone: the server refuses every request, as without a key.
        """
        retries = self._retries if most_retries is None else min(most_retries, self._retries)
        return self._ask(path, json.dumps(body).encode(), stop, retries)

    def get(self, path: str) -> dict[str, Any]:
        """What the server has at a path. The errors are those of `post`."""
        return self._ask(path, None, threading.Event(), self._retries)

    def _ask(self, path: str, body: bytes | None, stop: threading.Event, retries: int) -> dict[str, Any]:
        for number in range(retries + 1):
            try:
                found = self._once(path, body)
                self._in_trouble = False
                return found
            except _Passing as error:
                trouble = error
            if retries and not self._in_trouble:
                self._in_trouble = True
                logger.warning("%s%s: %s. It is asked again, up to %d times.", self.url, path, trouble, retries)
            if number == retries or stop.wait(_wait(number, trouble.after)):
                break
        tries = f"{number + 1} tries" if number else "one try"
        raise Unanswered(
            f"{self.url}{path}: {trouble} ({tries}). Check that the server runs and is not overloaded. A longer "
            "timeout, more retries or a smaller concurrency may help."
        )

    def _once(self, path: str, body: bytes | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key_variable is not None:  # the key itself is never kept, so it is in no copy of a reader
            headers["Authorization"] = f"Bearer {os.environ.get(self._key_variable, '')}"
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                self._refuse(path, error)
        except TimeoutError:
            raise _Passing(f"no answer within {self._timeout:g} seconds") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Passing(f"no answer within {self._timeout:g} seconds") from None
            raise _Passing(f"no connection ({error.reason})") from None
        except (http.client.HTTPException, OSError) as error:  # it broke off, or spoke something else
            raise _Passing(f"the answer broke off ({type(error).__name__})") from None
        try:
            found = json.loads(content)
        except ValueError:
            raise _Passing(f"the answer is no JSON ({content[:60]!r})") from None
        if not isinstance(found, dict):
            raise Refusal(f"{self.url}{path}: the answer is a JSON {type(found).__name__}, not an object.")
        return found

    def _refuse(self, path: str, error: urllib.error.HTTPError) -> None:
        try:
            said = " ".join(error.read(2000).decode(errors="replace").split())
        except (http.client.HTTPException, OSError):
            said = ""
        told = f"{self.url}{path}: status {error.code}, {said[:400] or error.reason}"
        if error.code in _BUSY:
            raise _Passing(f"status {error.code}, {said[:200] or error.reason}", error.headers.get("Retry-After"))
        if error.code in _OF_THE_REQUEST:
            raise Refusal(told)
        if error.code in (401, 403):
            told += ". Name the environment variable that holds the server's key (key_variable, --key-variable)."
        elif error.code == 404:
            told += ". Check the model's name, and the address, which usually ends in /v1."
        raise ServerGone(told)


class _Passing(Exception):
    """A failure that may pass."""

    def __init__(self, message: str, after: str | None = None) -> None:
        super().__init__(message)
        self.after = after
        """The server's `Retry-After`."""


def _wait(number: int, after: str | None) -> float:
    """Seconds to wait after try `number`, counted from 0."""
    seconds: float = _FIRST_WAIT * 2**number * random.uniform(0.75, 1.25)
    if after is not None and after.strip().isdigit():
        seconds = max(seconds, float(after))
    return min(seconds, _LONGEST_WAIT)
