"""The per-epoch cycle, without a host."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedModel

from distill_sampler import (
    BestOf,
    BestTeacher,
    Curriculum,
    EpochPlan,
    GlobalNaturalness,
    MatchTeachers,
    RankAverage,
    RankSurprisalRatio,
    ScoredDataset,
    Scorer,
    Shuffle,
    SortBy,
    Stage,
    Stages,
)
from distill_sampler.artifacts.schema import VERSION
from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.protocols import Metric, Policy, Pool
from distill_sampler.serialize import decode_facts, described
from tests import tiny

RSR = "rank_surprisal_ratio"


def bound(dataset: ScoredDataset, **changes: Any) -> Curriculum:
    settings: dict[str, Any] = {
        "metrics": [RankSurprisalRatio()],
        "policies": [BestOf(RSR, per="prompt_id"), Shuffle()],
        "scorer": Scorer(progress=False),
        **changes,
    }
    curriculum = Curriculum(**settings)
    curriculum.bind(dataset)
    return curriculum


@dataclass(frozen=True)
class Below(Policy):
    """Keeps what scores below a limit: a policy whose number of samples depends on the scores."""

    limit: float

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return (RSR,)

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        return plan.take(np.flatnonzero(pool.scores[RSR][plan.indices] < self.limit))


def test_the_length_is_known_before_anything_is_scored(dataset: ScoredDataset) -> None:
    curriculum = bound(dataset)
    assert len(curriculum.sampler) == curriculum.num_samples == 6


def test_an_epoch_that_has_a_plan_keeps_it(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    curriculum = bound(dataset)
    plan = curriculum.start_epoch(0, model)
    assert curriculum.start_epoch(0, tiny.model(seed=1)) is plan
    assert len(curriculum.cycle.record.passes) == 1
    assert curriculum.start_epoch(1, model).fingerprint != plan.fingerprint


def test_plans_depend_only_on_the_seed_and_the_epoch(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    first, again, other = (bound(dataset, seed=seed) for seed in (3, 3, 4))
    plans = [[curriculum.start_epoch(epoch, model) for epoch in (0, 1)] for curriculum in (first, again, other)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    assert plans[0][0] != plans[0][1]


def test_the_state_survives_a_round_trip_through_json(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    curriculum = bound(dataset)
    plan = curriculum.start_epoch(1, model, step=9)
    restored = bound(dataset)
    restored.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    assert restored.start_epoch(1, tiny.model(seed=1)) == plan  # loaded, not computed
    assert restored.cycle.record.passes == []
    assert restored.store.step.tolist() == [9] * 18
    for name, values in curriculum.store.latest.items():
        np.testing.assert_array_equal(restored.store.latest[name], values)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 1}, "seed: was 0, is now 1"),
        ({"metrics": [RankSurprisalRatio(rank_clip=50)]}, "metrics: was .*rank_clip"),
        ({"policies": [BestOf(RSR, per="prompt_id")]}, "policies: was .*Shuffle"),
        ({"policies": [Shuffle()]}, r"epochs of 6 samples.* 18.*Curriculum\(num_samples=6\)"),
    ],
)
def test_the_state_of_another_configuration_is_refused(
    change: dict[str, Any], sentence: str, dataset: ScoredDataset, model: PreTrainedModel
) -> None:
    curriculum = bound(dataset)
    curriculum.start_epoch(0, model)
    with pytest.raises(ValueError, match=sentence):
        bound(dataset, **change).load_state_dict(curriculum.state_dict())


def test_the_state_of_another_version_is_refused(dataset: ScoredDataset) -> None:
    curriculum = bound(dataset)
    with pytest.raises(ValueError, match="version 99"):
        curriculum.load_state_dict({**curriculum.state_dict(), "version": 99})


def test_a_plan_of_another_length_is_refused_with_the_cure(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    probe = bound(dataset, policies=[])
    probe.start_epoch(0, model)
    limit = float(np.median(probe.store.latest[RSR]))
    with pytest.raises(ValueError, match=r"9 samples.* 18 .*Curriculum\(num_samples=9\)"):
        bound(dataset, policies=[Below(limit)]).start_epoch(0, model)
    curriculum = bound(dataset, policies=[Below(limit)], num_samples=12)
    plan = curriculum.start_epoch(0, model)
    assert plan.indices.tolist() == [*plan.indices[:9], *plan.indices[:3]]
    assert "completed from its start" in curriculum.summaries[0].notes[0]


def test_rows_that_cannot_be_scored_are_never_planned() -> None:
    rows: list[dict[str, Any]] = [
        {"input_ids": [1, 2, 3, 4 + n], "labels": [-100, -100, 3, 4 + n] if n != 1 else [-100] * 4} for n in range(4)
    ]
    curriculum = bound(ScoredDataset(rows, unscorable="drop"), policies=[Shuffle()])
    assert sorted(curriculum.start_epoch(0, tiny.model()).indices.tolist()) == [0, 2, 3]


def test_an_unknown_metric_is_reported_with_the_scored_ones() -> None:
    with pytest.raises(
        ValueError, match=r"BestOf: There is no metric 'ratio'; those in metrics=: 'rank_surprisal_ratio'"
    ):
        Curriculum(metrics=[RankSurprisalRatio()], policies=[BestOf("ratio", per="prompt_id")])


def test_metrics_have_their_short_names_in_python_too() -> None:
    def policies(rsr: str, gn: str) -> list[Policy]:
        both = RankAverage(rsr, gn)
        return [
            BestOf(both, per="prompt_id"),
            Stages([Stage([SortBy(gn)]), Stage([SortBy(both), Shuffle()], from_epoch=2)]),
            MatchTeachers([BestOf(gn, per="prompt_id")]),
        ]

    metrics: list[Metric] = [RankSurprisalRatio(), GlobalNaturalness()]
    short, full = (
        Curriculum(metrics=metrics, policies=policies(*names)).policies
        for names in (("rsr", "GN"), (RSR, "global_naturalness"))
    )
    assert short == full
    assert described(short) == described(full)


def test_a_metric_that_is_called_like_a_short_name_is_meant_in_python_too() -> None:
    policy = BestOf("rsr", per="prompt_id")
    metrics: list[Metric] = [RankSurprisalRatio(), RankSurprisalRatio(rank_clip=50, name="rsr")]
    assert Curriculum(metrics=metrics, policies=[policy]).policies == (policy,)
    with pytest.raises(ValueError, match=r"BestOf: There is no metric 'ln'"):
        Curriculum(metrics=[RankSurprisalRatio()], policies=[BestOf("ln", per="prompt_id")])


def test_metrics_with_the_same_columns_are_refused_unless_renamed() -> None:
    with pytest.raises(ValueError, match=r"Two metrics .*rank_surprisal_ratio.*name="):
        Curriculum(metrics=[RankSurprisalRatio(), RankSurprisalRatio(rank_clip=50)], policies=[])
    variants = [RankSurprisalRatio(), RankSurprisalRatio(rank_clip=50, name="rsr_50"), GlobalNaturalness()]
    assert set(Curriculum(metrics=variants, policies=[]).metrics) == {RSR, "rsr_50", "global_naturalness"}


def test_saved_scores_carry_their_origin(dataset: ScoredDataset, model: PreTrainedModel, tmp_path: Path) -> None:
    curriculum = bound(dataset)
    curriculum.start_epoch(0, model)
    curriculum.start_epoch(1, model, step=3)
    columns = ["mean_rank", "mean_surprisal", RSR]
    curriculum.save_run(tmp_path, "teacher")
    table = pq.read_table(tmp_path / "scores.parquet")
    facts = ("num_tokens", "length", "tokens_cut", "content_hash", "prompt_hash")
    run = ("pass", "epoch", "step", "observed")
    assert table.column_names == ["sample", "source_row", "teacher", *facts, *run, *columns, f"{RSR}_missing"]
    assert table.num_rows == 36
    assert table["step"].to_pylist() == [0] * 18 + [3] * 18
    told = decode_facts(table.schema.metadata)
    assert told["dataset"] == dataset.fingerprint
    assert told["metrics"][0]["text"] == "RankSurprisalRatio()"
    assert told["numerics"] == curriculum.store.numerics
    assert told["schema"] == VERSION


def test_scores_already_computed_survive_an_interruption(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    curriculum = bound(dataset, scorer=Scorer(progress=False, batch_tokens=100))
    forward, calls = model.model.forward, iter(range(12))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    model.model.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        curriculum.start_epoch(0, model)
    done = np.isfinite(curriculum.store.latest[RSR])
    assert 0 < done.sum() < 18
    assert (curriculum.store.step == np.where(done, 0, -1)).all()


def test_a_sample_left_out_is_explained_by_the_policy_and_its_numbers(
    dataset: ScoredDataset, model: PreTrainedModel
) -> None:
    curriculum = bound(dataset)
    plan = curriculum.start_epoch(0, model)
    scores = curriculum.store.latest[RSR]
    chosen = next(index for index in range(3) if index in plan.indices)
    worst = max(range(3), key=lambda index: scores[index])
    position = plan.indices.tolist().index(chosen)
    said = curriculum.explain(chosen, 0)
    assert f"Sample {chosen} was in epoch 0, at position {position} of 6, with weight 1: kept by BestOf" in said
    said = curriculum.explain(worst, 0)
    assert f"Sample {worst} was not in epoch 0: left out by BestOf" in said
    assert f"its {RSR} {scores[worst]:.4g} is number 3 of 3 with prompt_id = sum-0" in said
    assert f"the best, sample {chosen}, has {scores[chosen]:.4g}" in said


def test_explanations_use_the_scores_of_their_epoch(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    curriculum = bound(dataset)
    curriculum.start_epoch(0, model)
    said = [curriculum.explain(index, 0) for index in range(18)]
    curriculum.start_epoch(1, tiny.model(seed=5))
    assert [curriculum.explain(index, 0) for index in range(18)] == said
    for index in range(18):
        assert (" was in epoch 1" in curriculum.explain(index, 1)) == (index in curriculum.plans[1].indices)


def test_explaining_an_unknown_sample_or_epoch_is_refused(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    curriculum = bound(dataset)
    curriculum.start_epoch(0, model)
    with pytest.raises(ValueError, match=r"no sample 18.* 18 rows"):
        curriculum.explain(18, 0)
    with pytest.raises(ValueError, match=r"Epoch 3 was not planned.*\[0\]"):
        curriculum.explain(0, 3)


def test_the_explanation_of_a_sample_without_a_score_says_why_it_has_none(dataset: ScoredDataset) -> None:
    curriculum = bound(dataset)
    plan = curriculum.start_epoch(0, tiny.model(max_position_embeddings=int(np.median(dataset.lengths))))
    (summary,) = curriculum.summaries
    long = next(index for index in summary.scoring.too_long if index not in plan.indices)
    assert f"it has no {RSR} (it has more tokens than the model has positions for)" in curriculum.explain(int(long), 0)


def test_best_teacher_scores_its_draw_and_nothing_else(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    curriculum = bound(dataset, policies=[BestTeacher(RSR, num_samples=2, per="prompt_id"), Shuffle()])
    first = curriculum.start_epoch(0, model)
    assert [summary.scoring.samples for summary in curriculum.summaries] == [6]
    scored = np.isfinite(curriculum.store.latest[RSR])
    assert scored.sum() == 6
    second = curriculum.start_epoch(1, model, step=6)
    assert sorted(first.indices) == sorted(second.indices)
    assert (np.isfinite(curriculum.store.latest[RSR]) == scored).all()
    assert curriculum.summaries[1].scoring.age_max == 0
    everything = bound(dataset, policies=[BestTeacher(RSR, num_samples=2), SortBy(RSR)])
    everything.start_epoch(0, model)
    assert everything.summaries[0].scoring.samples == 18


def test_a_length_that_depends_on_scores_is_refused_before_anything_is_scored(dataset: ScoredDataset) -> None:
    policies = [BestOf(RSR, per="prompt_id", max_score=4.0), Shuffle()]
    with pytest.raises(ValueError, match=r"BestOf\(.*max_score=4\.0.*Curriculum\(num_samples="):
        bound(dataset, policies=policies)
    bound(dataset, policies=policies, num_samples=6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_samples": 2.5}, r"Curriculum\(num_samples=2.5\): num_samples takes a whole number or None"),
        ({"num_samples": "10"}, r"num_samples='10'.*whole number"),
        ({"seed": None}, r"seed=None.*whole number"),
        ({"observe": "no"}, r"observe='no'.*True or False"),
        ({"teacher": 3}, r"teacher=3.*text"),
        ({"rescore": "never"}, r"rescore='never'.*Rescore\(\)"),
        ({"scorer": Scorer}, r"scorer=<class.*Scorer\(\)"),
        ({"metrics": [len]}, r"metrics= was given the function len.*subclass distill_sampler.Metric.*reduce"),
        ({"policies": [len]}, r"policies= was given the function len.*subclass distill_sampler.Policy.*__call__"),
        ({"policies": [SortBy(len)]}, r"name of a metric, such as.*RankAverage.*but was given len"),  # type: ignore[arg-type]
        ({"policies": [SortBy(RankAverage)]}, r"name of a metric.*but was given RankAverage"),  # type: ignore[arg-type]
        ({"policies": [SortBy(None)]}, r"name of a metric.*but was given None"),  # type: ignore[arg-type]
    ],
)
def test_an_argument_of_another_kind_is_named_with_what_it_takes(
    changes: dict[str, Any], sentence: str, dataset: ScoredDataset
) -> None:
    with pytest.raises(ValueError, match=sentence):
        bound(dataset, **changes)


def test_columns_that_are_called_like_ours_are_kept_under_another_name(
    dataset: ScoredDataset, model: PreTrainedModel, tmp_path: Path
) -> None:
    """Also where one of them says which rows answer the same prompt, and where a metric has its name."""
    names = ["sample", "step", "source_row", "mean_rank", f"{RSR}_missing", "weight", "estimated"]
    rows = [{**row, **dict.fromkeys(names, number // 3)} for number, row in enumerate(dataset.rows)]
    curriculum = bound(ScoredDataset(rows, end_token_ids=[257]), policies=[BestOf(RSR, per="sample")])
    curriculum.start_epoch(0, model)
    curriculum.save_run(tmp_path)
    expected = [number // 3 for number in range(len(rows))]
    files = {name: pq.read_table(tmp_path / f"{name}.parquet") for name in ("scores", "plans")}
    tables = {
        "scores": (files["scores"], [*names[:5]]),
        "plans": (files["plans"], ["sample", "weight"]),
        "history": (curriculum.history(*names), [*names[:5]]),
        "samples": (curriculum.samples(*names), ["sample", "step", "mean_rank", "estimated"]),
    }
    for where, (table, renamed) in tables.items():
        for name in renamed:
            kept = table[f"{name}_in_data"].to_pylist()
            assert kept == [expected[row] for row in table["sample"].to_pylist()], (where, name)
    scores = Scores.open(tmp_path)
    assert scores.group == "sample_in_data"
    assert scores.choose([BestOf(RSR, per="sample")]).plan == curriculum.plans[0]


@pytest.mark.parametrize("staged", [False, True])
def test_one_response_to_each_prompt_is_refused_with_the_policies_for_it(
    staged: bool, dataset: ScoredDataset, tmp_path: Path
) -> None:
    rows = dataset.rows.add_column("row_id", [f"r{row}" for row in range(len(dataset))])
    single = ScoredDataset(rows)
    best = BestOf(RSR, per="row_id")
    policy = Stages([Stage([Shuffle()]), Stage([best], from_epoch=1)]) if staged else best
    with pytest.raises(ValueError, match=r"^BestOf\(per='row_id'\).*KeepTop\(.*CompetencePacing\(.*SortBy\("):
        bound(single, policies=[policy])
    bound(single, policies=[BestOf(RSR, per="row_id", max_score=3.0)], num_samples=4)  # that is a filter
    table = pa.table({"sample": [0, 1], "prompt_id": ["a", "b"], "global_naturalness": [-1.0, -2.0]})
    pq.write_table(table, tmp_path / "scores.parquet")
    with pytest.raises(ValueError, match=r"^BestOf\(per='prompt_id'\)"):
        Scores.open(tmp_path / "scores.parquet").choose([BestOf("global_naturalness", per="prompt_id")])
