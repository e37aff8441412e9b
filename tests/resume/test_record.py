"""A run's record of which files were deleted, or that could not be written to its end: nothing takes their place."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from distill_sampler import BestOf, Curriculum, Rescore, ScoredDataset, SortBy
from distill_sampler.artifacts import record as records
from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.report.page import render
from distill_sampler.report.payload import payload
from tests import tiny
from tests.resume.test_state import RSR, bound


def trained(dataset: ScoredDataset, folder: Path | None, **changes: Any) -> Curriculum:
    curriculum = bound(dataset, folder, **changes)
    for epoch in range(4):
        curriculum.start_epoch(epoch, tiny.model(seed=epoch), step=3 * epoch)
    return curriculum


def delete(folder: Path, *names: str) -> None:
    for name in names:
        next((folder / "distill_sampler" / "record").glob(f"{name}-*")).unlink()


def test_no_plan_takes_the_place_of_one_that_was_deleted(dataset: ScoredDataset, tmp_path: Path) -> None:
    """The first epoch's last plan is deleted; the plan before it is not the epoch's."""
    policies = [SortBy(RSR), BestOf(RSR, per="prompt_id", k=2)]
    curriculum = bound(dataset, tmp_path, policies=policies, rescore=Rescore(every_steps=2, lag=1))
    curriculum.start_epoch(0, tiny.model())
    for step in (2, 4):
        curriculum.progress(2 * step)
        assert curriculum.replan(tiny.model(seed=step), step=step, into_epoch=step, start=2 * step + 2)
    curriculum.start_epoch(1, tiny.model(seed=6), step=6)
    delete(tmp_path, "plan-0000002", "left-0000002")
    curriculum.save_run(tmp_path)
    assert set(pq.read_table(tmp_path / "plans.parquet")["epoch"].to_pylist()) == {1}
    scores = Scores.open(tmp_path)
    assert list(scores.plans()) == [1]
    with pytest.raises(ValueError, match="lacks plan-0000002, which may be the last plan of epoch 0"):
        scores.last_plan(0)
    with pytest.raises(ValueError, match="lacks plan-0000002"):
        scores.choose(policies, epoch=0)
    history = curriculum.history().to_pydict()
    known = {(epoch, chosen is not None) for epoch, chosen in zip(history["epoch"], history["chosen"], strict=True)}
    assert known == {(0, False), (1, True)}


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_no_pass_takes_the_place_of_one_that_was_deleted(
    fraction: float, dataset: ScoredDataset, tmp_path: Path
) -> None:
    curriculum = trained(dataset, tmp_path, rescore=Rescore(fraction=fraction))
    before = [Scores.open(tmp_path).numbers(epoch=epoch)[RSR] for epoch in range(4)]
    passes = curriculum.cycle.record.passes
    since = [passes[2].was_measured, passes[2].was_measured | passes[3].was_measured]
    delete(tmp_path, "pass-0000001")
    curriculum.save_run(tmp_path / "tables")
    table = pq.read_table(tmp_path / "tables" / "scores.parquet")
    assert set(zip(table["pass"].to_pylist(), table["epoch"].to_pylist(), strict=True)) == {(0, 0), (2, 2), (3, 3)}
    from_record = Scores.open(tmp_path)
    for scores in (from_record, Scores.open(tmp_path / "tables")):
        assert np.isnan(scores.numbers(epoch=1)[RSR]).all()
        for epoch, measured in zip((2, 3), since, strict=True):
            numbers = scores.numbers(epoch=epoch)[RSR]
            assert np.array_equal(np.isfinite(numbers), measured & np.isfinite(before[epoch]))
            np.testing.assert_array_equal(numbers[measured], before[epoch][measured])
    assert "lacks pass-0000001" in render(payload(from_record))


def test_a_disk_that_was_full_for_a_while_costs_no_table_and_no_explanation(
    dataset: ScoredDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, filled = trained(dataset, tmp_path / "whole"), bound(dataset, tmp_path / "filled")

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for epoch in range(4):
        with monkeypatch.context() as patch:
            if epoch == 2:
                patch.setattr(records, "write_part", full)
            filled.start_epoch(epoch, tiny.model(seed=epoch), step=3 * epoch)
    assert filled.plans == whole.plans
    for epoch in range(4):
        assert filled.explain(4, epoch) == whole.explain(4, epoch)
    for folder, curriculum in ((tmp_path / "whole", whole), (tmp_path / "filled", filled)):
        curriculum.save_run(folder)
    for name in ("scores.parquet", "plans.parquet"):
        assert pq.read_table(tmp_path / "filled" / name).equals(pq.read_table(tmp_path / "whole" / name))


def test_a_run_that_goes_on_in_memory_says_what_it_does_not_have(dataset: ScoredDataset) -> None:
    state = trained(dataset, None).state_dict()
    resumed = bound(dataset)
    resumed.load_state_dict(state)
    resumed.start_epoch(4, tiny.model(seed=4), step=12)
    assert set(resumed.history()["pass"].to_pylist()) == {4}
    assert resumed.explain(4, 4)
    with pytest.raises(ValueError, match="record in memory lacks plan-0000000"):
        resumed.explain(4, 0)
    with pytest.raises(ValueError, match=r"not planned in this run. Choose one of \[4\]"):
        resumed.explain(4, 5)
