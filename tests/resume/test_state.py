"""The curriculum's state: small, whole or refused, loaded and never computed again; and what a killed pass leaves."""

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_sampler import BestOf, Curriculum, EpochPlan, RankSurprisalRatio, Rescore, ScoredDataset, Scorer, Shuffle
from distill_sampler.artifacts.parts import Parts
from distill_sampler.artifacts.state import read_arrays, write_arrays
from distill_sampler.distributed import Ranks
from distill_sampler.protocols import Metric
from distill_sampler.serialize import pack, unpack
from distill_sampler.store import ScoreStore
from distill_sampler.types import Sample
from tests import tiny

RSR = "rank_surprisal_ratio"


def bound(dataset: ScoredDataset, folder: Path | None = None, **changes: Any) -> Curriculum:
    settings: dict[str, Any] = {
        "metrics": [RankSurprisalRatio()],
        "policies": [BestOf(RSR, per="prompt_id"), Shuffle()],
        "scorer": Scorer(progress=False, batch_tokens=30),
        **changes,
    }
    curriculum = Curriculum(**settings)
    curriculum.bind(dataset)
    curriculum.keep(folder, run="one")
    return curriculum


# ---- Arrays ----


@pytest.mark.parametrize(
    "array",
    [
        np.arange(0),
        np.array([-1, 5, 300, 70_000]),
        np.array([2**40, -(2**40)]),
        np.array([0.5, np.nan, np.inf, -0.0], np.float32),
    ],
)
def test_a_packed_array_comes_back_bit_for_bit(array: Any) -> None:
    back = unpack(json.loads(json.dumps(pack(array))))
    assert back.dtype.kind == array.dtype.kind
    assert back.astype(array.dtype).tobytes() == array.tobytes()
    back[:] = 0  # and can be written to


def test_the_state_takes_at_most_64_bytes_a_sample(tokenizer: PreTrainedTokenizerBase) -> None:
    size = 20_000
    rng = np.random.default_rng(0)
    rows = [{"input_ids": [1, 2, n % 250], "labels": [-100, 2, n % 250]} for n in range(size)]
    curriculum = bound(ScoredDataset(rows), policies=[Shuffle()])
    curriculum.store.begin(epoch=0, step=123)
    for name in curriculum.store.latest:
        curriculum.store.write(np.arange(size), {name: rng.lognormal(size=size).astype(np.float32)})
    weights = rng.uniform(0.5, 1.5, size)
    curriculum.sampler.set_plan(EpochPlan(indices=rng.permutation(size), weights=weights / weights.mean()))
    text = json.dumps(curriculum.state_dict())
    assert len(text) / size < 64
    restored = bound(ScoredDataset(rows), policies=[Shuffle()])
    restored.load_state_dict(json.loads(text))
    assert restored.sampler.plan == curriculum.sampler.plan


# ---- Damage and change ----


def test_a_damaged_state_is_refused_wherever_it_is_damaged(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    curriculum = bound(dataset)
    curriculum.start_epoch(0, model)
    state = curriculum.state_dict()
    data = state["plan"]["indices"]["data"]
    flipped = data[:-9] + ("A" if data[-9] != "A" else "B") + data[-8:]
    for damage in (
        {"epoch": 1},
        {"plan": None},
        {"plan": {**state["plan"], "indices": {**state["plan"]["indices"], "data": flipped}}},
        {"scores": {**state["scores"], "passes": []}},
        {"digest": None},
    ):
        with pytest.raises(ValueError, match=r"state is damaged.*Resume from another checkpoint"):
            bound(dataset).load_state_dict({**state, **damage})


def test_arrays_that_are_kept_apart_come_back_and_only_whole(
    dataset: ScoredDataset, model: PreTrainedModel, tmp_path: Path
) -> None:
    curriculum = bound(dataset)
    curriculum.start_epoch(0, model)
    scores = curriculum.store.latest[RSR].copy()
    arrays: dict[str, Any] = {}
    text = json.dumps(curriculum.state_dict(arrays))
    assert '"data"' not in text
    write_arrays(arrays, tmp_path)
    curriculum.store.latest[RSR][:] = 0  # the copies do not change with the store
    restored = bound(dataset)
    restored.load_state_dict(json.loads(text), read_arrays(tmp_path))
    assert restored.sampler.plan == curriculum.sampler.plan
    assert np.array_equal(restored.store.latest[RSR], scores, equal_nan=True)
    for name, array in arrays.items():
        others = {other: values for other, values in arrays.items() if other != name}
        changed = array.copy()
        if len(array):
            changed.view(np.uint8)[-1] ^= 1
            with pytest.raises(ValueError, match=rf"'{name}' is damaged.*Resume from another checkpoint"):
                bound(dataset).load_state_dict(json.loads(text), {**others, name: changed})
        with pytest.raises(ValueError, match=rf"'{name}' is missing.*Resume from another checkpoint"):
            bound(dataset).load_state_dict(json.loads(text), others)


def test_observations_of_some_samples_come_back(dataset: ScoredDataset) -> None:
    curriculum, restored = bound(dataset), bound(dataset)
    observed = curriculum.store.observed
    columns = {name: np.array([0.5, np.nan], np.float32) for name in observed.columns}
    observed.write(np.array([3, 1]), columns, {RSR: np.array([0, 2])}, step=7)
    restored.store.observed.write(np.array([5]), {}, step=9)  # what it had before is gone
    restored.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    for name, values in observed.columns.items():
        assert np.array_equal(restored.store.observed.columns[name], values, equal_nan=True)
    assert np.array_equal(restored.store.observed.step, observed.step)
    assert np.array_equal(restored.store.observed.missing[RSR], observed.missing[RSR])


def test_the_history_of_passes_continues_after_a_resume(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    curriculum = bound(dataset)
    curriculum.start_epoch(0, model, step=0)
    curriculum.start_epoch(1, model, step=3)
    restored = bound(dataset)
    restored.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    restored.start_epoch(2, model, step=6)
    assert restored.store.passes == [(0, 0), (1, 3), (2, 6)]
    assert len(restored.cycle.record.passes) == 1


def test_a_resume_trims_the_record_to_its_checkpoint(
    dataset: ScoredDataset, model: PreTrainedModel, tmp_path: Path
) -> None:
    """What was recorded after the checkpoint will happen again; the tables are the uninterrupted run's."""
    whole = bound(dataset, tmp_path / "whole")
    killed = bound(dataset, tmp_path / "killed")
    for curriculum in (whole, killed):
        curriculum.start_epoch(0, model)
        state = json.loads(json.dumps(curriculum.state_dict()))
        curriculum.start_epoch(1, tiny.model(seed=1), step=3)
    whole.start_epoch(2, tiny.model(seed=2), step=6)
    resumed = bound(dataset, tmp_path / "killed")
    resumed.load_state_dict(state)
    assert (len(resumed.cycle.record.passes), len(resumed.plans)) == (1, 1)
    said = resumed.explain(4, 0)
    for epoch in (1, 2):
        resumed.start_epoch(epoch, tiny.model(seed=epoch), step=3 * epoch)
    assert resumed.history("teacher").equals(whole.history("teacher"))
    assert resumed.plans == whole.plans
    assert resumed.explain(4, 0) == whole.explain(4, 0) == said
    for folder, curriculum in ((tmp_path / "whole", whole), (tmp_path / "killed", resumed)):
        curriculum.save_run(folder)
    for name in ("scores.parquet", "plans.parquet"):
        assert pq.read_table(tmp_path / "killed" / name).equals(pq.read_table(tmp_path / "whole" / name))


@pytest.mark.parametrize("kind", ["pass", "plan"])
def test_a_file_that_was_deleted_from_the_record_is_named(
    kind: str, dataset: ScoredDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    curriculum = bound(dataset, tmp_path)
    for epoch in range(4):
        curriculum.start_epoch(epoch, tiny.model(seed=epoch), step=3 * epoch)
    said = [curriculum.explain(4, epoch) for epoch in range(4)]
    (path,) = (tmp_path / "distill_sampler" / "record").glob(f"{kind}-0000001-*")
    path.unlink()
    for epoch in range(4):
        if epoch == 1 or (epoch > 1 and kind == "pass"):  # what a later pass did not measure comes from this one
            with pytest.raises(ValueError, match=rf"lacks {kind}-0000001"):
                curriculum.explain(4, epoch)
        else:
            assert curriculum.explain(4, epoch) == said[epoch]
    curriculum.history()
    assert f"lacks {kind}-0000001" in caplog.text


def test_a_record_that_lacks_a_file_keeps_the_others_when_the_run_goes_on(
    dataset: ScoredDataset, tmp_path: Path
) -> None:
    curriculum = bound(dataset, tmp_path)
    for epoch in range(4):
        curriculum.start_epoch(epoch, tiny.model(seed=epoch), step=3 * epoch)
        if epoch == 2:
            state = json.loads(json.dumps(curriculum.state_dict()))
    said = [curriculum.explain(4, epoch) for epoch in range(4)]
    record = tmp_path / "distill_sampler" / "record"
    for kind in ("pass", "plan"):
        next(record.glob(f"{kind}-0000001-*")).unlink()
    resumed = bound(dataset, tmp_path)
    resumed.load_state_dict(state)
    assert [planned.epoch for planned in resumed.cycle.record.plans] == [0, 2]  # that of epoch 3 will be made again
    resumed.start_epoch(3, tiny.model(seed=3), step=9)
    assert [planned.epoch for planned in resumed.cycle.record.plans] == [0, 2, 3]
    assert [scoring_pass.epoch for scoring_pass in resumed.cycle.record.passes] == [0, 2, 3]
    for epoch in (0, 2, 3):  # the checkpoint has the numbers that those of epochs 2 and 3 depend on
        assert resumed.explain(4, epoch) == said[epoch]


def test_the_record_of_another_run_is_moved_aside(
    dataset: ScoredDataset, model: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = bound(dataset, tmp_path)
    first.start_epoch(0, model)
    second = bound(dataset)
    second.keep(tmp_path, run="two")
    assert "held the record of another run. It was moved to record-one" in caplog.text
    second.start_epoch(0, tiny.model(seed=3))
    assert len(second.plans) == 1
    assert first.plans != second.plans  # each still reads its own


CHANGES = [
    {"seed": 5},
    {"policies": [BestOf(RSR, per="prompt_id")]},
    {"metrics": [RankSurprisalRatio(rank_clip=7)]},
]


@pytest.mark.parametrize("change", CHANGES)
def test_an_accepted_change_takes_effect_from_the_next_epoch(
    change: dict[str, Any], dataset: ScoredDataset, model: PreTrainedModel
) -> None:
    curriculum = bound(dataset)
    begun = curriculum.start_epoch(0, model)
    state = curriculum.state_dict()
    with pytest.raises(ValueError, match=r"(seed|policies|metrics): was .*accept_changes=True"):
        bound(dataset, **change).load_state_dict(state)
    changed = bound(dataset, **change)
    changed.load_state_dict(state, accept_changes=True)
    assert changed.start_epoch(0, model) == begun
    assert changed.start_epoch(1, model, step=3) == bound(dataset, **change).start_epoch(1, model, step=3)


def test_another_data_set_is_accepted_only_between_epochs(
    dataset: ScoredDataset, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    curriculum = bound(dataset)
    curriculum.start_epoch(0, model)
    state = curriculum.state_dict()
    rows = tiny.tokenised(tiny.candidates().select(range(17, -1, -1)), tokenizer)
    other = ScoredDataset(rows, end_token_ids=[257])
    with pytest.raises(ValueError, match=r"dataset: was .*Resume with that data set"):
        bound(other).load_state_dict(state, accept_changes=True)
    with pytest.raises(ValueError, match=r"dataset: was .*accept_changes=True"):
        bound(other).load_state_dict(state, epoch_over=True)
    changed = bound(other)
    changed.load_state_dict(state, accept_changes=True, epoch_over=True)
    assert changed.start_epoch(1, model, step=3) == bound(other).start_epoch(1, model, step=3)


def test_a_store_of_other_metrics_is_refused() -> None:
    store = ScoreStore(3, ["a"], {"metrics": ["A()"]})
    with pytest.raises(ValueError, match=r"metrics: was \['B\(\)'\], is now \['A\(\)'\]"):
        store.load_state_dict({**store.state_dict(), "origin": {"metrics": ["B()"]}})


# ---- An interrupted pass ----


class Interruption(Exception):
    pass


def forwards(model: PreTrainedModel, limit: int | None = None) -> list[int]:
    """Counts the rows that the model reads from now on; after `limit` forwards it is interrupted."""
    original, rows = type(model.model).forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if limit is not None and len(rows) == limit:
            raise Interruption
        rows.append(len(kwargs["input_ids"]))
        return original(model.model, *args, **kwargs)

    model.model.forward = forward
    return rows


def interrupted(dataset: ScoredDataset, folder: Path, limit: int = 18, **changes: Any) -> None:
    model = tiny.model()
    forwards(model, limit)
    with pytest.raises(Interruption):
        bound(dataset, folder, **changes).start_epoch(0, model)


def test_an_interrupted_pass_scores_only_the_rest_with_the_same_result(
    dataset: ScoredDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    whole = bound(dataset)
    model = tiny.model()
    all_rows = forwards(model)
    plan = whole.start_epoch(0, model)
    interrupted(dataset, folder)
    rest, model = bound(dataset, folder), tiny.model()
    rows = forwards(model)
    assert rest.start_epoch(0, model) == plan
    assert "of 18 samples were scored before the interruption" in caplog.text
    assert 1 < len(rows) < len(all_rows) - 8
    for name, values in whole.store.latest.items():
        assert rest.store.latest[name].tobytes() == values.tobytes()
    # and once it is through, a kill before the next checkpoint costs nothing
    again, model = bound(dataset, folder), tiny.model()
    rows = forwards(model)
    assert again.start_epoch(0, model) == plan
    assert len(rows) <= 6  # what the model does to its logits and to shared prompts is found out anew


@pytest.mark.parametrize(
    "change",
    [
        {"scorer": Scorer(progress=False, batch_tokens=31)},
        {"metrics": [RankSurprisalRatio(rank_clip=7)]},
    ],
)
def test_parts_of_another_pass_are_not_used(
    change: dict[str, Any], dataset: ScoredDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(dataset, tmp_path)
    bound(dataset, tmp_path, **change).start_epoch(0, tiny.model())
    interrupted(dataset, tmp_path)
    bound(dataset, tmp_path).start_epoch(0, tiny.model(seed=1))
    interrupted(dataset, tmp_path)
    bound(dataset, tmp_path).start_epoch(1, tiny.model())
    interrupted(dataset, tmp_path)
    bound(dataset, tmp_path).start_epoch(0, tiny.model().bfloat16())
    assert "before the interruption" not in caplog.text


def test_a_pass_is_known_by_all_that_decides_its_last_bits(
    dataset: ScoredDataset, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring = bound(dataset).cycle.pass_runner
    reader = scoring.scorer.reader(model)
    scoring.store.numerics = {"dtype": "float32"}

    def identity() -> dict[str, Any]:
        return json.loads(json.dumps(scoring._identity_of_pass(reader, 0, 0, scoring.candidates)))  # type: ignore[no-any-return]

    first = identity()
    assert identity() == first
    scoring.store.numerics = {"dtype": "bfloat16"}
    assert identity() != first
    scoring.store.numerics = {"dtype": "float32"}
    monkeypatch.setattr(Ranks, "current", classmethod(lambda cls, device: Ranks(world_size=2)))
    assert identity() != first
    monkeypatch.undo()
    monkeypatch.setattr(type(reader), "device", torch.device("meta"))
    assert identity() != first
    monkeypatch.undo()
    model.model.norm.weight.data += 1e-3
    assert identity() != first
    model.model.norm.weight.data -= 1e-3


def test_a_pass_is_known_by_the_columns_that_its_metrics_read(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    @dataclass(frozen=True)
    class OfTeacher(Metric):
        name: str = "of_teacher"
        uses_columns: tuple[str, ...] = ("teacher",)

        def reduce(self, sample: Sample, stats: Any) -> dict[str, float]:
            return {self.name: float(len(sample.columns["teacher"]))}

    rows = [dict(row) for row in dataset.rows]
    identities = []
    for teacher in ("ada", "bob"):
        rows[0]["teacher"] = teacher
        curriculum = Curriculum(metrics=[OfTeacher()], policies=[Shuffle()])
        curriculum.bind(ScoredDataset(datasets.Dataset.from_list(rows), end_token_ids=[257]))
        scoring = curriculum.cycle.pass_runner
        identities.append(scoring._identity_of_pass(scoring.scorer.reader(model), 0, 0, scoring.candidates))
    assert identities[0] != identities[1]
    assert {name for name in identities[0] if identities[0][name] != identities[1][name]} == {"columns"}


def test_what_was_spent_comes_back_with_the_state(dataset: ScoredDataset, model: PreTrainedModel) -> None:
    curriculum = bound(dataset)
    curriculum.start_epoch(0, model)
    curriculum.cycle.pass_runner.clock.run, curriculum.cycle.pass_runner.clock.scoring = 100.0, 7.0
    restored = bound(dataset)
    restored.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    before, after = (each.cycle.pass_runner.clock.state_dict() for each in (curriculum, restored))
    assert after == before
    assert after["tokens_per_second"] > 0


def test_every_plan_is_compared_across_processes_before_it_is_trained(
    dataset: ScoredDataset, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: another process has another plan."""
    curriculum = bound(dataset, rescore=Rescore(every_steps=1, lag=1))
    compared: list[tuple[str, str]] = []
    monkeypatch.setattr(Ranks, "require_equal", lambda ranks, value, what: compared.append((what, value)))
    plan = curriculum.start_epoch(0, model)
    assert ("plan", plan.fingerprint) in compared
    assert ("data set", dataset.fingerprint) in compared
    compared.clear()
    again = curriculum.replan(tiny.model(seed=4), step=1, into_epoch=1, start=3)
    assert again is not None
    assert ("plan", curriculum.cycle.record.plans[-1].plan.fingerprint) in compared
    restored = bound(dataset, rescore=Rescore(every_steps=1, lag=1))
    restored.load_state_dict(curriculum.state_dict())
    compared.clear()
    restored.start_epoch(0, model)
    assert compared == [("plan", again.fingerprint)]

    def refuse(ranks: Ranks, value: str, what: str) -> None:
        if what == "plan":
            raise ValueError("The processes do not have the same plan")

    monkeypatch.setattr(Ranks, "require_equal", refuse)
    other = bound(dataset)
    with pytest.raises(ValueError, match="same plan"):
        other.start_epoch(0, model)
    assert other.sampler.plan is None


@pytest.mark.parametrize("damage", ["cut off", "flipped", "foreign", "empty", "gone"])
def test_damaged_parts_are_scored_again_and_give_the_same_scores(
    damage: str, dataset: ScoredDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = bound(dataset)
    plan = whole.start_epoch(0, tiny.model())
    interrupted(dataset, tmp_path)
    parts = Parts(tmp_path / "distill_sampler" / "scoring.parts").paths()
    assert len(parts) > 2
    content = parts[1].read_bytes()
    middle = len(content) // 3
    damaged = {
        "cut off": content[:-20],
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "foreign": b"\x00\x01 something else\n\xff",
        "empty": b"",
    }
    if damage == "gone":
        parts[1].unlink()
    else:
        parts[1].write_bytes(damaged[damage])
    rest, model = bound(dataset, tmp_path), tiny.model()
    assert rest.start_epoch(0, model) == plan
    for name, values in whole.store.latest.items():
        assert rest.store.latest[name].tobytes() == values.tobytes()
    assert "is damaged. This part and all that follow it are computed again" in caplog.text


def test_scoring_continues_with_a_warning_if_parts_cannot_be_written(
    dataset: ScoredDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = bound(dataset).start_epoch(0, tiny.model())
    (tmp_path / "file").touch()
    assert bound(dataset, tmp_path / "file" / "run").start_epoch(0, tiny.model()) == plan
    sync, calls = os.fsync, iter(range(5))

    def full(file: int) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    curriculum = bound(dataset, tmp_path / "run")
    assert curriculum.start_epoch(0, tiny.model()) == plan
    assert caplog.text.count("parts of the scoring pass cannot be kept") == 2
    assert "No space left on device" in caplog.text
    assert "record can no longer be written" in caplog.text
    assert "=" in curriculum.explain(4, 0)  # with its score, which is in memory
    monkeypatch.undo()
    assert bound(dataset, tmp_path / "run").start_epoch(0, tiny.model()) == plan
