"""When the leaderboard warns: each threshold from both sides."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.report.leaderboard import _ties, rank_domains
from distill_sampler.report.verdict import Estimate, TeacherLine, _prompts_needed, warnings_of

SOME = Estimate(value=1.0, low=0.9, high=1.1)


def line(teacher: str = "ada", prompts: int = 200, tokens: float = 50.0) -> TeacherLine:
    return TeacherLine(
        teacher=teacher,
        samples=prompts,
        prompts=prompts,
        tokens=tokens,
        scores={"score": SOME},
        parts={},
        chosen=SOME,
        correct=None,
        tied=False,
    )


def warned(lines: list[TeacherLine], scores: Any = (1.0, 2.0, 1.5, 1.2), tokens: Any = (3, 4, 3, 5)) -> str:
    return " ".join(warnings_of(lines, "score", np.asarray(scores), np.asarray(tokens), 200, 0, 0))


@pytest.mark.parametrize(("prompts", "expected"), [(99, True), (100, False)])
def test_few_prompts_are_fewer_than_a_hundred(prompts: int, expected: bool) -> None:
    assert ("Few prompts" in warned([line(prompts=prompts), line("bob", prompts=prompts)])) == expected


@pytest.mark.parametrize(("prompts", "expected"), [(179, True), (180, False)])
def test_teachers_answered_different_prompts_from_a_tenth_on(prompts: int, expected: bool) -> None:
    said = warned([line(prompts=200), line("bob", prompts=prompts)])
    assert ("answered different prompts" in said) == expected
    assert ("--shared-prompts" in said) == expected


def test_a_score_that_goes_with_length_is_a_confound_from_a_half_on() -> None:
    # ranks of the lengths 1..10 with pairs swapped: a rank correlation just above and just below one half
    tokens = np.arange(1, 11)
    above, below = np.array([1, 4, 9, 2, 6, 3, 10, 5, 7, 8]), np.array([6, 1, 9, 2, 3, 8, 4, 10, 5, 7])
    rho = [1 - 6 * float(((order - tokens) ** 2).sum()) / 990 for order in (above, below)]
    assert 0.52 > rho[0] > 0.5 > rho[1] > 0.3
    assert "Length confound" in warned([line(), line("bob")], above, tokens)
    assert "Length confound" not in warned([line(), line("bob")], below, tokens)
    assert "Length confound" in warned([line(), line("bob")], -above, tokens)  # in either direction


def test_an_order_of_teachers_that_is_the_order_of_lengths_is_a_confound() -> None:
    nearly = [line(name, tokens=length) for name, length in zip("abcdefg", (10, 20, 30, 40, 50, 70, 60), strict=True)]
    less = [line(name, tokens=length) for name, length in zip("abcdefg", (10, 30, 20, 50, 40, 70, 60), strict=True)]
    assert "shortest responses gives nearly the same order" in warned(nearly)  # 0.96
    assert "nearly the same order" not in warned(less)  # 0.89
    assert "longest responses gives nearly the same order" in warned(nearly[::-1])
    assert "nearly the same order" in warned(nearly[:4])
    assert "nearly the same order" not in warned(nearly[:3])  # three teachers are in order by luck


def test_the_number_of_prompts_that_tell_two_teachers_apart_is_that_of_a_95_percent_interval() -> None:
    differences = 1 + 10 * np.array([-1.0, 1.0] * 50)  # a standard error of 10 over these 100 prompts
    assert pytest.approx(38316) == 100 * 19.6**2 - 100
    assert "About 39,000 more prompts" in _prompts_needed(1.0, differences, 100)


@pytest.mark.parametrize(("prompts", "domains", "shown"), [(10, 2, 2), (9, 2, 0), (10, 9, 8)])
def test_domains_of_ten_prompts_have_a_leaderboard_and_eight_at_most(
    prompts: int, domains: int, shown: int, tmp_path: Path
) -> None:
    rows = [
        {
            "prompt_id": f"{domain} {prompt}",
            "domain": f"d{domain}",
            "teacher": teacher,
            "global_naturalness": -1.0 - prompt,
        }
        for domain in range(domains)
        for prompt in range(prompts)
        for teacher in ("ada", "bob")
    ]
    table = pa.Table.from_pylist([{"sample": number, "num_tokens": 5, **row} for number, row in enumerate(rows)])
    pq.write_table(table, tmp_path / "scores.parquet")
    assert len(rank_domains(Scores.open(tmp_path / "scores.parquet"))) == shown


def test_a_teacher_is_tied_if_the_interval_of_its_distance_to_the_first_holds_zero() -> None:
    draws = np.linspace(0, 1, 1001)
    first = np.zeros(1001)
    for share_below, tied in ((0.03, True), (0.02, False)):
        behind = draws - share_below
        badness = np.stack([first, behind], axis=1)
        assert (1 in _ties(badness, np.array([0, 1]))) == tied
