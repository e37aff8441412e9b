"""What all commands have in common: results as JSON, short names, completion, a quick start; and several students."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from distill_sampler import progress
from distill_sampler.cli import app
from distill_sampler.cli.options import _plain
from distill_sampler.specs import parse_metrics, parse_policies
from tests import tiny
from tests.cli.conftest import call, rows, write_lines

RSR = "rank_surprisal_ratio"


def told(*arguments: object) -> Any:
    """What a command prints on stdout with --json: one JSON object and nothing else."""
    return json.loads(CliRunner().invoke(app, [*(str(argument) for argument in arguments), "--json"]).stdout)


@pytest.fixture(scope="module")
def of_two_students(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Scores of the same candidates by two students."""
    folder = tmp_path_factory.mktemp("two")
    data = write_lines(folder / "candidates.jsonl", rows())
    files = []
    for seed, name in enumerate(("small", "other")):
        tiny.model(seed).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
        files.append(folder / f"{name}.parquet")
        ended = call("score", data, "--model", folder / name, "--metrics", "rsr,gn", "--output", files[-1])
        assert ended.code == 0, ended.said
    return files


# ---- JSON ----


def test_every_command_gives_its_result_as_json() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    without = [name for name, command in commands.items() if "as_json" not in {each.name for each in command.params}]
    assert without == []


def test_json_is_all_there_is_on_stdout(scored: Path, student_path: Path, tmp_path: Path) -> None:
    data = scored.with_name("candidates.jsonl")
    score = told("score", data, "--model", student_path, "--output", tmp_path / "s.parquet")
    assert (score["rows"], score["bad_rows"], score["output"]) == (18, 0, str(tmp_path / "s.parquet"))
    select = told("select", scored, "--policy", "BestOf(rsr, per=prompt_id)", "--output", tmp_path / "s.jsonl")
    assert (select["rows"], select["candidates"]) == (6, 18)
    report = told("report", scored, "--output", tmp_path / "r.html")
    assert report["bytes"] == (tmp_path / "r.html").stat().st_size
    board = told("teachers", scored)
    assert {line["teacher"] for line in board["teachers"]} == set(tiny.TEACHERS)
    first = board["teachers"][0]["scores"][RSR]
    assert first["low"] <= first["value"] <= first["high"]


def test_an_error_is_json_too(tmp_path: Path) -> None:
    assert "absent.parquet" in told("teachers", tmp_path / "absent.parquet")["error"]


def test_numbers_that_json_lacks_are_null() -> None:
    assert _plain({"a": [float("nan"), 1.5], "b": {"c": float("inf")}}) == {"a": [None, 1.5], "b": {"c": None}}


# ---- Names ----


def test_metrics_have_short_names_wherever_they_are_typed(scored: Path, tmp_path: Path) -> None:
    (metric,) = parse_metrics("RSR", rank_clip=50)
    assert (metric.name, metric.rank_clip) == (RSR, 50)  # type: ignore[attr-defined]
    (policy,) = parse_policies(["BestOf(RankAverage(rsr, gn), per=rsr)"])
    assert policy.uses_metrics == (RSR, "global_naturalness")
    assert policy.per == "rsr"  # type: ignore[attr-defined]  # a column, not a metric
    assert call("teachers", scored, "--metric", "gn").said.count("Ranked by global naturalness") == 1


def test_a_metric_that_is_called_like_a_short_name_is_meant() -> None:
    (policy,) = parse_policies(["BestOf(rsr, per=prompt_id)"], ["rsr", RSR])
    assert policy.uses_metrics == ("rsr",)


@pytest.mark.parametrize("typo", ["rank_suprisal_ratio", "RankSurprisalRatios"])
def test_a_typo_gets_a_suggestion(typo: str) -> None:
    with pytest.raises(ValueError, match=r"Did you mean '[Rr]ank_?[Ss]urprisal_?[Rr]atio'"):
        parse_metrics(typo)


def test_a_typo_in_a_command_or_option_gets_a_suggestion() -> None:
    assert "teachers" in call("teacher").said
    assert "--metric" in call("teachers", "x.parquet", "--metrik", "rsr").said


# ---- The shell ----


def completions(words: str) -> list[str]:
    environment = {
        **os.environ,
        "_DISTILL_SAMPLER_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    code = "from distill_sampler.cli import app; app(prog_name='distill-sampler')"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return ended.stdout.split()


def test_the_shell_completes_commands_metrics_and_policies() -> None:
    assert "teachers" in completions("distill-sampler te")
    assert completions("distill-sampler score --metrics rsr,Local") == ["rsr,LocalNaturalness"]
    assert completions("distill-sampler select --policy BestO") == ["BestOf"]


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from distill_sampler.cli import app
try:
    app(["score", "--help"])
except SystemExit:
    pass
heavy = ("torch", "numpy", "pyarrow", "transformers", "trl", "datasets", "plotly", "tqdm")
assert [name for name in heavy if name in sys.modules] == []
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# ---- Progress ----


def test_the_progress_of_a_slice_counts_its_prompts(
    candidates: Path, student_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    output = tmp_path / "s.parquet"
    ended = call("score", candidates, "--model", student_path, "--output", output, "--prompts", 2, "--batch-tokens", 64)
    shares = [int(share) for share in re.findall(r"Scoring: (\d+)%", ended.said)]
    assert shares == sorted(shares)
    assert shares[-1] == 100  # though the slice is a third of the file


# ---- Several students ----


def test_several_students_are_compared_in_one_table(of_two_students: list[Path]) -> None:
    ended = call("teachers", *of_two_students)
    assert ended.code == 0, ended.said
    assert all(teacher in ended.said for teacher in tiny.TEACHERS)
    assert "small" in ended.said
    assert "other" in ended.said
    both = told("teachers", *of_two_students)
    alone = [told("teachers", file) for file in of_two_students]
    assert [each["teachers"] for each in both["students"]] == [each["teachers"] for each in alone]


def test_a_comparison_says_that_the_data_differ(
    of_two_students: list[Path], student_path: Path, tmp_path: Path
) -> None:
    fewer = write_lines(tmp_path / "fewer.jsonl", rows(5))
    assert call("score", fewer, "--model", student_path, "--output", tmp_path / "f.parquet").code == 0
    notes = told("teachers", of_two_students[0], tmp_path / "f.parquet")["notes"]
    assert any("15 of 18 are the same" in note for note in notes)


def test_a_report_of_several_students_compares_them_and_links_their_pages(
    of_two_students: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "r.html"
    result = told("report", *of_two_students, "--output", output, "--title", "<b>Two</b>")
    page = output.read_text(encoding="utf-8")
    links = re.findall(r'href="([^"]+)"', page)
    assert links == ["r-1-small.html", "r-2-other.html"]
    assert [str(tmp_path / link) for link in links] == result["pages"]
    assert all((tmp_path / link).stat().st_size > 10_000 for link in links)
    assert "&lt;b&gt;Two&lt;/b&gt;" in page
    assert "<script" not in page
    assert all(f"<td>{teacher}</td>" in page for teacher in tiny.TEACHERS)
