"""Where the response lies in a row: the same for every way to write it, with every kind of chat template."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from distill_sampler.integrations.transformers import end_token_ids
from distill_sampler.sources.templates import (
    Tokens,
    Written,
    conversation,
    cut_off,
    is_in_template,
    markers,
    plain_text,
    prompt_and_completion,
    responses_of,
    text_of,
    tokenised,
    written_in,
)
from tests import tiny

WITHOUT_PROMPT = tiny.CHATML[: tiny.CHATML.index("{% if add_generation_prompt")]
LLAMA_3 = (
    "{{ '<|begin|>' }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|stop|>\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
QWEN_3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'].title() + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
TEMPLATES = {
    "ChatML": tiny.CHATML,
    "ChatML without a generation prompt": WITHOUT_PROMPT,
    "Llama 3": LLAMA_3,
    "Llama 2": LLAMA_2,
    "Qwen 3": QWEN_3,
    "no end marker": NO_END,
}
ASKED = {"role": "user", "content": "What is 1 + 3?"}
ANSWERED = {"role": "assistant", "content": "It is\n4."}
MORE = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Quite 🎉."}]


MERGED = 256
"""The first token of bytes that are merged."""


def tokenizer_with(template: str | None = tiny.CHATML, *merged: tuple[str, str]) -> Any:
    """The byte tokenizer with another template, and with pairs of bytes that it merges."""
    tok = tiny.tokenizer(*merged)
    tok.chat_template = template  # type: ignore[assignment]
    return tok


def response(written: Written) -> list[str]:
    return [written.text[begin:end] for begin, end in written.responses]


def scored(tokens: Tokens, tok: Any) -> str:
    return tok.decode([i for i, is_response in zip(tokens.input_ids, tokens.is_response, strict=True) if is_response])  # type: ignore[no-any-return]


# ---- The same response in every layout ----


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("messages", [[ASKED, ANSWERED], [ASKED, ANSWERED, *MORE]], ids=["one turn", "two turns"])
def test_the_response_is_the_same_in_every_layout(messages: list[dict[str, str]], template: str) -> None:
    tok = tokenizer_with(TEMPLATES[template])
    marks = markers(tok)
    whole = conversation(messages, 0, tok, marks)
    assert [turn.count(m["content"]) for turn, m in zip(response(whole), messages[1::2], strict=True)] == [
        1 for _ in messages[1::2]
    ]
    assert not any(m["content"] in turn or "user" in turn.lower() for turn in response(whole) for m in messages[::2])
    place = whole.responses[0][0]
    as_text = plain_text(whole.text, marks)
    in_two = prompt_and_completion(whole.text[:place], whole.text[place:], marks)
    earlier = whole.text.index(ASKED["content"]) + len(ASKED["content"])  # the header is the completion's
    header_behind = prompt_and_completion(whole.text[:earlier], whole.text[earlier:], marks)
    assert whole.responses == as_text.responses == in_two.responses == header_behind.responses
    (expected,) = tokenised([whole], tok)
    assert responses_of(expected.input_ids, tok, marks).tolist() == expected.is_response.tolist()
    for other in tokenised([as_text, in_two, header_behind], tok):
        assert other.is_response.tolist() == expected.is_response.tolist()


@pytest.mark.parametrize(
    ("template", "header", "end"),
    [
        ("ChatML", "<|im_start|>assistant\n", "<|im_end|>\n"),
        ("ChatML without a generation prompt", "<|im_start|>assistant\n", "<|im_end|>\n"),
        ("Llama 3", "<|start|>assistant<|stop|>\n\n", "<|im_end|>"),
        ("Llama 2", " [/INST]", " </s>"),
        ("Qwen 3", "<|im_start|>assistant\n", "<|im_end|>\n"),
        ("no end marker", "Assistant: ", "\n"),
    ],
)
def test_the_markers_are_the_templates_own(template: str, header: str, end: str) -> None:
    marks = markers(tokenizer_with(TEMPLATES[template]))
    assert marks is not None
    assert (marks.header, marks.end) == (header, end)


def test_a_template_is_needed_to_know_its_markers() -> None:
    tok = tokenizer_with(None)
    assert markers(tok) is None
    assert markers(tok, tiny.CHATML) == markers(tokenizer_with())
    assert markers(tokenizer_with("{{ raise_exception('images only') }}")) is None
    assert markers(tokenizer_with("{{ 'nothing of the messages' }}")) is None


def test_the_end_marker_is_found_whatever_letters_it_has() -> None:
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|b|>' }}{% endfor %}"
    tok = tokenizer_with(template)
    tok.add_special_tokens({"additional_special_tokens": ["<|b|>"]})
    assert end_token_ids(tok, None) == (257, tok.convert_tokens_to_ids("<|b|>"))


# ---- Text ----


def test_text_without_the_templates_markers_has_no_response() -> None:
    marks = markers(tokenizer_with())
    for text in ("### Question: 1 + 3?\n### Answer: 4", "<|im_start|>user\n1 + 3?<|im_end|>\n<|im_start|>assistant"):
        assert plain_text(text, marks).responses == ()
    assert plain_text("<|im_start|>assistant\n4<|im_end|>\n", None).responses == ()


def test_a_turn_that_is_cut_off_reaches_to_the_end_of_the_text() -> None:
    marks = markers(tokenizer_with())
    assert response(plain_text("<|im_start|>assistant\nIt is", marks)) == ["It is"]


def test_what_stands_behind_the_end_marker_is_not_the_response() -> None:
    """SFTTrainer adds an EOS to text that ends in a newline."""
    text = conversation([ASKED, ANSWERED], 0, tok := tokenizer_with()).text
    marks = markers(tok)
    assert response(plain_text(text + "<|im_end|>", marks)) == ["It is\n4.<|im_end|>\n"]
    place = text.index("It is")
    assert response(prompt_and_completion(text[:place], text[place:] + "<|im_end|>", marks)) == [
        "It is\n4.<|im_end|>\n"
    ]


def test_a_completion_without_markers_is_the_response() -> None:
    for marks in (markers(tokenizer_with()), None):
        written = prompt_and_completion("Q: 1 + 3?\nA: ", "4", marks)
        assert (response(written), written.special_tokens) == (["4"], True)
    # turns of the assistant in the prompt are the prompt's
    prompt = "<|im_start|>assistant\nYes?<|im_end|>\nQ: 1 + 3?\nA: "
    assert response(prompt_and_completion(prompt, "4", markers(tokenizer_with()))) == ["4"]


def test_what_the_prompt_holds_of_the_assistants_turn_is_not_the_response() -> None:
    marks = markers(tokenizer_with())
    prompt = "<|im_start|>user\n1 + 3?<|im_end|>\n<|im_start|>assistant\nSure: "
    for behind in ("", "<|im_end|>"):  # SFTTrainer's EOS
        assert response(prompt_and_completion(prompt, "4<|im_end|>\n" + behind, marks)) == ["4<|im_end|>\n"]


def test_the_tokenizer_begins_text_and_the_template_begins_conversations() -> None:
    tok = tokenizer_with()
    assert not conversation([ASKED, ANSWERED], 0, tok).special_tokens
    assert plain_text("4", None).special_tokens
    assert prompt_and_completion("1 + 3?", "4", None).special_tokens


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "4", True),
        ("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant", "\n4", True),
        ("<|im_start|>user\nQ<|im_end|>\n", "<|im_start|>assistant\n4", True),
        ("What does <|im_start|>assistant mean?", "It begins a turn.", False),
    ],
)
def test_text_that_is_in_the_template_already_is_told_by_the_header(
    prompt: str, completion: str, expected: bool
) -> None:
    assert is_in_template(prompt, completion, markers(tokenizer_with())) is expected
    assert not is_in_template(prompt, completion, None)


def test_turns_that_the_template_rewrites_are_counted_and_left_out() -> None:
    said = "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    assert said in tiny.CHATML
    rewriting = tiny.CHATML.replace(
        said, said.replace("message['content']", "(message['content'] if loop.last else '(shortened)')")
    )
    tok = tokenizer_with(rewriting)
    written = conversation([ASKED, ANSWERED, *MORE], 0, tok)
    assert written.lost_turns == 1
    assert response(written) == ["Quite 🎉.<|im_end|>\n"]
    # as they are written, they can be found by the markers
    written = conversation([ASKED, ANSWERED, *MORE], 0, tok, markers(tok))
    assert written.lost_turns == 0
    assert response(written) == ["(shortened)<|im_end|>\n", "Quite 🎉.<|im_end|>\n"]
    assert response(conversation([ASKED, ANSWERED, *MORE, *MORE], 2, tok, markers(tok)))[0] == "(shortened)<|im_end|>\n"


def test_only_turns_from_the_first_of_the_response_on_count() -> None:
    tok = tokenizer_with()
    assert response(conversation([ASKED, ANSWERED, *MORE], 2, tok)) == ["Quite 🎉.<|im_end|>\n"]


def test_a_conversation_may_begin_with_the_assistant() -> None:
    tok = tokenizer_with()
    expected = ["It is\n4.<|im_end|>\n", "Quite 🎉.<|im_end|>\n"]
    assert response(conversation([ANSWERED, *MORE], 0, tok, markers(tok))) == expected


# ---- Tokens at the edge ----


def test_a_token_that_begins_in_the_prompt_is_the_prompts() -> None:
    tok = tokenizer_with(tiny.CHATML, ("Ċ", "Ċ"))
    answer = {"role": "assistant", "content": "\n4"}
    whole = conversation([ASKED, answer], 0, tok)
    marks = markers(tok)
    place = whole.responses[0][0]
    rows = [whole, plain_text(whole.text, marks), prompt_and_completion(whole.text[:place], whole.text[place:], marks)]
    read = tokenised(rows, tok)
    assert MERGED in read[0].input_ids  # header and response have run together
    assert [scored(tokens, tok) for tokens in read] == ["4<|im_end|>\n"] * 3
    by_tokens = responses_of(read[0].input_ids, tok, marks)
    assert by_tokens.tolist() == read[0].is_response.tolist()


def test_a_token_that_runs_on_past_the_response_is_not_the_responses() -> None:
    tok = tokenizer_with(NO_END, ("Ċ", "U"))
    written = conversation([ASKED, ANSWERED, MORE[0]], 0, tok)
    (tokens,) = tokenised([written], tok)
    assert MERGED in tokens.input_ids
    assert scored(tokens, tok) == ANSWERED["content"]


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_a_token_begins_with_its_space_though_the_tokenizer_does_not_count_it(trim_offsets: bool) -> None:
    tok = tokenizer_with(None, ("Ġ", "4"), ("Ġ", "Ġ"))
    tok.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets, add_prefix_space=False)
    (tokens,) = tokenised([prompt_and_completion("is ", "4.", None)], tok)
    assert scored(tokens, tok) == "."  # " 4" begins in the prompt
    (tokens,) = tokenised([prompt_and_completion("do:\n", "  x", None)], tok)
    assert scored(tokens, tok) == "  x"  # an indentation is the response's


def test_what_the_tokenizer_adds_is_not_the_responses() -> None:
    tok = tokenizer_with()
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 256), ("<|im_end|>", 257)]
    )
    text = Written(text="4!", responses=((0, 2),), special_tokens=True)
    without = Written(text="4!", responses=((0, 2),), special_tokens=False)
    added, plain = tokenised([text, without], tok)
    assert added.input_ids == [256, *plain.input_ids, 257]
    assert added.is_response.tolist() == [False, True, True, False]
    assert plain.is_response.tolist() == [True, True]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@given(question=st.text(max_size=8), answer=st.text(max_size=12))
def test_tokens_that_are_there_are_found_where_the_tokenizer_puts_them(
    template: str, question: str, answer: str
) -> None:
    tok = tokenizer_with(template, ("Ċ", "Ċ"), ("s", "Ċ"), ("Ċ", "I"))
    asked, answered = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    row = conversation([asked, answered, *MORE], 0, tok, markers(tok))
    (tokens,) = tokenised([row], tok)
    found = written_in(row, tokens.input_ids, tok)
    assert found is not None
    assert found.tolist() == tokens.is_response.tolist()
    with_eos = written_in(row, [*tokens.input_ids, tok.eos_token_id], tok)
    assert with_eos is not None
    assert with_eos.tolist() == [*tokens.is_response.tolist(), False]
    assert written_in(row, tokens.input_ids[:-1], tok) is None
    assert written_in(row, [*tokens.input_ids, *tokens.input_ids[:2]], tok) is None


def test_tokens_are_read_as_text_though_a_character_is_cut_off() -> None:
    tok = tokenizer_with()
    ids = tok("<|im_start|>assistant\né🎉")["input_ids"][:-2]
    text, starts, ends = text_of(ids, tok)
    assert text == "<|im_start|>assistant\né\ufffd"
    assert (ends[-1], starts[-2]) == (len(text), len(text) - 1)
    assert responses_of(ids, tok, markers(tok)).sum() == 4  # two bytes of é, two of the rest


@pytest.mark.parametrize(
    ("kept", "cut"),
    [([1, 2, 3], 0), ([1, 2], 0), ([2, 3], 1), ([1, 2, 3, 9], 0), ([1, 2, 3, 9, 9], None), ([2, 4], None)],
)
def test_what_truncation_took_from_the_front(kept: list[int], cut: int | None) -> None:
    assert cut_off([1, 2, 3], kept) == cut


def test_a_row_without_tokens_has_no_response() -> None:
    tok = tokenizer_with()
    found = written_in(prompt_and_completion("", "", None), [], tok)
    assert found is not None
    assert not len(found)


def test_tokens_that_were_added_later_have_bytes() -> None:
    tok = tokenizer_with()
    row = prompt_and_completion("is ", "<half>", None)
    assert written_in(row, tok(row.text)["input_ids"], tok) is not None
    tok.add_tokens(["<half>"])
    found = written_in(row, tok(row.text)["input_ids"], tok)
    assert found is not None
    assert found.tolist() == [False] * 3 + [True]
