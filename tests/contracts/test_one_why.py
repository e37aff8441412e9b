"""Trainer, report, `select` and files give one reason for one choice, and one plan for one set of scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from distill_sampler import (
    BestOf,
    BestSingleTeacher,
    BestTeacher,
    Column,
    CompetencePacing,
    Curriculum,
    GlobalNaturalness,
    GroupByLength,
    Interleave,
    KeepByMargin,
    KeepCorrect,
    KeepTop,
    MatchTeachers,
    MixDomains,
    MixTeachers,
    Policy,
    RankAverage,
    RankSurprisalRatio,
    Rescore,
    SampleBySoftmax,
    ScoredDataset,
    Scorer,
    Shuffle,
    SortBy,
    WeightByColumn,
    WeightBySoftmax,
    WithinLength,
)
from distill_sampler.artifacts.schema import FACT_COLUMNS, VERSION
from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.report.payload import payload
from distill_sampler.serialize import decode_facts
from tests import tiny
from tests.cli.conftest import call, rows, student_path, write_lines  # noqa: F401

RSR, GLOBAL = "rank_surprisal_ratio", "global_naturalness"
LISTS: dict[str, list[Policy]] = {
    "BestOf": [BestOf(RSR, per="prompt_id")],
    "BestOf behind WithinLength": [WithinLength(max_tokens=76), BestOf(RSR, per="prompt_id"), Shuffle()],
    "BestOf by a mean of ranks": [BestOf(RankAverage(RSR, GLOBAL), per="prompt_id", k=2)],
    "BestSingleTeacher": [BestSingleTeacher(Column("weight"))],
    "BestTeacher": [BestTeacher(RSR, num_samples=3)],
    "CompetencePacing": [CompetencePacing(GLOBAL, initial=0.4, epochs=3)],
    "GroupByLength": [KeepTop(RSR, fraction=0.5), GroupByLength(mega_batch=4)],
    "Interleave": [KeepTop(GLOBAL, num=9), Interleave("teacher")],
    "KeepByMargin": [KeepByMargin(RSR, per="prompt_id", k=2)],
    "KeepCorrect": [KeepCorrect("correct", metric=RSR, per="prompt_id")],
    "KeepTop": [KeepTop(RSR, fraction=0.4), Shuffle()],
    "MatchTeachers": [MatchTeachers(BestOf(RSR, per="prompt_id"), per="prompt_id"), Shuffle()],
    "MixDomains": [MixDomains({"math": 2, "talk": 1}, num=9)],
    "MixTeachers": [MixTeachers(max_share=0.4)],
    "SampleBySoftmax": [SampleBySoftmax(RSR, temperature=0.5, num_samples=8), Shuffle()],
    "SampleBySoftmax of each prompt": [
        SampleBySoftmax(RSR, temperature=0.5, num_samples=1, replacement=False, per="prompt_id")
    ],
    "Shuffle": [Shuffle(bucket=5)],
    "SortBy": [SortBy(GLOBAL, jitter=0.3)],
    "WeightByColumn": [WeightByColumn(), SortBy(Column("weight"))],
    "WeightBySoftmax": [WeightBySoftmax(RSR, temperature=0.5), BestOf(GLOBAL, per="prompt_id", k=2)],
}


@pytest.fixture(scope="module")
def candidates() -> ScoredDataset:
    prepared = tiny.tokenised(tiny.candidates(6), tiny.tokenizer())
    prepared = prepared.add_column("correct", [n % 4 != 1 for n in range(18)])  # type: ignore[call-arg]
    prepared = prepared.add_column("domain", ["math" if n < 12 else "talk" for n in range(18)])  # type: ignore[call-arg]
    prepared = prepared.add_column("weight", [1.0 + n % 3 for n in range(18)])  # type: ignore[call-arg]
    return ScoredDataset(prepared, end_token_ids=[257])


def planned(dataset: ScoredDataset, policies: list[Policy], folder: Path | None = None, **changes: Any) -> Curriculum:
    """Three epochs; half of the candidates are scored again before the later ones, the others are estimates."""
    curriculum = Curriculum(
        metrics=[RankSurprisalRatio(), GlobalNaturalness()],
        policies=policies,
        scorer=Scorer(progress=False),
        **{"rescore": Rescore(fraction=0.5), "num_samples": 9, "seed": 3, **changes},
    )
    curriculum.bind(dataset, applies_weights=True)
    curriculum.keep(folder, run="run")
    for epoch in range(3):
        curriculum.start_epoch(epoch, tiny.model(seed=epoch), step=2 * epoch)
    return curriculum


@pytest.mark.parametrize("exported", [False, True], ids=["record", "tables"])
@pytest.mark.parametrize("name", LISTS)
def test_the_report_of_a_run_says_what_the_trainer_explains(
    name: str, exported: bool, candidates: ScoredDataset, tmp_path: Path
) -> None:
    curriculum = planned(candidates, LISTS[name], tmp_path)
    curriculum.save_run(tmp_path)
    last = curriculum.plans[-1]
    if exported:
        (tmp_path / "distill_sampler").rename(tmp_path / "elsewhere")
    points = payload(Scores.open(tmp_path))["points"]
    assert (
        len(points["sample"]) == 18 or name == "BestTeacher"
    )  # who scores a draw only; a picture shows what is scored
    for sample, chosen, reason in zip(points["sample"], points["chosen"], points["reason"], strict=True):
        assert bool(chosen) == (sample in last.indices)
        where, _, why = reason.partition(", ")
        assert where == f"{'in' if chosen else 'not in'} the plan of epoch 2"
        if not exported:  # the tables alone do not hold the reasons
            assert curriculum.explain(sample, 2).endswith(f": {why}.")


@pytest.mark.parametrize("name", LISTS)
def test_choosing_from_a_runs_folder_gives_the_runs_plans(name: str, candidates: ScoredDataset, tmp_path: Path) -> None:
    curriculum = planned(candidates, LISTS[name], tmp_path)
    curriculum.save_run(tmp_path)
    exported = tmp_path / "copy"
    exported.mkdir()
    (exported / "scores.parquet").write_bytes((tmp_path / "scores.parquet").read_bytes())
    for source in (tmp_path, exported):
        scores = Scores.open(source)
        for epoch, plan in enumerate(curriculum.plans):
            choice = scores.choose(LISTS[name], seed=3, epoch=epoch)
            assert choice.plan.indices[:9].tolist() == plan.indices[: len(choice.plan)].tolist()
            np.testing.assert_array_equal(
                choice.left_out_by, curriculum.cycle.record.plans[epoch].left_out_by, err_msg=f"{source} {epoch}"
            )
            told = curriculum.cycle.explained(curriculum.cycle.record.plans[epoch])
            for sample in range(18):
                if choice.in_plan[sample] == told.in_plan[sample]:  # the run's epochs are cut to a length
                    assert choice.reason(sample) == told.reason(sample)


@pytest.mark.parametrize("name", LISTS)
def test_select_gives_the_reasons_of_the_report(name: str, student_path: Path, tmp_path: Path) -> None:  # noqa: F811
    from distill_sampler.serialize import as_typed

    data = [{**row, "domain": "math" if n < 12 else "talk", "weight": 1 + n % 3} for n, row in enumerate(rows())]
    write_lines(tmp_path / "data.jsonl", data)
    scores = tmp_path / "scores.parquet"
    ended = call("score", tmp_path / "data.jsonl", "--model", student_path, "--output", scores)
    assert ended.code == 0, ended.said
    typed = [option for policy in LISTS[name] for option in ("--policy", as_typed(policy))]
    ended = call("select", scores, *typed, "--output", tmp_path / "chosen.jsonl", "--seed", 3)
    assert ended.code == 0, ended.said
    chosen = [json.loads(line) for line in (tmp_path / "chosen.jsonl").read_text().splitlines()]
    points = payload(Scores.open(scores), policies=LISTS[name], seed=3)["points"]
    reasons = {
        (group, teacher): reason
        for group, teacher, reason in zip(
            points["group"], [row["teacher"] for row in data], points["reason"], strict=True
        )
    }
    assert {reasons[row["prompt_id"], row["teacher"]] for row in chosen} == {row["reason"] for row in chosen}


def test_both_writers_keep_one_schema(student_path: Path, candidates: ScoredDataset, tmp_path: Path) -> None:  # noqa: F811
    data = write_lines(tmp_path / "data.jsonl", rows())
    ended = call("score", data, "--model", student_path, "--output", tmp_path / "scores.parquet")
    assert ended.code == 0, ended.said
    planned(candidates, LISTS["BestOf"], tmp_path / "run").save_run(tmp_path / "run")
    by_command, by_run = (pq.read_schema(folder / "scores.parquet") for folder in (tmp_path, tmp_path / "run"))
    shared = ("sample", "prompt_id", "teacher", "correct", *FACT_COLUMNS, "mean_rank", RSR, GLOBAL, f"{RSR}_missing")
    for name in set(shared) - {"scoring_hash"}:  # only files of scored rows can be given to a curriculum
        assert name in by_command.names
        assert name in by_run.names
    for name in ("content_hash", "prompt_hash", "mean_rank", RSR, GLOBAL, f"{RSR}_missing"):
        assert by_command.field(name).type == by_run.field(name).type, name
    first, second = decode_facts(by_command.metadata), decode_facts(by_run.metadata)
    for told in (first, second):
        assert told["schema"] == VERSION
        assert told["columns"] == {"group": "prompt_id", "teacher": "teacher"}
    assert first["metrics"] == second["metrics"]


def test_explaining_turns_the_score_the_way_the_metric_says(candidates: ScoredDataset) -> None:
    """Higher is better by one metric, lower by the other: number 1 is the best by each."""
    for metric in (GLOBAL, RSR):
        curriculum = planned(candidates, [BestOf(metric, per="prompt_id")], num_samples=None)
        for sample in curriculum.plans[0].indices.tolist():
            assert f"its {metric} " in curriculum.explain(sample, 0)
            assert "is number 1 of 3" in curriculum.explain(sample, 0)


def test_a_file_without_lengths_goes_by_the_responses(candidates: ScoredDataset, tmp_path: Path) -> None:
    """`WithinLength` must not find every sample to be of length 0."""
    curriculum = planned(candidates, LISTS["BestOf"], tmp_path)
    curriculum.save_run(tmp_path)
    table = pq.read_table(tmp_path / "scores.parquet").drop(["length"])
    pq.write_table(table, tmp_path / "short.parquet")
    scores = Scores.open(tmp_path / "short.parquet")
    tokens = scores.integers("num_tokens")
    assert tokens is not None
    limit = int(np.median(tokens))
    choice = scores.choose([WithinLength(min_tokens=limit)], epoch=0)
    assert choice.plan.indices.tolist() == np.flatnonzero(tokens >= limit).tolist()
