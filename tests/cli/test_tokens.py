"""Rows that are token ids already, and responses that `--max-length` cuts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.report.leaderboard import rank_teachers
from tests import tiny
from tests.cli.conftest import call, rows, write_lines

RSR = "rank_surprisal_ratio"


# ---- Rows of tokens ----


def tokens(num_prompts: int = 2, *, labels: bool = True, **more: Any) -> list[dict[str, Any]]:
    """The toy candidates as token ids, with who wrote them, and with labels or all trained on."""
    prepared = tiny.tokenised(tiny.candidates(num_prompts), tiny.tokenizer())
    names = ["input_ids", *(["labels"] if labels else []), "teacher"]
    return [{**{name: row[name] for name in names}, **more} for row in prepared]


def test_rows_with_the_same_prompt_are_one_group_where_labels_show_it(student_path: Path, tmp_path: Path) -> None:
    for labels, groups in ((True, 2), (False, 6)):
        data = write_lines(tmp_path / "rows.jsonl", tokens(labels=labels))
        output = tmp_path / f"{labels}.parquet"
        ended = call("score", data, "--model", student_path, "--output", output)
        assert ended.code == 0, ended.said
        assert "Columns: tokens = 'input_ids'" in ended.said
        assert "Template: none is applied. Rows are token ids" in ended.said
        assert "--group-column" in ended.said
        table = pq.read_table(output)
        assert len(set(table["prompt_id"].to_pylist())) == len(set(table["prompt_hash"].to_pylist())) == groups
    assert "user" in table["prompt_text"][0].as_py()


@pytest.mark.parametrize("named", ["completion_mask", "assistant_masks"])
def test_masks_count_as_labels(named: str, student_path: Path, tmp_path: Path) -> None:
    with_labels = tokens()
    with_masks = [
        {"input_ids": row["input_ids"], named: [int(label != -100) for label in row["labels"]]} for row in with_labels
    ]
    found = []
    for name, some in (("labels", with_labels), ("masks", with_masks)):
        output = tmp_path / f"{name}.parquet"
        ended = call("score", write_lines(tmp_path / "d.jsonl", some), "--model", student_path, "--output", output)
        assert ended.code == 0, ended.said
        found.append(pq.read_table(output))
    for column in (RSR, "num_tokens", "prompt_id", "content_hash"):
        assert found[0][column].to_pylist() == found[1][column].to_pylist()


def test_text_is_read_where_both_are_there(student_path: Path, tmp_path: Path) -> None:
    data = [{**row, "input_ids": [1, 2, 3]} for row in rows(2)]
    ended = call(
        "score", write_lines(tmp_path / "d.jsonl", data), "--model", student_path, "--output", tmp_path / "s.parquet"
    )
    assert ended.code == 0, ended.said
    assert "prompt = 'prompt', response = 'response'" in ended.said


def test_tokens_of_another_student_and_labels_that_do_not_fit_are_refused(student_path: Path, tmp_path: Path) -> None:
    good = tokens()
    for bad, said in (
        ({"input_ids": [5, 6, 99999], "labels": [-100, 6, 99999]}, "line 7: the token 99999 is not one of the 258"),
        ({"input_ids": [5, 6, -1], "labels": [-100, 6, -1]}, "line 7: the token -1 is not one of the 258"),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6]}, "line 7: its labels or masks do not have the length of its 3"),
        ({"input_ids": "5 6 7"}, "line 7: 'input_ids' is a str, not a list of token ids"),
        (
            {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
            "line 7: the row is all trained on and holds no assistant turn",
        ),
    ):
        data = write_lines(tmp_path / "d.jsonl", [*good, bad])
        ended = call("score", data, "--model", student_path, "--output", tmp_path / "s.parquet", "--overwrite")
        assert (ended.code, said in ended.said) == (1, True), ended.said
    ended = call(
        "score", data, "--model", student_path, "--output", tmp_path / "s.parquet", "--overwrite", "--whole-text"
    )
    assert ended.code == 0, ended.said
    assert "texts scored whole, prompt included, because of --whole-text: 1." in ended.said
    assert pq.read_table(tmp_path / "s.parquet")["num_tokens"].to_pylist()[-1] == 2


def test_rows_that_show_no_response_can_be_left_out(student_path: Path, tmp_path: Path) -> None:
    turns = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes{}<|im_end|>\n"
    texts = [{"text": turns.format(number)} for number in range(3)]
    for good, bad in ((texts, {"text": "no turn"}), (tokens(), {"input_ids": [5, 6, 99999]})):
        data = write_lines(tmp_path / "d.jsonl", [*good[:2], bad, *good[2:]])
        output = tmp_path / "s.parquet"
        ended = call("score", data, "--model", student_path, "--output", output, "--on-error", "skip", "--overwrite")
        assert ended.code == 0, ended.said
        assert "left out: d.jsonl, line 3: the t" in ended.said
        assert pq.read_metadata(output).num_rows == len(good)


def test_a_conversation_that_the_template_refuses_is_named(student_path: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x")
    data = write_lines(
        tmp_path / "d.jsonl", [{"messages": [{"role": r, "content": "a"} for r in ("system", "assistant")]}]
    )
    ended = call(
        "score", data, "--model", student_path, "--output", tmp_path / "s.parquet", "--chat-template", template
    )
    assert (ended.code, "line 1: the chat template refuses this conversation (no system role)" in ended.said) == (
        1,
        True,
    )


def test_what_is_chosen_of_tokens_is_written_as_tokens(student_path: Path, tmp_path: Path) -> None:
    given = tokens()
    output, chosen = tmp_path / "s.parquet", tmp_path / "chosen.jsonl"
    data = write_lines(tmp_path / "d.jsonl", given)
    assert call("score", data, "--model", student_path, "--output", output).code == 0
    ended = call("select", output, "--policy", f"BestOf({RSR}, per=prompt_id)", "--output", chosen)
    assert ended.code == 0, ended.said
    lines = [json.loads(line) for line in chosen.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 2
    assert all({name: line[name] for name in ("input_ids", "labels", "teacher")} in given for line in lines)


# ---- Responses that are cut ----


@pytest.fixture(scope="module")
def cut(student_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Scores of the whole candidates, scores of some that are cut, and what the command said."""
    folder = tmp_path_factory.mktemp("cut")
    data = write_lines(folder / "candidates.jsonl", rows())
    whole, short = folder / "whole.parquet", folder / "short.parquet"
    assert call("score", data, "--model", student_path, "--output", whole).code == 0
    ended = call("score", data, "--model", student_path, "--output", short, "--max-length", 75)
    assert ended.code == 0, ended.said
    return whole, short, ended.said


def test_the_scores_say_how_much_of_a_response_was_cut(cut: tuple[Path, Path, str]) -> None:
    whole, short = (pq.read_table(path) for path in cut[:2])
    lost = np.array(whole["num_tokens"]) - np.array(short["num_tokens"])
    assert 0 < np.count_nonzero(lost) < len(lost)
    np.testing.assert_array_equal(short["tokens_cut"], lost + (np.array(whole["length"]) > 76))  # and the marker
    assert not np.array(whole["tokens_cut"]).any()
    number = np.count_nonzero(np.array(short["tokens_cut"]))
    assert f"{number} of 18 responses were cut off at --max-length 75 (" in cut[2]
    assert "cy: 6 of 6 by" in cut[2]


def test_teachers_and_report_tell_whose_responses_were_cut(cut: tuple[Path, Path, str], tmp_path: Path) -> None:
    for path, told in ((cut[0], False), (cut[1], True)):
        ended = call("teachers", path)
        assert ended.code == 0, ended.said
        assert ("responses were cut off at --max-length 75" in ended.said) is told
        page = tmp_path / "page.html"
        assert call("report", path, "--output", page).code == 0
        assert ("responses were cut off at --max-length 75" in page.read_text(encoding="utf-8")) is told


@pytest.mark.parametrize("prefer", [True, False])
def test_a_choice_from_the_scores_prefers_whole_responses(
    prefer: bool, cut: tuple[Path, Path, str], tmp_path: Path
) -> None:
    output = tmp_path / "chosen.jsonl"
    policy = f"BestOf({RSR}, per=prompt_id, prefer_whole={prefer})"
    table = pq.read_table(cut[1])
    # as if the cut ones were the best
    values = np.where(np.array(table["tokens_cut"]) > 0, 0.1, np.array(table[RSR])).astype(np.float32)
    pq.write_table(table.set_column(table.column_names.index(RSR), RSR, [values]), tmp_path / "scores.parquet")
    ended = call("select", tmp_path / "scores.parquet", "--policy", policy, "--output", output)
    assert ended.code == 0, ended.said
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert ({line["teacher"] for line in lines} == {"cy"}) is not prefer
    board = rank_teachers(Scores.open(tmp_path / "scores.parquet"), draws=0)
    assert board is not None
    assert {line.teacher: line.chosen.value for line in board.lines}["cy"] == 0
