"""`distill-sampler trace`: what three models on disk make of responses, as a table, a page and counts."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_sampler import ModelReader, Provenance
from distill_sampler.cli import tracing as tracing_module
from distill_sampler.engines.writing import StoredRow, write_store
from distill_sampler.metrics.provenance import CLASSES, SHARED
from distill_sampler.report.trace_page import render_trace
from distill_sampler.tracing import MODELS, Response, TokenLogProbs, read_responses, trace
from distill_sampler.types import Missing
from tests import tiny
from tests.cli.conftest import Ended, call, write_lines

NASTY = '</script><script>alert(1)</script> <img src=x onerror=alert(2)> {{ 7 * 7 }} " onmouseover="alert(3)'
ANSWERS = ("The sum is 3. Let us check: 1 + 2 is 3.\n\nSo it is. Done!", f"No. {NASTY}. Yes", "Ça va… C'est 3。 Fin.")


class Elements(HTMLParser):
    """Every element of a page, with the names of its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [name for name, _ in attrs]))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models; the teacher has a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(MODELS):
        tokenizer = tiny.tokenizer(("i", "s"), (".", "Ġ")) if name == "teacher" else tiny.tokenizer()
        tiny.model(seed, vocab_size=300).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in MODELS}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"What is {number} + 2?", "response": answer, "correct": verdict}
        for number, (answer, verdict) in enumerate(zip(ANSWERS, (True, False, None), strict=True))
    ]
    return write_lines(tmp_path / "texts.jsonl", rows)


def tracing(texts: Path, models: dict[str, Path], *more: Any, **changes: Any) -> Ended:
    told = {**models, **changes}
    named = [part for name in MODELS for part in (f"--{name}", told[name])]
    where = ("--output", texts.parent / "trace.html", "--table", texts.parent / "trace.parquet")
    return call("trace", texts, *named, *where, *more)


def test_the_table_has_the_class_and_the_probabilities_of_every_sentence(texts: Path, models: dict[str, Path]) -> None:
    ended = tracing(texts, models, "--alpha", 0.001, "--beta", 0.001)
    assert ended.code == 0, ended.said
    rows = pq.read_table(texts.parent / "trace.parquet").to_pylist()
    for number, answer in enumerate(ANSWERS):
        assert "".join(row["text"] for row in rows if row["response"] == number) == answer
    for row in rows:
        p = {name: row[f"p_{name}"] for name in MODELS}
        for name in MODELS:
            assert p[name] == pytest.approx(np.exp(row[f"log_p_{name}"] / row[f"tokens_{name}"]))
        pairs = (p["teacher"] - p["student"], p["teacher"] - p["distilled"], p["student"] - p["distilled"])
        expected = "boosted"
        if max(map(abs, pairs)) <= 0.001:
            expected = "shared"
        elif abs(pairs[0]) > 0.001:
            expected = "teacher" if pairs[0] > 0 else "student"
        assert row["class"] == expected
    assert {row["correct"] for row in rows} == {True, False, None}
    assert len({row["class"] for row in rows}) > 1
    assert "correct responses (1)" in ended.said
    assert "area between the two" in ended.said
    assert "normalised by bytes" in ended.said


def test_what_a_model_reads_comes_after_its_own_template(models: dict[str, Path]) -> None:
    own = tiny.tokenizer(("i", "s"), (".", "Ġ"))
    response = Response(where="here", prompt=({"role": "user", "content": "What is 1 + 2?"},), text=ANSWERS[0])
    seen: list[Any] = []

    class Noting(ModelReader):
        def open(self, info: Any) -> Any:
            seen.extend(info.examples)
            return super().open(info)

    read_responses(Noting(tiny.model(0, vocab_size=300)), [response], tokenizer=own)
    (view,) = seen
    written = own.decode(view.input_ids.tolist())
    assert written == "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n" + ANSWERS[0]
    assert own.decode(view.input_ids[view.scored].tolist()) == ANSWERS[0]


def test_what_models_have_read_is_kept_and_read_by_other_thresholds(
    texts: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = tracing_module.load_model

    def noting(name: str, **options: Any) -> Any:
        loaded.append(Path(name).name)
        if name == str(models["distilled"]) and len(loaded) == 3:
            raise ValueError("out of memory")
        return load(name, **options)

    monkeypatch.setattr(tracing_module, "load_model", noting)
    ended = tracing(texts, models)
    assert ended.code == 1
    assert "out of memory" in ended.said
    assert tracing(texts, models).code == 0
    assert loaded == [*MODELS, "distilled"]  # what the first two had read was not lost
    assert tracing(texts, models, "--beta", 0.2).code == 0
    assert loaded == [*MODELS, "distilled"]
    texts.write_text(texts.read_text(encoding="utf-8").replace("sum", "SUM"), encoding="utf-8")
    assert tracing(texts, models).code == 0
    assert loaded[4:] == list(MODELS)


@pytest.mark.parametrize("key", [None, "uuid"])
def test_a_store_takes_the_place_of_the_teacher(
    texts: Path, models: dict[str, Path], tmp_path: Path, key: str | None
) -> None:
    rows = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    write_lines(texts, [{**row, "uuid": f"u{number}"} for number, row in enumerate(rows)])
    assert tracing(texts, models).code == 0
    live = pq.read_table(texts.parent / "trace.parquet").to_pylist()
    own = AutoTokenizer.from_pretrained(models["teacher"])
    responses = [
        Response(where="", prompt=({"role": "user", "content": row["prompt"]},), text=row["response"]) for row in rows
    ]
    read = read_responses(ModelReader(tiny.model(0, vocab_size=300)), responses, tokenizer=own)
    stored = [
        StoredRow(text=row["response"], key=f"u{number}", begins=each.begins, surprisal=each.surprisal)
        for number, (row, each) in enumerate(zip(rows, read, strict=True))
        if isinstance(each, TokenLogProbs) and number != 1
    ]
    path = tmp_path / "store.arrow"
    write_store(path, stored, {"model": "tiny", **({"key_column": key} if key else {})})
    ended = tracing(texts, models, teacher=path)
    assert ended.code == 0, ended.said
    assert "responses left out, for the teacher" in ended.said
    found = pq.read_table(texts.parent / "trace.parquet").to_pylist()
    expected = [row for row in live if row["response"] != 1]
    assert [row["class"] for row in found] == [row["class"] for row in expected]
    assert [row["p_teacher"] for row in found] == pytest.approx([row["p_teacher"] for row in expected], abs=1e-5)


def test_a_model_against_itself_has_shared_sentences_only(texts: Path, models: dict[str, Path]) -> None:
    alone = dict.fromkeys(MODELS, models["student"])
    assert tracing(texts, alone, "--alpha", 1e-6).code == 0
    table = pq.read_table(texts.parent / "trace.parquet")
    assert set(table["class"].to_pylist()) == {CLASSES[SHARED]}


def test_text_of_the_data_is_text_on_the_page_and_nothing_runs(texts: Path, models: dict[str, Path]) -> None:
    assert tracing(texts, models).code == 0
    page = (texts.parent / "trace.html").read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(page)
    assert not {"script", "img", "a", "iframe"} & {tag for tag, _ in elements.found}
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    assert "default-src 'none'" in page
    assert "script-src" not in page
    shown = html.unescape("".join(re.findall(r'data-says="[^"]*">([^<]*)</span>', page)))
    assert shown == "".join(ANSWERS)
    assert len(re.findall(r'data-says="\w+:  teacher \d\.\d\d  student \d\.\d\d  distilled \d\.\d\d"', page)) == len(
        pq.read_table(texts.parent / "trace.parquet")
    )


def test_a_response_that_one_model_cannot_read_is_left_out_and_said(texts: Path, models: dict[str, Path]) -> None:
    with texts.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "?", "response": "Long. " * 200, "correct": True}) + "\n")
    ended = tracing(texts, models)
    assert ended.code == 0
    assert "responses left out, for the teacher it has more tokens than the model has positions for: 1" in ended.said


def with_nan(folder: Path, output: Path, text: str) -> Path:
    """A model like another one, whose logits are NaN from the first byte of this text on."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer(text)["input_ids"][0]] = torch.nan
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return output


@pytest.mark.parametrize("name", MODELS)
def test_a_response_for_which_logits_are_nan_is_left_out_and_said(
    texts: Path, models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    broken = with_nan(models[name], tmp_path / "broken", "Ç")  # only the last answer has it
    whole = tracing(texts, models)
    assert whole.code == 0
    before = pq.read_table(tmp_path / "trace.parquet").to_pylist()
    for _ in range(2):  # the second run takes what was read from disk
        ended = tracing(texts, models, **{name: broken})
        assert ended.code == 0, ended.said
        assert f"responses left out, for the {name} the logits for it are NaN or infinite: 1" in ended.said
        after = pq.read_table(tmp_path / "trace.parquet").to_pylist()
        assert [row["text"] for row in after] == [row["text"] for row in before if row["response"] < 2]
        assert all(np.isfinite(value) for row in after for value in row.values() if isinstance(value, float))
        assert not re.search(r"\bnan\b", (tmp_path / "trace.html").read_text(encoding="utf-8"), re.IGNORECASE)


def test_a_model_whose_logits_are_all_nan_ends_the_trace(texts: Path, models: dict[str, Path], tmp_path: Path) -> None:
    broken = with_nan(models["student"], tmp_path / "broken", "W")  # all prompts begin with it
    ended = tracing(texts, models, student=broken)
    assert ended.code == 1
    assert "the student" in ended.said
    assert "NaN or infinite" in ended.said
    assert not (tmp_path / "trace.html").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--alpha", 1.5), "alpha=1.5"),
        (("--beta", -1), "beta=-1"),
        (("--bytes-per-token", 0), "bytes_per_token=0"),
        (("--correct-column", "verdict"), "--correct-column: no row has a value in a column 'verdict'"),
        (("--response-column", "answer"), "--response-column: "),
        (("--output", "trace.txt"), "ends in .html"),
        (("--table", "trace.csv"), "ends in .parquet"),
        (("--teacher", "nowhere/at/all"), "no model folder nowhere/at/all"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    texts: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, more: tuple[Any, ...], said: str
) -> None:
    monkeypatch.setattr(tracing_module, "load_model", None)
    ended = tracing(texts, models, *more)
    assert ended.code == 1
    assert said in ended.said


def test_a_row_that_cannot_be_used_stops_the_command_or_is_counted(texts: Path, models: dict[str, Path]) -> None:
    with texts.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "?", "response": None, "correct": True}) + "\n")
    ended = tracing(texts, models)
    assert ended.code == 1
    assert "line 4" in ended.said
    assert "--on-error skip" in ended.said
    ended = tracing(texts, models, "--on-error", "skip")
    assert ended.code == 0
    assert "bad rows, left out: 1" in ended.said


def test_a_trace_without_verdicts_has_curves_of_all_responses() -> None:
    reader, own = ModelReader(tiny.model()), tiny.tokenizer()
    responses = [Response(where="here", prompt=({"role": "user", "content": "?"},), text=text) for text in ANSWERS]
    found = read_responses(reader, responses, tokenizer=own)
    traced = trace(responses, dict.fromkeys(MODELS, found), provenance=Provenance())
    assert traced.areas() is None
    assert traced.curves().sum(axis=1) == pytest.approx(np.ones(10))
    assert "all line-teacher" in render_trace(traced, models=dict.fromkeys(MODELS, "one"))
    gone = trace(
        responses, {**dict.fromkeys(MODELS, found), "student": [Missing.NON_FINITE] * 3}, provenance=Provenance()
    )
    assert [who for _, who, _ in gone.left_out] == ["student"] * 3
