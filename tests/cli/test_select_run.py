"""`select` on the folder of a run: the plan of the run, for every policy, as a list without text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distill_sampler import (
    BestOf,
    Curriculum,
    GlobalNaturalness,
    MixDomains,
    RankSurprisalRatio,
    Rescore,
    ScoredDataset,
    Scorer,
    Shuffle,
)
from distill_sampler.artifacts.record import RECORD
from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.policies import __all__ as offered
from distill_sampler.protocols import Policy
from distill_sampler.serialize import as_typed
from tests import tiny
from tests.cli.conftest import call
from tests.contracts.test_one_why import LISTS

RSR = "rank_surprisal_ratio"
EVERY: list[list[Policy]] = [*LISTS.values(), [MixDomains({"even": 2, "odd": 1}, column="step")]]


def rows() -> ScoredDataset:
    """Data with the columns of `LISTS`, and a column with the name of one of the library's columns."""
    data = tiny.candidates()
    data = data.add_column("correct", [place % 4 != 1 for place in range(len(data))])
    data = data.add_column("domain", ["math" if place < 12 else "talk" for place in range(len(data))])
    data = data.add_column("weight", [1.0 + place % 3 for place in range(len(data))])
    data = data.add_column("step", ["even" if place // 3 % 2 else "odd" for place in range(len(data))])
    return ScoredDataset(tiny.tokenised(data, tiny.tokenizer()), end_token_ids=[257])


@pytest.fixture(scope="module")
def dataset() -> ScoredDataset:
    return rows()


def run(
    dataset: ScoredDataset, folder: Path, policies: list[Policy], *, epochs: int = 2, **settings: object
) -> Curriculum:
    """A run without training between its epochs: each epoch has another student."""
    curriculum = Curriculum(
        metrics=[RankSurprisalRatio(), GlobalNaturalness()],
        policies=policies,
        seed=7,
        scorer=Scorer(progress=False),
        **settings,  # type: ignore[arg-type]
    )
    curriculum.bind(dataset, applies_weights=True)
    curriculum.keep(folder, run="it")
    for epoch in range(epochs):
        curriculum.start_epoch(epoch, tiny.model(seed=epoch), step=10 * epoch, num_epochs=epochs)
    curriculum.save_run(folder)
    return curriculum


@pytest.mark.parametrize("policies", EVERY, ids=lambda policies: type(policies[-1]).__name__)
def test_the_plan_is_the_runs_for_every_policy(policies: list[Policy], dataset: ScoredDataset, tmp_path: Path) -> None:
    curriculum = run(dataset, tmp_path, policies)
    options = [part for policy in policies for part in ("--policy", as_typed(policy))]
    for epoch, plan in enumerate(curriculum.plans):
        output = tmp_path / f"{epoch}.parquet"
        ended = call("select", tmp_path, *options, "--seed", 7, "--epoch", epoch, "--output", output)
        assert ended.code == 0, ended.said
        table = pq.read_table(output)
        assert table["sample"].to_pylist() == plan.indices.tolist()
        np.testing.assert_array_equal(table["weight"].to_numpy(), plan.weights)
    # also where only the tables are left, which have no plan to look up
    (tmp_path / "tables").mkdir()
    shutil.copy(tmp_path / "scores.parquet", tmp_path / "tables")
    scores = Scores.open(tmp_path / "tables")
    for epoch, plan in enumerate(curriculum.plans):
        assert scores.choose(policies, seed=7, epoch=epoch).plan == plan


def test_every_policy_is_tried() -> None:
    tried = {type(policy).__name__ for policies in EVERY for policy in policies}
    expressions = {"AslecCasl", "Column", "LarkGain", "Lexicographic", "MetricExpression", "RankAverage"}
    over_the_run = {"Anneal", "During", "Stage", "Stages"}  # made of other policies
    needs_other_metrics = {"DropDegenerate"}
    offered_policies = {name for name in offered if name[0].isupper()}
    assert offered_policies - expressions - over_the_run - needs_other_metrics <= tried


@pytest.mark.parametrize("tables_only", [False, True])
def test_the_length_that_was_given_and_epochs_that_were_not_scored_for_count(
    tables_only: bool, dataset: ScoredDataset, tmp_path: Path
) -> None:
    policies: list[Policy] = [BestOf(RSR, per="prompt_id"), Shuffle()]
    curriculum = run(
        dataset, tmp_path, policies, epochs=3, num_samples=8, rescore=Rescore(every_epochs=2, fraction=0.5)
    )
    assert len(curriculum.cycle.record.passes) == 2
    plans = curriculum.plans
    if tables_only:
        shutil.rmtree(tmp_path / RECORD)
    scores = Scores.open(tmp_path)
    for epoch, plan in enumerate(plans):
        assert scores.choose(policies, seed=7, epoch=epoch).plan == plan
    assert scores.choose(policies, seed=7).plan == plans[-1]
    assert scores.choose(policies, seed=8).plan != plans[-1]


def test_an_epoch_whose_rest_was_planned_anew_has_its_last_plan(dataset: ScoredDataset, tmp_path: Path) -> None:
    policies: list[Policy] = [BestOf(RSR, per="prompt_id"), Shuffle()]
    curriculum = run(dataset, tmp_path, policies, epochs=1, rescore=Rescore(every_steps=2))
    begun = curriculum.plans[-1]
    assert curriculum.replan(tiny.model(seed=3), step=2, into_epoch=2, start=3) is not None
    assert curriculum.sampler.plan != begun
    assert Scores.open(tmp_path).choose(policies, seed=7, epoch=0).plan == curriculum.sampler.plan


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_list_says_which_rows_why_and_that_there_is_no_text(
    ending: str, dataset: ScoredDataset, tmp_path: Path
) -> None:
    run(dataset, tmp_path, [Shuffle()])
    output = tmp_path / f"o.{ending}"
    policy = ("--policy", f"BestOf({RSR}, per=prompt_id)", "--policy", f"WeightBySoftmax({RSR}, temperature=1)")
    ended = call("select", tmp_path, *policy, "--output", output)
    assert ended.code == 0, ended.said
    assert "holds no text" in ended.said
    listed = (
        pq.read_table(output).to_pylist()
        if ending == "parquet"
        else [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    )
    assert len(listed) == 6
    for row in listed:
        source = dataset.rows[row["sample"]]
        assert (row["prompt_id"], row["teacher"]) == (source["prompt_id"], source["teacher"])
        assert row["step_in_data"] == source["step"]
        assert f"with prompt_id = {row['prompt_id']}" in row["reason"]
        assert not {"prompt", "completion", "pass", "num_tokens", f"{RSR}_missing"} & set(row)
    assert np.mean([row["weight"] for row in listed]) == pytest.approx(1)


def test_data_cannot_be_matched_with_a_run(dataset: ScoredDataset, tmp_path: Path) -> None:
    run(dataset, tmp_path, [Shuffle()])
    ended = call("select", tmp_path, "--policy", "Shuffle", "--data", "d.jsonl", "--output", tmp_path / "o.jsonl")
    assert (ended.code, "--data" in ended.said, "Leave --data out" in ended.said) == (1, True, True)
    assert not (tmp_path / "o.jsonl").exists()


def test_without_a_seed_it_is_the_runs(dataset: ScoredDataset, tmp_path: Path) -> None:
    curriculum = run(dataset, tmp_path, [Shuffle()])
    ended = call("select", tmp_path, "--policy", "Shuffle", "--output", tmp_path / "o.parquet")
    assert ended.code == 0, ended.said
    assert pq.read_table(tmp_path / "o.parquet")["sample"].to_pylist() == curriculum.plans[-1].indices.tolist()
