"""Steps of a response: where they begin in the text, and that tokens are neither lost nor counted twice."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_sampler.metrics.steps import by_pattern, lines, paragraphs, sentences, text_and_offsets, token_steps
from tests import tiny

TOKENIZER = tiny.tokenizer()


class SpaceEater:
    """Decodes like SentencePiece: a token `_a` is ` a`, but the space is left out where it comes first."""

    def __init__(self, vocabulary: list[str]) -> None:
        self.vocabulary = vocabulary

    def decode(self, ids: list[int], **options: Any) -> str:
        text = "".join(self.vocabulary[token] for token in ids).replace("_", " ")
        return text.removeprefix(" ")

    def batch_decode(self, rows: list[list[int]], **options: Any) -> list[str]:
        return [self.decode(row) for row in rows]


def split(text: str, splitter: Any) -> list[str]:
    places = [0, *splitter(text), len(text)]
    pieces = [text[start:stop] for start, stop in pairwise(places)]
    return [piece for piece in pieces if piece]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One. Two! Three? Four", ["One.", " Two!", " Three?", " Four"]),
        ("It is 3.14 now. Next", ["It is 3.14 now.", " Next"]),
        ("See e.g. the case, i.e. this. Then", ["See e.g. the case, i.e. this.", " Then"]),
        ("Mr. A. Turing said so. Yes", ["Mr. A. Turing said so.", " Yes"]),
        ("1. Add them\n2. Check it. Done", ["1. Add them\n", "2. Check it.", " Done"]),
        ("We get $x = 1. y$. So", ["We get $x = 1. y$.", " So"]),
        ("First\n\\[ a. b\n= c \\]\nthen", ["First\n", "\\[ a. b\n= c \\]\n", "then"]),
        ("Run\n```\na. b\n\nc\n```\nEnd. Ok", ["Run\n", "```\na. b\n\nc\n```\n", "End.", " Ok"]),
        ('He said "no." Then left.', ['He said "no."', " Then left."]),
        ("好。对！", ["好。", "对！"]),
        ("a\n\n\nb", ["a\n\n\n", "b"]),
        ("", []),
    ],
)
def test_sentences_begin_where_a_reader_sees_them(text: str, pieces: list[str]) -> None:
    assert split(text, sentences) == pieces


def test_other_splitters_are_there() -> None:
    text = "a b\nc\n\nd; e"
    assert split(text, lines) == ["a b\n", "c\n\n", "d; e"]
    assert split(text, paragraphs) == ["a b\nc\n\n", "d; e"]
    assert split(text, by_pattern(r";\s*")) == ["a b\nc\n\nd; ", "e"]


texts = st.text(st.sampled_from("ab. !?\n$`1é漢😀\\[]"), max_size=80)


@settings(max_examples=150, deadline=None)
@given(text=texts, least=st.integers(1, 6), extra=st.integers(0, 20))
def test_steps_cover_every_token_once(text: str, least: int, extra: int) -> None:
    ids = np.array(TOKENIZER(text)["input_ids"], np.int64)
    steps = token_steps(ids, TOKENIZER, sentences, min_tokens=least, max_tokens=least + extra)
    assert [place for start, stop in steps for place in range(start, stop)] == list(range(len(ids)))
    assert all(stop - start <= least + extra for start, stop in steps)


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_the_text_and_where_tokens_begin_survive_characters_of_several_tokens(text: str) -> None:
    ids = np.array(TOKENIZER(text)["input_ids"], np.int64)
    decoded_text, begins = text_and_offsets(ids, TOKENIZER)
    assert decoded_text == text
    assert (np.diff(begins) >= 0).all()
    assert len(begins) == len(ids)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_a_tokenizer_that_eats_spaces_gives_the_same_text(ids: list[int]) -> None:
    tokenizer = SpaceEater(["_a", "b", ".", "_C", "d_"])
    text, begins = text_and_offsets(np.array(ids), tokenizer)
    assert text == tokenizer.decode(ids)
    assert [text[start:stop] for start, stop in zip(begins, [*begins[1:], len(text)], strict=True)] == [
        piece.removeprefix(" ") if place == 0 else piece
        for place, piece in enumerate(tokenizer.vocabulary[token].replace("_", " ") for token in ids)
    ]


def test_short_steps_are_joined_and_long_ones_cut() -> None:
    ids = np.array(TOKENIZER("a. b. " + "c" * 20 + ". d.")["input_ids"], np.int64)
    steps = token_steps(ids, TOKENIZER, sentences, min_tokens=4, max_tokens=8)
    # "a. b." and the start of the long one's space; the c's with their end; " d." is too short for itself
    assert steps == [(0, 5), (5, 11), (11, 17), (17, 23), (23, 30)]


def test_a_step_of_exactly_the_fewest_tokens_is_kept() -> None:
    ids = np.array(TOKENIZER("abc.def.gh.i")["input_ids"], np.int64)
    for least, expected in (
        (5, [(0, 12)]),  # what is too short at the end is joined with the step before
        (4, [(0, 4), (4, 8), (8, 12)]),
        (1, [(0, 4), (4, 8), (8, 11), (11, 12)]),
    ):
        found = token_steps(ids, TOKENIZER, by_pattern(r"\."), min_tokens=least, max_tokens=99)
        assert found == expected


@pytest.mark.parametrize("places", [[-1], [999], [3, 1], [(0, 3), (2, 5)], [0.5], ["a."]])
def test_a_splitter_must_return_ascending_positions(places: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"The splitter .* ascending order \(for spans, their starts\)"):
        token_steps(
            np.array(TOKENIZER("a. b.")["input_ids"]), TOKENIZER, lambda text: places, min_tokens=1, max_tokens=9
        )


def test_tokens_without_text_are_one_step() -> None:
    class Silent:
        def decode(self, ids: list[int], **options: Any) -> str:
            return ""

        def batch_decode(self, rows: list[list[int]], **options: Any) -> list[str]:
            return [""] * len(rows)

    assert token_steps(np.arange(5), Silent(), sentences, min_tokens=1, max_tokens=9) == [(0, 5)]
    assert token_steps(np.arange(0), Silent(), sentences, min_tokens=1, max_tokens=9) == []


def test_a_response_that_is_only_code_is_cut_by_its_length_alone() -> None:
    ids = np.array(TOKENIZER("```\na = 1. \n\nb = 2.\n```")["input_ids"])
    assert token_steps(ids, TOKENIZER, sentences, min_tokens=1, max_tokens=99) == [(0, len(ids))]
    halves = token_steps(ids, TOKENIZER, sentences, min_tokens=1, max_tokens=len(ids) - 1)
    assert halves == [(0, len(ids) // 2), (len(ids) // 2, len(ids))]
