"""The bytes of each token in a tokenizer's vocabulary, and the tokens of a text with their byte positions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from distill_sampler.engines.alignment import place
from distill_sampler.types import BoolArray, IntArray

_KNOWN: WeakKeyDictionary[Any, tuple[int, TokenBytes]] = WeakKeyDictionary()


class TokenBytes:
    """Converts tokens to bytes, including tokens that are only a part of a UTF-8 character. Made by `token_bytes`.

    For byte-level BPE (GPT, Llama 3, Qwen) and SentencePiece (Gemma, Mistral), the bytes are looked up in the
    vocabulary. With other tokenizers, tokens are decoded one after the other.

    Args:
        tokenizer: a fast tokenizer of transformers.

    Raises:
        ValueError: the tokenizer is slow.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is slow and gives no offsets of tokens. Use a fast tokenizer."
            )
        self._backend = tokenizer.backend_tokenizer
        self._name = tokenizer.name_or_path or type(tokenizer).__name__
        decoder = self._backend.decoder
        told = json.loads(decoder.__getstate__()) if decoder is not None else {}
        parts = {part["type"]: part for part in told.get("decoders", [told] if told else [])}
        self._is_byte_level = "ByteLevel" in parts
        self._is_sentencepiece = "ByteFallback" in parts or "Metaspace" in parts
        added = tokenizer.added_tokens_decoder
        self._table: dict[int, bytes] = {number: token.content.encode() for number, token in added.items()}
        self._apart = np.array(sorted(added), np.int64)

    def __call__(self, token_ids: Sequence[int] | IntArray) -> list[bytes]:
        """The bytes of each token. For a special token, these are the bytes of its name.

        Raises:
            ValueError: the tokenizer has no such token.
        """
        ids = np.asarray(token_ids, np.int64).tolist()
        if not (self._is_byte_level or self._is_sentencepiece):
            return self._decoded(ids)
        table = self._table
        for number in ids:
            if number not in table:
                table[number] = self._bytes_of(number)
        return [table[number] for number in ids]

    def apart(self, token_ids: Sequence[int] | IntArray) -> BoolArray:
        """`[tokens]` True for tokens that were added to the vocabulary, such as special tokens. A text need not contain
        them."""
        found: BoolArray = np.isin(np.asarray(token_ids, np.int64), self._apart)
        return found

    def _bytes_of(self, number: int) -> bytes:
        token = self._token(number)
        if self._is_byte_level:
            return bytes(_BYTES[character] for character in token)
        if len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    def _token(self, number: int) -> str:
        token: str | None = self._backend.id_to_token(number) if number >= 0 else None
        if token is None:
            raise ValueError(
                f"The tokenizer {self._name} has no token {number} (its vocabulary has "
                f"{self._backend.get_vocab_size()}), so the token ids belong to another tokenizer. Pass the tokenizer "
                "of the teacher that generated them (--tokenizer)."
            )
        return token

    def _decoded(self, ids: list[int]) -> list[bytes]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        pieces = []
        for number in ids:
            self._token(number)
            pieces.append((stream.step(self._backend, number) or "").encode())
        return pieces


def token_bytes(tokenizer: Any) -> TokenBytes:
    """The `TokenBytes` of a tokenizer, which is made once, and again if tokens were added to it since.

    Raises:
        ValueError: the tokenizer is slow.
    """
    size, found = _KNOWN.get(tokenizer, (None, None))
    if found is None or size != len(tokenizer):
        found = TokenBytes(tokenizer)
        _KNOWN[tokenizer] = len(tokenizer), found
    return found


def tokens_of(text: str, tokenizer: Any) -> tuple[IntArray, IntArray]:
    """Tokenises a text, without adding special tokens.

    Args:
        text: the text.
        tokenizer: a fast tokenizer of transformers.

    Returns:
        `[tokens]` the token ids, and `[tokens]` the byte of the text's UTF-8 at which each token begins. If a token is
        not in the text, because the tokenizer normalises it, it begins where the token before it begins.
    """
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
    known = token_bytes(tokenizer)
    begins, _ = place(known(ids), text.encode(), apart=known.apart(ids))
    return ids, np.maximum.accumulate(np.maximum(begins, 0)) if len(begins) else begins


def _byte_level() -> dict[str, int]:
    """Maps the characters of byte-level BPE to bytes. Printable bytes are themselves; the others are U+0100 and up."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_level()
