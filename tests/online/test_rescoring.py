"""Budgets: which samples are scored again, and how the scores of the others change."""

import itertools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from distill_sampler import BestOf, Curriculum, RankSurprisalRatio, Rescore, ScoredDataset, Scorer, Shuffle
from distill_sampler.planning.rescore import Clock, candidates_to_score
from distill_sampler.store import ScoreStore, replay
from tests import tiny

RSR = "rank_surprisal_ratio"


def bound(dataset: ScoredDataset, rescore: Rescore | None = None, **changes: Any) -> Curriculum:
    settings: dict[str, Any] = {
        "metrics": [RankSurprisalRatio()],
        "policies": [BestOf(RSR, per="prompt_id"), Shuffle()],
        "scorer": Scorer(progress=False),
        "rescore": rescore,
        **changes,
    }
    curriculum = Curriculum(**settings)
    curriculum.bind(dataset)
    return curriculum


def scored_in(curriculum: Curriculum) -> list[int]:
    return [summary.scoring.samples for summary in curriculum.summaries]


@pytest.mark.parametrize(
    ("rescore", "expected"),
    [
        (Rescore(), [18, 18, 18, 18]),
        (Rescore(every_epochs=2), [18, 0, 18, 0]),
        (Rescore.never(), [18, 0, 0, 0]),
        (Rescore(fraction=0.1), [18, 2, 2, 2]),
        (Rescore(fraction=0.5, every_epochs=3), [18, 0, 0, 9]),
    ],
)
def test_a_budget_sets_how_many_samples_each_epoch_scores(
    rescore: Rescore, expected: list[int], dataset: ScoredDataset, model: PreTrainedModel
) -> None:
    curriculum = bound(dataset, rescore)
    for epoch in range(4):
        curriculum.start_epoch(epoch, model, step=3 * epoch)
    assert scored_in(curriculum) == expected


def test_stalest_scores_every_sample_before_any_sample_twice(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    curriculum = bound(dataset, Rescore(fraction=1 / 3))
    for epoch in range(4):
        curriculum.start_epoch(epoch, model, step=epoch)
    passes = [taken.was_measured for taken in curriculum.cycle.record.passes]
    assert passes[0].all()
    assert sum(passes[1:]).tolist() == [1] * 18  # type: ignore[union-attr]
    assert curriculum.store.times_scored.tolist() == [2] * 18


def test_uncertain_picks_samples_that_were_furthest_from_their_estimate() -> None:
    store = ScoreStore(6, ["score"], {})
    for step, moved in ((0, [0, 0, 0, 0, 0, 0]), (1, [0.1, 3, 0, -5, 0.2, 0])):
        store.begin(epoch=0, step=step)
        store.write(np.arange(6), {"score": np.array([1, 2, 3, 4, 5, 6], np.float32) + np.array(moved, np.float32)})
        store.end()
    chosen = candidates_to_score(
        Rescore(fraction=1 / 3, choose="uncertain"), store, np.arange(6), np.arange(6, dtype=np.uint64), seed=0
    )
    assert chosen.tolist() == [3, 1]


@given(seed=st.integers(0, 2**63 - 1), fraction=st.floats(0.01, 1), kind=st.sampled_from(["stalest", "random"]))
def test_the_choice_does_not_depend_on_the_order_of_the_rows(seed: int, fraction: float, kind: Any) -> None:
    rng = np.random.default_rng(seed)
    content = rng.integers(0, 2**63, 20).astype(np.uint64)
    steps = rng.integers(-1, 4, 20)
    order = rng.permutation(20)
    rescore = Rescore(fraction=fraction, choose=kind)
    found = []
    for rows in (np.arange(20), order):
        store = ScoreStore(20, ["score"], {})
        store.step = steps[rows]
        chosen = candidates_to_score(rescore, store, np.arange(20), content[rows], seed=seed)
        found.append(rows[chosen].tolist())
        assert (store.step >= 0).all() or (store.step[chosen[: (steps < 0).sum()]] < 0).all()
        assert len(chosen) == max(np.ceil(fraction * 20), (steps < 0).sum())
    assert found[0] == found[1]


def test_unmeasured_scores_move_with_the_measured_ones() -> None:
    rng = np.random.default_rng(0)
    store = ScoreStore(100, ["score"], {})
    old = rng.normal(3, 1, 100).astype(np.float32)
    truth = (old - 0.75).astype(np.float32)  # the student learns, everyone alike
    some = np.arange(0, 100, 7)
    store.begin(epoch=0, step=0)
    store.write(np.arange(100), {"score": old})
    passes = [store.end()]
    assert not store.estimated.any()
    store.begin(epoch=1, step=5)
    store.write(some, {"score": truth[some]})
    passes.append(store.end())
    np.testing.assert_allclose(store.latest["score"], truth, rtol=1e-5)
    assert np.flatnonzero(~store.estimated).tolist() == some.tolist()
    assert store.step[some].tolist() == [5] * len(some)
    assert (store.step[store.estimated] == 0).all()  # the age is that of the measurement
    known = replay(passes, {"score": np.full(100, np.nan, np.float32)})
    np.testing.assert_array_equal(known["score"], store.latest["score"])


def test_observed_scores_set_the_drift_only_if_nothing_else_was_measured() -> None:
    store = ScoreStore(6, ["score"], {})
    for step, asked in ((0, range(6)), (1, []), (2, [2, 3])):
        if step:
            store.observed.write(np.array([0, 1]), {"score": np.array([5, 6], np.float32) * step}, step=step)
        store.begin(epoch=step, step=step)
        if len(asked):
            store.write(np.array(asked), {"score": np.full(len(asked), step + 1, np.float32)})
        taken = store.end()
        if step == 1:  # 1 became 5 and 6
            assert store.latest["score"].tolist() == [5, 6, 5.5, 5.5, 5.5, 5.5]
    assert store.latest["score"].tolist() == [10, 12, 3, 3, 3, 3]  # with those that were asked, not with 5 to 10
    assert store.estimated.tolist() == [False] * 4 + [True] * 2
    assert [some.observed for some in taken.measured] == [True, False]


def test_estimates_keep_their_order() -> None:
    """Scores that are turned upside down where they are measured leave the order of the others as it is."""
    store = ScoreStore(30, ["score"], {})
    store.begin(epoch=0, step=0)
    store.write(np.arange(30), {"score": np.arange(30, dtype=np.float32)})
    store.end()
    store.begin(epoch=1, step=1)
    store.write(np.arange(10), {"score": -np.arange(10, dtype=np.float32)})
    store.end()
    assert (np.diff(store.latest["score"][10:]) > 0).all()


def test_without_a_new_pass_the_last_scores_stay(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    curriculum = bound(dataset, Rescore.never(), policies=[BestOf(RSR, per="prompt_id")])
    first = curriculum.start_epoch(0, model)
    assert curriculum.start_epoch(1, tiny.model(seed=1), step=7) == first
    summary = curriculum.summaries[1]
    assert (summary.scoring.age_median, summary.scoring.age_max, summary.scoring.seconds) == (7, 7, 0)
    assert summary.logs()["curriculum/score_age_max"] == 7


def test_affordable_tokens_keep_scoring_within_its_share() -> None:
    spent = Clock(run=100.0, scoring=2.0, tokens_per_second=1000.0)
    tokens = spent.affordable_tokens(0.05)
    seconds = tokens / 1000
    assert (spent.scoring + seconds) / (spent.run + seconds) == pytest.approx(0.05, rel=0.01)
    assert Clock(run=100.0, scoring=20.0, tokens_per_second=10.0).affordable_tokens(0.05) == 0


def test_max_share_limits_the_time_of_scoring(
    dataset: ScoredDataset, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count(0, 0.1)  # each look at the clock takes a tenth of a second, so each pass does
    monkeypatch.setattr("distill_sampler.planning.rescore.time", SimpleNamespace(perf_counter=lambda: next(now)))
    curriculum = bound(dataset, Rescore(max_share=0.2))
    curriculum.start_epoch(0, model)
    for epoch in range(1, 8):
        for _ in range(epoch % 3):
            next(now)  # training
        curriculum.start_epoch(epoch, model, step=epoch)
        assert curriculum.summaries[-1].scoring.share < 0.26
    assert 0 in scored_in(curriculum)  # there was no time for it
    assert 18 > max(scored_in(curriculum)[1:]) > 0


def test_a_restart_restores_everything_that_budgets_depend_on(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    """Ages, estimates, changes and counts come back, so the next budgets choose as if nothing had happened."""
    rescore = Rescore(fraction=0.3, choose="uncertain")
    whole, first = bound(dataset, rescore), bound(dataset, rescore)
    students = [tiny.model(seed=seed) for seed in range(5)]
    for epoch in range(3):
        for curriculum in (whole, first):
            curriculum.start_epoch(epoch, students[epoch], step=epoch)
            curriculum.progress(6)
    rest = bound(dataset, rescore)
    rest.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest.progress(6)
    for epoch in (3, 4):
        assert rest.start_epoch(epoch, students[epoch], step=epoch) == whole.start_epoch(
            epoch, students[epoch], step=epoch
        )
        rest.progress(6)
        whole.progress(6)
    assert rest.samples().drop(["sample"]) == whole.samples().drop(["sample"])
    assert whole.times_trained().sum() == 30


def test_scores_of_other_numerics_are_never_mixed(dataset: ScoredDataset, caplog: pytest.LogCaptureFixture) -> None:
    curriculum = bound(dataset, Rescore.never())
    curriculum.start_epoch(0, tiny.model())
    curriculum.start_epoch(1, tiny.model())
    curriculum.start_epoch(2, tiny.model().bfloat16())
    assert scored_in(curriculum) == [18, 0, 18]
    assert "dtype: was 'float32', is now 'bfloat16'" in caplog.text
    assert curriculum.store.numerics["dtype"] == "bfloat16"


def test_the_history_is_a_learning_curve_of_each_sample(dataset: ScoredDataset) -> None:
    curriculum = bound(dataset, Rescore(fraction=0.5))
    for epoch in range(3):
        curriculum.start_epoch(epoch, tiny.model(seed=epoch), step=10 * epoch)
    table = curriculum.history("teacher", "prompt_id")
    assert table.column_names[:7] == ["sample", "teacher", "prompt_id", "pass", "epoch", "step", "observed"]
    assert table.num_rows == 18 + 9 + 9
    curve = table.filter((np.asarray(table["sample"]) == 4).tolist())
    assert curve["step"].to_pylist() in ([0, 10], [0, 20])
    samples = curriculum.samples("teacher")
    assert samples["times_scored"].to_pylist() == [2] * 18
    assert sum(samples["times_trained"].to_pylist()) == 12  # two epochs are over
    assert set(samples["estimated"].to_pylist()) == {True, False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0}, r"Rescore\(fraction=0\): give a share"),
        ({"max_share": 1.5}, r"Rescore\(max_share=1.5\)"),
        ({"every_steps": 0}, r"Rescore\(every_steps=0\)"),
        ({"lag": -1}, r"Rescore\(lag=-1\)"),
        ({"choose": "oldest"}, "choose one of 'stalest'"),
    ],
)
def test_a_bad_budget_is_refused_by_its_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rescore(**arguments)
