"""A tiny model behind a completions endpoint on this machine, which answers as vLLM 0.32 and can be made to fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Change = Callable[[dict[str, Any]], Any]
"""What becomes of an answer: another answer; bytes, which are sent as they are; a status; or None for a dead line."""


@dataclass(eq=False)
class Served:
    """What a served model was asked, and how its next answers fail."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_model_len: int | None = 512
    has_models: bool = True
    """Whether it lists its models."""
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    """Applied to the next answers, one each."""
    always: Change | None = None
    """Applied to every answer."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = body["prompt"]
        with torch.no_grad():
            logprobs = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        text = self.tokenizer.decode
        generated = int(logprobs[-1][:64].argmax())  # a letter, a digit or the like
        choice: dict[str, Any] = {"index": 0, "text": text([generated]), "finish_reason": "length", "logprobs": None}
        if "prompt_logprobs" in body:
            k = body["prompt_logprobs"]
            choice["prompt_logprobs"] = [None]
            for at, token in enumerate(ids[1:]):
                row = logprobs[at]
                entries = {str(token): (float(row[token]), int((row >= row[token]).sum()))}
                for place, likely in enumerate(row.topk(k).indices.tolist(), 1):
                    entries[str(likely)] = (float(row[likely]), place)  # as vLLM: the place, not the rank by >=
                choice["prompt_logprobs"].append(
                    {
                        name: {"logprob": max(value, -9999.0), "rank": rank, "decoded_token": text([int(name)])}
                        for name, (value, rank) in entries.items()
                    }
                )
        if body.get("echo"):
            whole = [*ids, generated]
            numbers = [None, *(float(logprobs[at][token]) for at, token in enumerate(whole[1:]))]
            tokens = [f"token_id:{token}" for token in whole]
            choice |= {"text": text(whole), "logprobs": {"tokens": tokens, "token_logprobs": numbers}}
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        return {"object": "text_completion", "choices": [choice], "usage": usage}


@contextmanager
def serving(served: Served) -> Iterator[Served]:
    """The endpoint, as long as the context is open."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            card = {"id": "tiny", "max_model_len": served.max_model_len}
            self.send(200 if served.has_models else 404, json.dumps({"object": "list", "data": [card]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                served.asked.append(body)
                served.headers.append(dict(self.headers))
                change = served.changes.pop(0) if served.changes else served.always
            found = served.answer(body)
            if change is not None:
                found = change(found)
            if found is None:
                self.close_connection = True
            elif isinstance(found, int):
                self.send(found, b'{"error": {"message": "no"}}')
            else:
                self.send(200, found if isinstance(found, bytes) else json.dumps(found).encode())

        def send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
