"""Policies as text, offline selection with the reason of each row, and the other commands."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from distill_sampler import BestOf, KeepTop, MixDomains, RankAverage, Shuffle, SortBy
from distill_sampler.metrics import RankSurprisalRatio
from distill_sampler.specs import parse_metrics, parse_policies
from tests.cli.conftest import call, rows, write_lines


def test_policies_are_read_as_they_are_typed() -> None:
    assert parse_policies(["BestOf(rank_surprisal_ratio, per=prompt_id, k=2)", "Shuffle"]) == [
        BestOf("rank_surprisal_ratio", per="prompt_id", k=2),
        Shuffle(),
    ]
    assert parse_policies(
        ["KeepTop(RankAverage(a, 'b', weights=[1, 2]), fraction=0.5), SortBy(a, best_first=False)"]
    ) == [
        KeepTop(RankAverage("a", "b", weights=[1, 2]), fraction=0.5),
        SortBy("a", best_first=False),
    ]
    assert parse_policies(["MixDomains({'math': 3, code: 1})"]) == [MixDomains({"math": 3, "code": 1})]
    assert parse_policies([repr(BestOf("a", per="b"))]) == [BestOf("a", per="b")]
    assert parse_metrics("rank_surprisal_ratio", rank_clip=7) == [RankSurprisalRatio(rank_clip=7)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("BestOff(a, per=b)", "Did you mean 'BestOf'?"),
        ("BestOf(a)", "missing 1 required positional argument: 'per'"),
        ("BestOf(a, per=b, n=3)", "unexpected keyword argument 'n'"),
        ("BestOf(a, per=b, k=0)", "k must be at least 1"),
        ("BestOf(", "cannot be read"),
        ("BestOf(__import__('os').system('x'), per=b)", "cannot be read. Use numbers"),
        ("BestOf(open(a), per=b)", "There is no policy 'open'"),
        ("(lambda: 1)()", "cannot be read. Use numbers"),
        ("RankAverage(a)", "goes inside a policy"),
        ("3", "write it like"),
    ],
)
def test_text_that_is_no_policy_is_refused_and_never_run(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(").replace("?", r"\?")):
        parse_policies([text])


def test_a_selection_is_a_training_set_with_reasons(scored: Path, tmp_path: Path) -> None:
    output = tmp_path / "selected.jsonl"
    ended = call("select", scored, "--policy", "BestOf(rank_surprisal_ratio, per=prompt_id)", "--output", output)
    assert ended.code == 0, ended.said
    assert "6 rows (6 distinct of 18 candidates)" in ended.said
    chosen = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    scores = pq.read_table(scored).to_pylist()
    for row in chosen:
        rivals = [other["rank_surprisal_ratio"] for other in scores if other["prompt_id"] == row["prompt_id"]]
        assert row["rank_surprisal_ratio"] == min(rivals)
        assert f"is number 1 of 3 with prompt_id = {row['prompt_id']}" in row["reason"]
        source = next(r for r in rows() if (r["prompt_id"], r["teacher"]) == (row["prompt_id"], row["teacher"]))
        assert row["prompt"] == [{"role": "user", "content": source["prompt"]}]
        assert row["completion"] == [{"role": "assistant", "content": source["response"]}]
    assert load_dataset("json", data_files=str(output), split="train", cache_dir=str(tmp_path / "cache")).num_rows == 6


def test_the_order_and_the_repeats_of_the_plan_are_written(scored: Path, tmp_path: Path) -> None:
    output = tmp_path / "selected.parquet"
    policies = [
        "KeepTop(rank_surprisal_ratio, num=5)",
        "WeightBySoftmax(rank_surprisal_ratio, temperature=1)",
        "SortBy(mean_rank)",
    ]
    ended = call("select", scored, *(part for text in policies for part in ("--policy", text)), "--output", output)
    assert (ended.code, "There is no metric 'mean_rank'" in ended.said) == (1, True)
    policies[2] = "SortBy(rank_surprisal_ratio)"
    ended = call("select", scored, *(part for text in policies for part in ("--policy", text)), "--output", output)
    assert ended.code == 0, ended.said
    table = pq.read_table(output)
    ratios = table["rank_surprisal_ratio"].to_pylist()
    assert ratios == sorted(ratios)
    assert sum(table["weight"].to_pylist()) == pytest.approx(5)


def test_changed_data_is_refused(tmp_path: Path, student_path: Path) -> None:
    data = write_lines(tmp_path / "d.jsonl", rows(2))
    call("score", data, "--model", student_path, "--output", tmp_path / "s.parquet")
    write_lines(data, rows(2)[1:])
    ended = call("select", tmp_path / "s.parquet", "--policy", "Shuffle", "--output", tmp_path / "o.jsonl")
    assert (ended.code, "is not what" in ended.said) == (1, True)


def test_bad_rows_that_were_left_out_stay_out(tmp_path: Path, student_path: Path) -> None:
    data = write_lines(tmp_path / "d.jsonl", [rows(2)[0], {"prompt": "a", "response": ""}, *rows(2)[1:]])
    call("score", data, "--model", student_path, "--output", tmp_path / "s.parquet", "--on-error", "skip")
    ended = call("select", tmp_path / "s.parquet", "--policy", "Shuffle", "--output", tmp_path / "o.jsonl")
    assert ended.code == 0, ended.said
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 6


def test_teachers_prints_the_leaderboard(scored: Path) -> None:
    ended = call("teachers", scored)
    assert ended.code == 0
    assert "is first by rank surprisal ratio" in ended.said
    assert "Few prompts" in ended.said
    for path, sentence in (
        (scored.with_name("none.parquet"), "There is no scores file"),
        (__file__, "is not a Parquet file"),
    ):
        ended = call("teachers", path)
        assert (ended.code, sentence in ended.said) == (1, True)


def test_what_cannot_be_written_is_refused_before_the_work(scored: Path, tmp_path: Path) -> None:
    policy = ("--policy", "Shuffle")
    for command, more, name in (("select", policy, "o.jsonl"), ("report", (), "r.html")):
        for output, sentence in ((f"/proc/none/{name}", "cannot be written"), (tmp_path, "is a folder")):
            ended = call(command, scored, *more, "--output", output)
            assert (ended.code, sentence in ended.said) == (1, True), ended.said
        ended = call(command, scored, *more, "--output", tmp_path / "o.doc")
        assert (ended.code, "give a name that ends in" in ended.said) == (1, True)


def test_domains_and_verdicts_are_columns_that_the_user_names(tmp_path: Path, student_path: Path) -> None:
    many = rows(60)
    for place, row in enumerate(many):
        row["parity"] = ("even", "odd")[place // 3 % 2]
        row["fine"] = row.pop("correct")
    data = write_lines(tmp_path / "d.jsonl", many)
    scores = tmp_path / "s.parquet"
    assert call("score", data, "--model", student_path, "--output", scores).code == 0
    assert "omain" not in call("teachers", scores).said
    ended = call("teachers", scores, "--domain-column", "parity", "--correct-column", "fine")
    assert ended.code == 0, ended.said
    assert "is first in each of 2 domains" in ended.said or "The first teacher depends on the domain" in ended.said
    assert "teacher even odd" in ended.said
    assert "0%" in ended.said, "cy is never correct"
    assert call("report", scores, "--domain-column", "parity", "--output", tmp_path / "r.html").code == 0
    assert "Is it the same in every domain?" in (tmp_path / "r.html").read_text(encoding="utf-8")
    ended = call("teachers", scores, "--domain-column", "pairity")
    assert (ended.code, "Did you mean 'parity'?" in ended.said) == (1, True)


def test_a_column_that_is_not_there_is_named(scored: Path, tmp_path: Path) -> None:
    ended = call("select", scored, "--policy", "BestOf(rsr, per=promt_id)", "--output", tmp_path / "x.jsonl")
    assert ended.code == 1
    assert "There is no column 'promt_id'" in ended.said
    names = re.search(r"that are available: (.*?)\. Did you mean 'prompt_id'", ended.said)
    assert names
    assert names[1] == "'correct', 'prompt_id', 'teacher'"  # the user's, of all columns of the file


def test_usage_errors_end_with_2(scored: Path) -> None:
    assert call("teachers").code == 2
    assert call("teachers", scored, "--nonsense").code == 2


def test_doctor_measures_scoring_against_the_bare_forward(student_path: Path) -> None:
    ended = call("doctor", "--model", student_path, "--device", "cpu", "--seconds", 0)
    assert ended.code == 0, ended.said
    assert "bare backbone forward" in ended.said
    assert "tokens/s" in ended.said
