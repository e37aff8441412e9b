"""`distill-sampler teacher-logprobs`: numbers of a model or a column are joined, aligned and kept, or refused."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distill_sampler.artifacts.score_output import ScoreOutput
from distill_sampler.engines.stored_teacher import StoredTeacher
from distill_sampler.engines.token_bytes import token_bytes, tokens_of
from distill_sampler.engines.writing import StoredRow, write_store
from tests import tiny
from tests.cli.conftest import Ended, call, rows, write_lines
from tests.engines.test_alignment import HARMONY, by_bytes, harmony, sentencepiece


def made(data: Path, output: Path, *more: object) -> Ended:
    return call("teacher-logprobs", data, "--output", output, *more)


def identified(num_prompts: int = 6) -> list[dict[str, Any]]:
    return [{**row, "id": f"row-{number}"} for number, row in enumerate(rows(num_prompts))]


def logprobs(path: Path) -> list[list[float]]:
    with pa.memory_map(str(path)) as file:
        found: list[list[float]] = pa.ipc.open_file(file).read_all()["logprobs"].to_pylist()
    return found


# ---- A teacher that reads ----


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose tokens are other than the student's: some are two bytes."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = by_bytes()
    tiny.model(3, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_teacher_gives_what_its_own_forward_gives(candidates: Path, teacher_path: Path, tmp_path: Path) -> None:
    ended = made(candidates, tmp_path / "t.arrow", "--model", teacher_path, "--top-k", 4)
    assert ended.code == 0, ended.said
    tokenizer, model = by_bytes(), tiny.model(3, vocab_size=len(by_bytes())).eval()
    store = StoredTeacher(tmp_path / "t.arrow")
    assert store.facts["template"] != "plain"
    assert (store.facts["temperature"], store.facts["processed"], store.top_k) == (1.0, False, 4)
    for row in rows():
        found = store.find(row["response"])
        assert found is not None
        prompt = [{"role": "user", "content": row["prompt"]}]
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids, begins = tokens_of(row["response"], tokenizer)
        assert found.token_ids.tolist() == ids.tolist()
        assert found.begins.tolist() == begins.tolist()
        assert found.coverage == 1.0
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1].double()
        truth = logits.log_softmax(-1)
        given = truth[torch.arange(len(ids)), torch.from_numpy(ids)].numpy()
        np.testing.assert_allclose(-found.surprisal, given, atol=1e-4)
        values, likeliest = truth.topk(4)
        assert found.top_ids is not None
        assert found.top_logprobs is not None
        assert (found.top_ids == likeliest.numpy()).mean() > 0.99  # ties may change places
        np.testing.assert_allclose(found.top_logprobs, values.numpy(), atol=0.01)  # kept in float16


def test_a_stopped_run_goes_on_and_gives_the_same_store(
    candidates: Path, teacher_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_sampler.cli.teacher_job.CHUNK_ROWS", 4)
    whole, stopped = tmp_path / "whole.arrow", tmp_path / "stopped.arrow"
    assert made(candidates, whole, "--model", teacher_path).code == 0
    add, calls = ScoreOutput.add, 0

    def add_twice(self: ScoreOutput, table: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        add(self, table)

    monkeypatch.setattr(ScoreOutput, "add", add_twice)
    ended = made(candidates, stopped, "--model", teacher_path)
    assert ended.code == 1
    assert "run the same command again" in ended.said
    monkeypatch.setattr(ScoreOutput, "add", add)
    # nothing is mixed with another teacher's
    for more in (("--max-length", 100), ("--top-k", 2), ("--system-prompt", "Be brief.")):
        other = made(candidates, stopped, "--model", teacher_path, *more)
        assert other.code == 1
        assert "--overwrite" in other.said
    ended = made(candidates, stopped, "--model", teacher_path)
    assert ended.code == 0, ended.said
    assert "8 responses" in ended.said
    assert whole.read_bytes() == stopped.read_bytes()
    assert "nothing to do" in made(candidates, stopped, "--model", teacher_path).said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["candidates.jsonl", "stopped.arrow", "whole.arrow"]


def test_a_finished_store_is_not_given_other_content(candidates: Path, teacher_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.arrow"
    assert made(candidates, output, "--model", teacher_path).code == 0
    write_lines(candidates, rows()[:5])
    ended = made(candidates, output, "--model", teacher_path)
    assert (ended.code, "--overwrite" in ended.said) == (1, True)
    assert made(candidates, output, "--model", teacher_path, "--overwrite").code == 0
    assert len(StoredTeacher(output)) == 5


def test_a_system_prompt_is_read_and_recorded(candidates: Path, teacher_path: Path, tmp_path: Path) -> None:
    plain, told = tmp_path / "plain.arrow", tmp_path / "told.arrow"
    assert made(candidates, plain, "--model", teacher_path).code == 0
    assert made(candidates, told, "--model", teacher_path, "--system-prompt", "Be brief.").code == 0
    assert StoredTeacher(told).facts["system_prompt"] == "Be brief."
    assert logprobs(plain) != logprobs(told)
    assert StoredTeacher(plain).identity != StoredTeacher(told).identity


def test_responses_that_are_too_long_have_no_numbers(candidates: Path, tmp_path: Path) -> None:
    tiny.model(0, max_position_embeddings=90).save_pretrained(tmp_path / "short")
    tiny.tokenizer().save_pretrained(tmp_path / "short")
    ended = made(candidates, tmp_path / "t.arrow", "--model", tmp_path / "short")
    assert ended.code == 0, ended.said
    assert "too few positions" in ended.said
    store = StoredTeacher(tmp_path / "t.arrow")
    found = [store.find(row["response"]) for row in rows()]
    assert len(store) == len(found)
    assert None in found
    assert any(each is not None for each in found)


def test_a_text_that_shows_no_response_is_passed_over_or_read_whole(tmp_path: Path, student_path: Path) -> None:
    prompt = tiny.tokenizer().apply_chat_template(tiny.candidates()[0]["prompt"], tokenize=False)
    turn = prompt + "<|im_start|>assistant"
    data = write_lines(tmp_path / "d.jsonl", [{"text": turn + "\nfour<|im_end|>\n"}, {"text": "no turn"}])
    ended = made(data, tmp_path / "t.arrow", "--model", student_path)
    assert (ended.code, "--whole-text" in ended.said) == (1, True)
    assert made(data, tmp_path / "t.arrow", "--model", student_path, "--on-error", "skip").code == 0
    store = StoredTeacher(tmp_path / "t.arrow")
    assert len(store) == 1
    assert store.find("four") is not None
    assert made(data, tmp_path / "whole.arrow", "--model", student_path, "--whole-text").code == 0
    assert StoredTeacher(tmp_path / "whole.arrow").find("o turn") is not None  # nothing predicts the first token


# ---- Columns ----

ANSWERS = ["The answer is 4.", "the \U0001f389 is the end é.", "is the answer analysis? yes."]


@pytest.fixture
def published(tmp_path: Path) -> dict[str, Path]:
    """The shape of the public set of gpt-oss: numbers by uuid, long, without text, ids of another tokenizer, in another
    order than the texts, which lie in a file of their own."""
    rng = np.random.default_rng(0)
    tokenizer = by_bytes()
    tokenizer.add_special_tokens({"additional_special_tokens": HARMONY})
    tokenizer.save_pretrained(tmp_path / "teacher")
    sentencepiece().save_pretrained(tmp_path / "other")
    texts, numbers = [], []
    for number, answer in enumerate(ANSWERS):
        words = rng.choice(["We add.", "analysis", "final", "é", f"({number})", "the end"], 30)
        reasoning = " ".join(words) + " so it is." * (8000 if number == 1 else 8)
        ids = harmony(tokenizer, reasoning, answer)
        values = (-rng.gamma(0.3, 1.0, len(ids))).astype(np.float32)
        numbers.append({"sample_uuid": f"u-{number}", "token_ids": ids, "logprobs": values.tolist()})
        texts.append({"uuid": 1, "sample_uuid": f"u-{number}", "input": f"What is {number}?"})
        texts[-1]["output"] = f"<think>{reasoning}</think>\n{answer}"
    assert max(len(row["token_ids"]) for row in numbers) > 65_000
    pq.write_table(pa.Table.from_pylist(numbers[::-1]), tmp_path / "numbers.parquet")
    write_lines(tmp_path / "texts.jsonl", texts)
    return {name: tmp_path / name for name in ("texts.jsonl", "numbers.parquet", "teacher", "other", "t.arrow")}


COLUMNS = ("--tokens-column", "token_ids", "--logprobs-column", "logprobs")


def joined(published: dict[str, Path], *more: object, tokenizer: str = "teacher") -> Ended:
    return made(
        published["texts.jsonl"], published["t.arrow"], "--logprobs-file", published["numbers.parquet"], *COLUMNS,
        "--tokenizer", published[tokenizer], "--key-column", "sample_uuid", "--teacher", "gpt-oss-120b", *more,
    )  # fmt: skip


def test_a_published_set_is_joined_by_key_and_aligned_by_bytes(published: dict[str, Path]) -> None:
    ended = joined(published, "--temperature", 0.7)
    assert ended.code == 0, ended.said
    assert "on average" in ended.said
    store = StoredTeacher(published["t.arrow"])
    assert (store.facts["model"], store.facts["temperature"], store.key_column) == ("gpt-oss-120b", 0.7, "sample_uuid")
    numbers = {row["sample_uuid"]: row for row in pq.read_table(published["numbers.parquet"]).to_pylist()}
    for line in published["texts.jsonl"].read_text(encoding="utf-8").splitlines():
        text = json.loads(line)
        found = store.find(text["output"], text["sample_uuid"])
        assert found is not None
        content, given = text["output"].encode(), numbers[text["sample_uuid"]]
        outside = len("<think></think>\n")
        assert found.coverage == pytest.approx(1 - outside / len(content))
        # the tokens of the reasoning and of the answer, each with its own number, in its own place
        reasoning, answer = text["output"].removeprefix("<think>").split("</think>\n")
        sizes = [len(special()(part)["input_ids"]) for part in (reasoning, answer)]
        first = len(special()("<|channel|>analysis<|message|>")["input_ids"])
        last = len(given["token_ids"]) - 1
        inside = [*range(first, first + sizes[0]), *range(last - sizes[1], last)]
        np.testing.assert_array_equal(found.token_ids, np.array(given["token_ids"])[inside])
        np.testing.assert_array_equal(-found.surprisal, np.float32(given["logprobs"])[inside])
        pieces = token_bytes(special())(found.token_ids)
        assert all(content[at:].startswith(piece) for at, piece in zip(found.begins, pieces, strict=True) if at < 2000)
        assert found.begins[0] == len("<think>")
        assert found.begins[-1] + len(pieces[-1]) == len(content)
        assert found.begins[sizes[0]] == content.index(b"</think>") + len("</think>\n")
    assert not (published["t.arrow"].parent / "t.arrow.logprobs").exists()


def special() -> Any:
    tokenizer = by_bytes()
    tokenizer.add_special_tokens({"additional_special_tokens": HARMONY})
    return tokenizer


def test_ids_of_another_tokenizer_are_refused(published: dict[str, Path]) -> None:
    ended = joined(published, tokenizer="other")
    assert ended.code == 1
    assert "--tokenizer" in ended.said


def change(path: Path, edit: Any) -> None:
    table = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist(edit(table)), path)


BAD = {
    "another number": (lambda rows: [{**r, "logprobs": r["logprobs"][:-1]} for r in rows], "each token needs one"),
    "above 0": (lambda rows: [{**r, "logprobs": [0.5, *r["logprobs"][1:]]} for r in rows], "natural logarithm"),
    "NaN": (lambda rows: [{**r, "logprobs": [float("nan"), *r["logprobs"][1:]]} for r in rows], "NaN"),
    "infinite": (lambda rows: [{**r, "logprobs": [float("-inf"), *r["logprobs"][1:]]} for r in rows], "before top-k"),
    "no key": (lambda rows: rows[1:], "no row with sample_uuid = 'u-2'"),
    "key twice": (lambda rows: [*rows, rows[0]], "stands twice"),
    "joins nothing": (lambda rows: [{**r, "sample_uuid": "x" + r["sample_uuid"]} for r in rows], "none of the data's"),
    "other texts": (lambda rows: [{**r, "sample_uuid": f"u-{n}"} for n, r in enumerate(rows)], "--min-coverage"),
    "no column": (
        lambda rows: [{"sample_uuid": r["sample_uuid"], "ids": r["token_ids"]} for r in rows],
        "--tokens-column",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_numbers_are_refused_with_the_cure(kind: str, published: dict[str, Path]) -> None:
    edit, cure = BAD[kind]
    change(published["numbers.parquet"], edit)
    ended = joined(published)
    assert ended.code == 1, ended.said
    assert cure in ended.said


def test_what_is_done_before_a_bad_row_is_kept(published: dict[str, Path]) -> None:
    change(published["numbers.parquet"], lambda rows: rows[1:])  # the last text has none
    assert joined(published).code == 1
    ended = joined(published, "--on-error", "skip")
    assert ended.code == 0, ended.said
    assert "Continuing after 2 responses" in ended.said
    store = StoredTeacher(published["t.arrow"])
    texts = [json.loads(line) for line in published["texts.jsonl"].read_text(encoding="utf-8").splitlines()]
    found = [store.find(text["output"], text["sample_uuid"]) for text in texts]
    assert [each is None for each in found] == [False, False, True]


def test_keys_that_do_not_tell_samples_apart_are_refused(tmp_path: Path, student_path: Path) -> None:
    data = write_lines(tmp_path / "d.jsonl", identified())
    ended = made(data, tmp_path / "t.arrow", "--model", student_path, "--key-column", "prompt_id")
    assert ended.code == 1
    assert "sum-" in ended.said
    assert made(data, tmp_path / "t.arrow", "--model", student_path, "--key-column", "id").code == 0
    assert StoredTeacher(tmp_path / "t.arrow").find(rows()[4]["response"][:20], "row-4") is not None


@pytest.mark.parametrize("form", ["ids", "texts", "text alone", "with the end"])
def test_columns_in_the_data_itself(form: str, tmp_path: Path, student_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    lines = identified(2)
    for row in lines:
        ids = tokenizer(row["response"])["input_ids"]
        row["lp"] = [-number / 100 for number in range(len(ids))]
        if form == "ids":
            row["tokens"] = ids
        if form == "texts":
            row["tokens"] = [*row["response"], "<|im_end|>"]
        if form in ("texts", "with the end"):
            row["lp"].append(-5.0)
    data = write_lines(tmp_path / "d.jsonl", lines)
    more: list[object] = ["--logprobs-column", "lp"]
    more += ["--tokens-column", "tokens"] if form in ("ids", "texts") else []
    more += [] if form == "texts" else ["--tokenizer", student_path]
    ended = made(data, tmp_path / "t.arrow", *more)
    assert ended.code == 0, ended.said
    store = StoredTeacher(tmp_path / "t.arrow")
    for row in lines:
        found = store.find(row["response"])
        assert found is not None
        assert found.begins.tolist() == list(range(len(row["response"])))
        np.testing.assert_allclose(found.surprisal, np.arange(len(row["response"])) / 100, rtol=1e-6)
        assert len(found.token_ids) == (0 if form == "texts" else len(row["response"]))


def test_a_text_of_another_length_than_its_numbers_is_refused(tmp_path: Path, student_path: Path) -> None:
    data = write_lines(tmp_path / "d.jsonl", [{**row, "lp": [-1.0] * 7} for row in rows()])
    ended = made(data, tmp_path / "t.arrow", "--logprobs-column", "lp", "--tokenizer", student_path)
    assert (ended.code, "--tokens-column" in ended.said) == (1, True)


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ([], "--logprobs-column"),
        (["--model", "m", "--logprobs-column", "lp"], "either --model"),
        (["--logprobs-column", "lp", "--logprobs-file", "f"], "--key-column"),
        (["--logprobs-column", "lp"], "--tokenizer"),
        (["--logprobs-column", "prompt", "--tokens-column", "correct"], "check --logprobs-column"),
        (["--logprobs-column", "lp", "--min-coverage", "90"], "--min-coverage"),
        (["--logprobs-column", "lp", "--top-k", "5"], "--model"),
        (["--model", "STUDENT", "--top-k", "5000"], "vocabulary"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: list[str], cure: str, candidates: Path, student_path: Path, tmp_path: Path
) -> None:
    write_lines(candidates, [{**row, "lp": [-1.0]} for row in rows()])
    given = [str(student_path) if option == "STUDENT" else option for option in options]
    ended = made(candidates, tmp_path / "t.arrow", *given)
    assert ended.code == 1
    assert cure in ended.said


def test_parquet_is_refused_because_it_cannot_be_mapped(candidates: Path, student_path: Path, tmp_path: Path) -> None:
    ended = made(candidates, tmp_path / "t.parquet", "--model", student_path)
    assert (ended.code, ".arrow" in ended.said) == (1, True)


def test_memory_is_that_of_what_is_asked(tmp_path: Path) -> None:
    """The numbers stay in the file: what is given lies in the mapped memory."""
    begins = np.arange(1000)
    write_store(tmp_path / "t.arrow", [StoredRow(text="a" * 1000, surprisal=begins / 10, begins=begins)] * 50)
    assert os.path.getsize(tmp_path / "t.arrow") > 400_000
    before = pa.total_allocated_bytes()
    assert StoredTeacher(tmp_path / "t.arrow").find("a" * 1000) is not None
    assert pa.total_allocated_bytes() - before < 100_000
