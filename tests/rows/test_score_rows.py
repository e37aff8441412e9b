"""`score_rows`: rows of every kind give the command line's scores, and mistakes get a sentence."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from distill_sampler import GlobalNaturalness, RankSurprisalRatio, attach, score_rows
from distill_sampler.serialize import decode_facts
from tests import tiny
from tests.cli.conftest import call, rows, write_lines
from tests.test_attach import TRAINERS, curriculum

METRICS = [RankSurprisalRatio(), GlobalNaturalness()]
SCORES = ("mean_rank", "mean_surprisal", "rank_surprisal_ratio", "global_naturalness")


@pytest.fixture(scope="module")
def by_command(tmp_path_factory: pytest.TempPathFactory, student_path: Path) -> pa.Table:
    folder = tmp_path_factory.mktemp("scored")
    data = write_lines(folder / "d.jsonl", rows())
    ended = call("score", data, "--model", student_path, "--output", folder / "s.parquet", "--traces", 0)
    assert ended.code == 0, ended.said
    return pq.read_table(folder / "s.parquet")


def given(form: str) -> Any:
    """The same candidates in a form that a program has."""
    lines = rows()
    messages = [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}] for r in lines
    ]
    if form == "messages":
        return [{"messages": m, "prompt_id": r["prompt_id"]} for m, r in zip(messages, lines, strict=True)]
    if form == "completion":
        return tiny.candidates()
    if form == "text":
        texts = tiny.tokenizer().apply_chat_template(messages, tokenize=False)
        return [{"text": text, "prompt_id": row["prompt_id"]} for text, row in zip(texts, lines, strict=True)]
    if form == "tokens":
        prepared = tiny.tokenised(tiny.candidates(), tiny.tokenizer())
        return prepared.select_columns(["input_ids", "labels", "prompt_id"]).with_format("torch")
    if form == "iterator":
        return iter(lines)
    return {"rows": lines, "table": pa.Table.from_pylist(lines), "frame": pandas.DataFrame(lines)}[form]


@pytest.mark.parametrize("form", ["rows", "table", "frame", "messages", "completion", "text", "tokens", "iterator"])
def test_rows_of_every_kind_give_the_numbers_of_the_command_bit_for_bit(form: str, by_command: pa.Table) -> None:
    table = score_rows(tiny.model(), given(form), metrics=METRICS, tokenizer=tiny.tokenizer(), progress=False)
    for name in (*SCORES, "prompt_id", "scoring_hash", "num_tokens", "length"):
        assert table[name].to_pylist() == by_command[name].to_pylist(), name


def test_a_model_in_memory_and_its_folder_give_one_table(student_path: Path, by_command: pa.Table) -> None:
    by_name = score_rows(student_path, rows(), progress=False)
    assert by_name.equals(by_command.replace_schema_metadata(None))
    identity = decode_facts(by_name.schema.metadata)["identity"]
    assert identity == decode_facts(by_command.schema.metadata)["identity"]
    in_memory = score_rows(tiny.model(), rows(), metrics=METRICS, tokenizer=tiny.tokenizer(), progress=False)
    assert in_memory.equals(by_name)
    assert decode_facts(in_memory.schema.metadata)["identity"] == identity


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_trainer_gives_the_same_table(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, by_command: pa.Table
) -> None:
    trainer = TRAINERS[kind](tmp_path, tokenizer, max_steps=1)
    attach(trainer, curriculum(metrics=METRICS))
    trainer.train()
    table = pq.read_table(tmp_path / "scores.parquet")
    table = table.filter(pc.field("pass") == 0)
    for name in ("prompt_id", "teacher", "num_tokens", "length"):
        assert table[name].to_pylist() == by_command[name].to_pylist(), name
    assert table["content_hash"].to_pylist() == by_command["scoring_hash"].to_pylist()
    for name in SCORES:
        np.testing.assert_allclose(table[name].to_numpy(), by_command[name].to_numpy(), rtol=1e-6, atol=1e-6)


def test_the_table_is_a_frame_and_a_file_for_the_commands(tmp_path: Path, student_path: Path) -> None:
    table = score_rows(student_path, rows(), progress=False)
    assert table.to_pandas().groupby("teacher")["rank_surprisal_ratio"].mean().index.tolist() == ["ada", "bob", "cy"]
    pq.write_table(table, tmp_path / "scores.parquet")
    ended = call("teachers", tmp_path / "scores.parquet")
    assert (ended.code, "ada" in ended.said) == (0, True), ended.said


def test_scoring_leaves_the_model_as_it_was() -> None:
    model = tiny.model().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    score_rows(model, rows(1), tokenizer=tiny.tokenizer(), progress=False)
    assert model.training
    assert all(bool((weight == before[name]).all()) for name, weight in model.state_dict().items())


def test_what_was_found_out_about_the_rows_is_printed_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    score_rows(tiny.model(), rows(1), tokenizer=tiny.tokenizer(), progress=False)
    assert capsys.readouterr().err == ""
    score_rows(tiny.model(), [{k: v for k, v in rows(1)[0].items() if k != "teacher"}], tokenizer=tiny.tokenizer())
    said = capsys.readouterr().err
    assert "prompt = 'prompt', response = 'response'" in said
    assert "teacher_column=" in said, "options are spelled as arguments"
    assert "--" not in said


@pytest.mark.parametrize(
    ("rows_given", "options", "argument"),
    [
        (rows(1), {"response_column": "reply"}, "response_column=: the data has no column 'reply'"),
        (rows(1), {"max_length": 1}, "max_length= 1"),
        (rows(1), {"metrics": "no_such_metric"}, "no_such_metric"),
        (rows(1), {"metrics": [RankSurprisalRatio]}, "metrics="),
        (rows(1), {"tokenizer": None}, "tokenizer="),
        ([{**rows(1)[0], "response": ""}], {}, "on_error= skip"),
        ([], {}, "no rows in the rows"),
        ("candidates.jsonl", {}, "rows="),
        ([{"text": "no template"}], {}, "whole_text="),
        (rows(1), {"dtype": "bfloat16"}, "dtype= is for a model that is loaded by its name"),
        (rows(1), {"shard": (3, 2)}, "1/2"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_the_argument(
    rows_given: Any, options: dict[str, Any], argument: str
) -> None:
    with pytest.raises(ValueError, match=argument.replace("(", r"\(")):
        score_rows(tiny.model(), rows_given, **{"tokenizer": tiny.tokenizer(), "progress": False, **options})


def test_options_of_a_model_with_a_name_are_checked(student_path: Path) -> None:
    with pytest.raises(ValueError, match="autocast= int3: choose"):
        score_rows(student_path, rows(1), progress=False, autocast="int3")
    with pytest.raises(ValueError, match="Leave dtype= bfloat16 out"):
        score_rows(student_path, rows(1), progress=False, autocast="bfloat16", dtype="bfloat16")


def test_rows_that_cannot_be_used_are_left_out_on_request() -> None:
    bad = [rows(1)[0], {**rows(1)[1], "response": ""}, rows(1)[2]]
    table = score_rows(tiny.model(), bad, tokenizer=tiny.tokenizer(), progress=False, on_error="skip")
    assert table["teacher"].to_pylist() == ["ada", "cy"]
    assert np.isfinite(table["rank_surprisal_ratio"].to_numpy()).all()
