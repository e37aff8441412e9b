"""The tables in the documentation are those of the runs that are kept."""

import re
from pathlib import Path

import pytest

from distill_sampler.cli.compare import tables_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def table() -> str:
    return tables_of(ROOT / "recipes" / "results" / "gsm8k.jsonl")


def test_the_documented_tables_are_those_of_the_kept_runs(table: str) -> None:
    documented = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8").replace("**", "")
    for paragraph in table.strip().split("\n\n"):
        assert paragraph in documented


def test_the_readme_quotes_the_kept_runs(table: str) -> None:
    contrast = r"^\| (\w+) \| (\S+ \[.*?\]) (?:\| 0\.\d+ ){3}\| (\w+) \|$"
    contrasts = {name: f"{gain} | {verdict}" for name, gain, verdict in re.findall(contrast, table, re.MULTILINE)}
    arms = re.findall(r"^\| (\w+) \| 5 \|(?: [\d,]+ \|){2} (\d+) \| (0\.\d+)", table, re.MULTILINE)
    losses = {name: f"{steps} | {loss}" for name, steps, loss in arms}
    (section,) = re.findall(r"^## Does it help\?$(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    for row, name in (
        ("random, with RSR's teachers", "matched_random"),
        ("random", "random"),
        ("the longest response", "longest"),
        ("the best single teacher", "best_single_teacher"),
    ):
        assert f"| {row} | {losses[name]} | {contrasts[name]} |" in section
    assert f"| {losses['rsr']} | | |" in section
    assert f"| {losses['none']} | | |" in section
