"""The tables in the documentation are those of the runs that are kept."""

import re
from pathlib import Path

import pytest

from distill_sampler.cli.compare import tables_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("evidence.md", "evidence_tables.md")}
KEPT = ("gsm8k_tokens", "gsm8k_samples", "math500_tokens", "math500_samples")
"""The comparisons, in the order of the columns of the summaries."""


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    return {name: tables_of(ROOT / "recipes" / "results" / f"{name}.jsonl") for name in KEPT}


def test_every_kept_file_is_shown() -> None:
    assert sorted(path.stem for path in (ROOT / "recipes" / "results").glob("*.jsonl")) == sorted(KEPT)


@pytest.mark.parametrize("name", KEPT)
def test_the_documented_tables_are_those_of_the_kept_runs(name: str, tables: dict[str, str]) -> None:
    (section,) = re.findall(
        rf"^`recipes/results/{name}.jsonl`$(.*?)(?=^## |\Z)", DOCS["evidence_tables.md"], re.MULTILINE | re.DOTALL
    )
    for paragraph in tables[name].strip().split("\n\n"):
        assert paragraph in section


def test_the_summaries_quote_the_kept_runs(tables: dict[str, str]) -> None:
    contrast = r"^\| (\w+) \| (\S+ \[.*?\]) (?:\| 0\.\d+ ){3}\| ([^|]+) \|$"
    found = [
        {arm: (gain, verdict) for arm, gain, verdict in re.findall(contrast, tables[name], re.MULTILINE)}
        for name in KEPT
    ]
    for arm, words in (
        ("matched_random", "random responses, with RSR's teachers"),
        ("random", "random responses"),
        ("longest", "the longest responses"),
        ("best_single_teacher", "the best single teacher"),
    ):
        assert f"| {words} | {' | '.join(each[arm][0] for each in found)} |" in README
        verdicts = [
            f"{gain} {verdict.replace('worse, but by less than the margin', 'worse, within the margin')}"
            for gain, verdict in (each[arm] for each in found)
        ]
        assert f"| `{arm}` | {' | '.join(verdicts)} |" in DOCS["evidence.md"]
