"""Tokens of any tokenizer on the bytes of a text: exact places, one rule at edges, texts that differ from them."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill_sampler.engines.alignment import byte_starts, overlap, per_span, place
from distill_sampler.engines.token_bytes import token_bytes, tokens_of
from tests import tiny


def by_bytes() -> PreTrainedTokenizerFast:
    """Byte-level BPE, with some merges that cross words and lines."""
    return tiny.tokenizer(("Ġ", "t"), ("h", "e"), ("Ċ", "Ċ"), ("Ã", "©"), (".", "Ġ"))


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Gemma's: a vocabulary of words with `▁` for the space, and a token for each byte that no word has."""
    words = [*"abcdefghijklmnopqrstuvwxyzT.", "\u2581", "th", "the", "\u2581the", "Th", "The", "is"]
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    vocabulary |= {word: 257 + number for number, word in enumerate(words)}
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("T", "h"), ("Th", "e"), ("i", "s")]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<end_of_turn>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end_of_turn>")


def by_words() -> PreTrainedTokenizerFast:
    """Whole words, decoded with a space before each: no vocabulary from which bytes can be read."""
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "end": 2, "##ing": 3, ".": 4}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


KINDS = {"byte-level": by_bytes, "sentencepiece": sentencepiece}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(text=st.text(st.sampled_from("the Té.\n🎉 漢is"), max_size=60))
def test_the_tokens_of_a_text_cover_it_byte_by_byte(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids, begins = tokens_of(text, tokenizer)
    pieces = token_bytes(tokenizer)(ids)
    assert b"".join(pieces) == text.encode()
    assert begins.tolist() == np.cumsum([0, *map(len, pieces)])[:-1].tolist()


TOKENIZERS: dict[str, Any] = {kind: make() for kind, make in KINDS.items()}


def test_tokens_of_other_tokenizers_are_decoded() -> None:
    _, begins = tokens_of("the ending.", by_words())
    assert begins.tolist() == [0, 3, 7, 10]  # the space is part of the word behind it


def test_a_part_of_a_character_has_a_place_of_its_own() -> None:
    ids, begins = tokens_of("é🎉", TOKENIZERS["byte-level"])
    assert len(ids) == 5  # é is one token, the emoji four
    assert begins.tolist() == [0, 2, 3, 4, 5]


def test_a_token_counts_for_the_span_in_which_it_begins() -> None:
    text = "It is. the end"
    _, begins = tokens_of(text, TOKENIZERS["byte-level"])  # … "." + " t" … or ". " + "t"
    sums, tokens = per_span(begins, np.ones(len(begins)), byte_starts(text, [0, 6]))
    # ". " begins in the first span and reaches into the second
    assert tokens.tolist() == [6, len(begins) - 6]
    assert sums.tolist() == tokens.tolist()


def test_a_span_in_which_no_token_begins_has_none() -> None:
    sums, tokens = per_span(np.array([0, 5]), np.array([1.5, 2.0]), np.array([0, 2, 4]))
    assert (sums.tolist(), tokens.tolist()) == ([1.5, 0.0, 2.0], [1, 0, 1])


@given(text=st.text(max_size=30), data=st.data())
def test_positions_of_characters_become_bytes(text: str, data: st.DataObject) -> None:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    assert byte_starts(text, places).tolist() == [len(text[:place].encode()) for place in places]


# ---- Texts that are not quite the tokens' ----

HARMONY = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>"]


def harmony(tokenizer: PreTrainedTokenizerFast, reasoning: str, answer: str) -> list[int]:
    """As gpt-oss writes it: channels and roles that no text of the response has."""
    parts = ["<|channel|>", "analysis", "<|message|>", reasoning, "<|end|>", "<|start|>", "assistant", "<|channel|>"]
    parts += ["final", "<|message|>", answer, "<|return|>"]
    return [number for part in parts for number in tokenizer(part, add_special_tokens=False)["input_ids"]]


@pytest.fixture(scope="module")
def teacher() -> PreTrainedTokenizerFast:
    tokenizer = by_bytes()
    tokenizer.add_special_tokens({"additional_special_tokens": HARMONY})
    return tokenizer


def places(tokenizer: PreTrainedTokenizerFast, ids: list[int], text: str) -> tuple[list[bytes], Any, float]:
    known = token_bytes(tokenizer)
    pieces = known(ids)
    begins, coverage = place(pieces, text.encode(), apart=known.apart(ids))
    assert (np.diff(begins[begins >= 0]) >= 0).all()
    return pieces, begins, coverage


@pytest.mark.parametrize("reasoning", ["We add. analysis is done.\n", "analysis", "final assistant analysis é"])
def test_headers_and_special_tokens_are_absent_from_the_text(teacher: Any, reasoning: str) -> None:
    answer = "the answer is 4, by analysis."
    text = f"<think>{reasoning}</think>\n\n{answer}"
    ids = harmony(teacher, reasoning, answer)
    pieces, begins, coverage = places(teacher, ids, text)
    assert coverage == pytest.approx(len((reasoning + answer).encode()) / len(text.encode()))
    inside = [(piece, begin) for piece, begin in zip(pieces, begins.tolist(), strict=True) if begin >= 0]
    assert all(text.encode()[begin : begin + len(piece)] == piece for piece, begin in inside)
    first = len("<think>")
    assert inside[0][1] == first
    assert len(inside) == len(teacher(reasoning)["input_ids"]) + len(teacher(answer)["input_ids"])


def test_a_text_with_the_answer_alone_takes_the_answers_tokens(teacher: Any) -> None:
    ids = harmony(teacher, "the answer is 4. " * 30, "the answer is 4.")
    _, begins, coverage = places(teacher, ids, "the answer is 4.")
    assert coverage == 1.0
    inside = np.flatnonzero(begins >= 0)
    assert inside.tolist() == list(range(len(ids) - 1 - len(inside), len(ids) - 1))


def test_special_tokens_that_are_in_the_text_have_places(teacher: Any) -> None:
    text = "a<|end|>b"
    pieces, begins, coverage = places(teacher, teacher(text)["input_ids"], text)
    assert pieces == [b"a", b"<|end|>", b"b"]
    assert (begins.tolist(), coverage) == ([0, 1, 8], 1.0)


@pytest.mark.parametrize("cut", [(0, 2), (2, 0), (2, 2)])
def test_a_trimmed_text_keeps_its_tokens(teacher: Any, cut: tuple[int, int]) -> None:
    whole = "\n\nthe end of it.\n\n"
    text = whole[cut[0] : len(whole) - cut[1]]
    _, begins, coverage = places(teacher, teacher(whole)["input_ids"], text)
    assert coverage == 1.0
    assert begins[begins >= 0][0] == 0


def test_an_edited_text_keeps_the_tokens_around_the_edit(teacher: Any) -> None:
    rng = random.Random(0)
    whole = " ".join("".join(rng.choices("abcdehist", k=5)) for _ in range(400))
    text = whole[:700] + "SOMETHING ELSE" + whole[760:1500] + whole[1502:]
    _, begins, coverage = places(teacher, teacher(whole)["input_ids"], text)
    assert coverage == pytest.approx(1 - 14 / len(text), abs=0.002)
    assert not ((begins >= 701) & (begins < 714)).any()


def test_another_text_is_not_covered(teacher: Any) -> None:
    rng = random.Random(1)
    one, other = (" ".join("".join(rng.choices("abcdehist", k=5)) for _ in range(400)) for _ in range(2))
    assert places(teacher, teacher(one)["input_ids"], other)[2] < 0.05


@settings(deadline=None, max_examples=150)
@given(
    text=st.text(st.sampled_from("ab c\né"), min_size=1, max_size=200),
    edits=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 20), st.text("xyz ", max_size=20)), max_size=4),
)
def test_what_is_aligned_is_equal_and_in_order(text: str, edits: list[tuple[int, int, str]]) -> None:
    edited = text
    for at, length, new in edits:
        edited = edited[:at] + new + edited[at + length :]
    pieces = [bytes([byte]) for byte in edited.encode()]
    begins, coverage = place(pieces, text.encode())
    kept = np.flatnonzero(begins >= 0)
    assert (np.diff(begins[kept]) > 0).all()
    content = text.encode()
    assert all(content[at : at + 1] == pieces[token] for token, at in zip(kept, begins[kept], strict=True))
    inside = set(range(len(content) - len(content.lstrip()), len(content.rstrip())))
    assert coverage == pytest.approx(len(inside & set(begins.tolist())) / max(1, len(inside)))
    if edited == text:
        assert coverage == float(bool(inside))


def test_repetitive_texts_are_aligned_by_their_beginning_and_end() -> None:
    loop = b"and so on. " * 2000
    begins, coverage = place([b"abc", loop], b"xyz" + loop)
    assert begins.tolist() == [-1, 3]
    assert coverage == pytest.approx((len(loop) - 1) / (len(loop) + 2))


def test_a_shortened_text_has_the_tokens_that_begin_in_it() -> None:
    begins, share = overlap(np.array([0, 4, 9]), b"The quickly", b"The qu")
    assert (begins.tolist(), share) == ([0, 4, -1], 1.0)


def test_ids_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no token 5000 .*--tokenizer"):
        token_bytes(TOKENIZERS["byte-level"])([1, 5000])
