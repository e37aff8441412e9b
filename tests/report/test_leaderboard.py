"""Ranking teachers: the paper's order comes out, intervals are honest, confounds are named."""

import csv
from pathlib import Path

import numpy as np
import pytest

from distill_sampler.correlation import spearman
from distill_sampler.metrics import LocalNaturalness, RankSurprisalRatio
from distill_sampler.report.leaderboard import Leaderboard, leaderboard
from distill_sampler.types import EncodedColumn

RSR = "rank_surprisal_ratio"


def board(
    rank: list[float] | np.ndarray,
    surprisal: list[float] | np.ndarray,
    teachers: list[int],
    groups: list[int],
    **more: object,
) -> Leaderboard:
    rank, surprisal = np.asarray(rank, np.float32), np.asarray(surprisal, np.float32)
    names = [f"t{code}" for code in range(max(teachers) + 1)]
    settings = {"num_tokens": np.full(len(rank), 10), **more}
    return leaderboard(
        metrics={RSR: RankSurprisalRatio()},
        metric=RSR,
        numbers={"mean_rank": rank, "mean_surprisal": surprisal, RSR: rank / surprisal},
        teachers=EncodedColumn(codes=np.asarray(teachers), values=names),
        groups=np.asarray(groups),
        **settings,
    )


def simulated(apart: float, num_prompts: int, seed: int = 0, **more: object) -> Leaderboard:
    """Two teachers on the same prompts; the second ranks worse by this much on average."""
    rng = np.random.default_rng(seed)
    hardness = rng.normal(0, 0.4, num_prompts)
    rank = np.concatenate([2 + hardness + rng.normal(0, 0.3, num_prompts) + shift for shift in (0, apart)])
    return board(
        rank, np.ones(2 * num_prompts), [0] * num_prompts + [1] * num_prompts, [*range(num_prompts)] * 2, **more
    )


def test_the_papers_ranking_of_teachers_is_reproduced(shared: Path) -> None:
    with (shared / "reference" / "rsr_paper_teachers.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    correlations = []
    for student in dict.fromkeys(row["student"] for row in table):
        rows = [row for row in table if row["student"] == student]
        ranked = board(
            [float(row["avg_rank_clipped"]) for row in rows],
            [float(row["avg_surprisal"]) for row in rows],
            list(range(len(rows))),
            [0] * len(rows),
            draws=0,
        )
        for line in ranked.lines:
            row = rows[int(line.teacher[1:])]
            assert line.scores[RSR].value == pytest.approx(float(row["rsr"]), rel=4e-3)  # from rounded columns
        accuracy = [float(rows[int(line.teacher[1:])]["post_training_accuracy"]) for line in ranked.lines]
        correlations.append(abs(spearman([line.scores[RSR].value for line in ranked.lines], accuracy)))
    assert len(correlations) == 5
    assert np.mean(correlations) == pytest.approx(0.847, abs=2e-3)


def test_a_group_score_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    ranked = board([1.0, 9.0], [1.0, 3.0], [0, 0], [0, 1], draws=0)
    assert ranked.lines[0].scores[RSR].value == pytest.approx(10 / 4)


def test_distant_teachers_are_told_apart_and_close_ones_are_tied() -> None:
    far, close = simulated(0.5, 300), simulated(0.005, 300)
    assert not far.lines[1].tied
    assert "more than chance explains" in " ".join(far.verdict)
    assert close.lines[1].tied
    assert "but cannot be told apart from t" in " ".join(close.verdict)


def test_the_estimated_number_of_prompts_is_enough_to_tell_teachers_apart() -> None:
    """Differences near 0.03 with spread 0.42 need about (1.96 · 0.42 / 0.03)² = 770 prompts."""
    few = simulated(0.03, 100, seed=7)
    assert few.lines[1].tied
    assert "more prompts would" in " ".join(few.verdict)
    needed = np.mean([not simulated(0.03, 1500, seed=seed, draws=200).lines[1].tied for seed in range(10)])
    assert needed >= 0.7


def test_intervals_have_about_their_nominal_coverage() -> None:
    held = []
    for seed in range(60):
        score = next(line for line in simulated(0.5, 80, seed=seed, draws=200).lines if line.teacher == "t0").scores[
            RSR
        ]
        held.append(score.low <= 2.0 <= score.high)
    assert 0.85 <= np.mean(held) <= 1.0


def test_common_difficulty_of_prompts_does_not_hide_a_difference_between_teachers() -> None:
    """Prompts vary far more than teachers differ; the same draw for both cancels it."""
    assert not simulated(0.15, 150).lines[1].tied


def test_the_verdict_explains_the_first_teacher_by_rank_or_surprisal() -> None:
    by_rank = board([2, 3] * 200, [1, 1] * 200, [0, 1] * 200, np.repeat(range(200), 2), draws=50)
    assert "the student ranks its tokens higher (mean rank 2.00" in by_rank.verdict[1]
    by_surprisal = board([2, 2] * 200, [1.2, 1] * 200, [0, 1] * 200, np.repeat(range(200), 2), draws=50)
    assert "its tokens surprise the student more (1.200 nats a token" in by_surprisal.verdict[1]


def test_few_prompts_different_prompts_and_length_confounds_cause_warnings() -> None:
    rng = np.random.default_rng(0)
    rank = rng.uniform(1, 5, 90)
    ranked = board(
        rank, np.ones(90), [0] * 60 + [1] * 30, [*range(60), *range(30)], num_tokens=(100 * rank).astype(int)
    )
    said = " ".join(ranked.warnings)
    assert "Few prompts" in said
    assert "different prompts (from 30 to 60 of 60)" in said
    assert "Length confound: the score is correlated with the response's length (Spearman +1.00" in said
    shared_only = board(rank, np.ones(90), [0] * 60 + [1] * 30, [*range(60), *range(30)], shared_only=True)
    assert [line.prompts for line in shared_only.lines] == [30, 30]


def test_samples_without_a_score_are_left_out_and_shares_add_up_to_one() -> None:
    ranked = board([2, 3, np.nan, 2], [1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1], draws=20)
    assert {line.teacher: line.samples for line in ranked.lines} == {"t0": 1, "t1": 2}
    assert sum(line.chosen.value for line in ranked.lines) == pytest.approx(1)
    assert "1 responses have no rank surprisal ratio" in " ".join(ranked.warnings)


def test_samples_that_lack_one_metric_can_be_ranked_by_another() -> None:
    nan = np.nan
    ratio, local = RankSurprisalRatio(), LocalNaturalness()
    ranked = leaderboard(
        metrics={RSR: ratio, "local_naturalness": local},
        metric="local_naturalness",
        numbers={
            **{name: np.array([2.0, nan, nan, nan], np.float32) for name in ratio.columns},
            **{name: np.array([-1.0, -3.0, -1.5, -1.5], np.float32) for name in local.columns},
        },
        teachers=EncodedColumn(codes=np.array([0, 0, 1, 1]), values=["short", "long"]),
        groups=np.array([0, 1, 0, 1]),
        num_tokens=np.full(4, 10),
        draws=50,
    )
    assert [(line.teacher, line.samples) for line in ranked.lines] == [("long", 2), ("short", 2)]
    assert [line.scores["local_naturalness"].value for line in ranked.lines] == [-1.5, -2]
    assert np.isnan(ranked.lines[0].scores[RSR].value)
    assert ranked.lines[1].scores[RSR].value == 1  # of the one that has it


def test_spearman_gives_ties_their_mean_rank() -> None:
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert np.isnan(spearman([1, 1], [1, 2]))


def test_a_single_teacher_is_reported_and_missing_scores_are_refused() -> None:
    assert "one teacher" in board([2, 3], [1, 1], [0, 0], [0, 1]).verdict[0]
    with pytest.raises(ValueError, match="No sample has a rank_surprisal_ratio"):
        board([np.nan], [1], [0], [0])
