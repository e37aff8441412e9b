"""The folder of a run: what training leaves is what the report shows, passes over a part of the samples included."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from distill_sampler import BestOf, Curriculum, RankSurprisalRatio, Rescore, Scorer, Shuffle, attach
from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.report.payload import payload
from tests import tiny
from tests.cli.conftest import call

RSR = "rank_surprisal_ratio"


def train(folder: Path, *, resume: bool = False, stop: int | None = None, **settings: Any) -> Curriculum:
    """Three epochs of a tiny run that saves at the end of each; `stop` ends it after so many steps."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == stop

    tok = tiny.tokenizer()
    trainer = Trainer(
        model=tiny.model(),
        train_dataset=tiny.tokenised(tiny.candidates(), tok),
        data_collator=DataCollatorForSeq2Seq(tok),
        processing_class=tok,
        callbacks=[Stop()] if stop else [],
        args=TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            save_strategy="epoch",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
    )
    curriculum = Curriculum(
        metrics=[RankSurprisalRatio()],
        policies=[BestOf(RSR, per="prompt_id"), Shuffle()],
        scorer=Scorer(progress=False),
        **settings,
    )
    attach(trainer, curriculum)
    trainer.train(resume_from_checkpoint=resume)
    curriculum.save_run(folder)
    return curriculum


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Curriculum]:
    folder = tmp_path_factory.mktemp("run")
    return folder, train(folder)


def test_the_report_shows_each_epochs_plan_and_how_the_scores_moved(run: tuple[Path, Curriculum]) -> None:
    folder, curriculum = run
    data = payload(Scores.open(folder))
    assert data["teachers"] == [line["teacher"] for line in data["board"]["lines"]]
    assert data["passes"]["epochs"] == [0, 1, 2]
    names = curriculum.dataset.rows["teacher"]  # type: ignore[call-overload]
    for bar, plan in zip(data["composition"][1:], curriculum.plans, strict=True):
        assert bar["counts"] == [sum(names[i] == name for i in plan.indices) for name in data["teachers"]]
    (last,) = (summary for summary in curriculum.summaries if summary.epoch == 2)
    assert sum(data["points"]["chosen"]) == last.num_samples
    for chosen, reason in zip(data["points"]["chosen"], data["points"]["reason"], strict=True):
        where, why = ("in", "kept") if chosen else ("not in", "left out")
        assert reason.startswith(f"{where} the plan of epoch 2, {why} by BestOf: ")
    columns = [taken.columns[RSR] for taken in curriculum.cycle.record.passes]
    np.testing.assert_allclose(data["passes"]["spread"], np.std(columns, axis=0), rtol=1e-3, atol=1e-4)
    for command in (("teachers", folder), ("report", folder, "--output", folder / "r.html")):
        ended = call(*command)
        assert ended.code == 0, ended.said


def test_a_resumed_run_leaves_the_same_folder_as_an_uninterrupted_one(
    run: tuple[Path, Curriculum], tmp_path: Path
) -> None:
    train(tmp_path, stop=3)
    train(tmp_path, resume=True)
    for name in ("scores.parquet", "plans.parquet"):
        assert pq.read_table(tmp_path / name).equals(pq.read_table(run[0] / name)), name


def test_what_a_pass_did_not_measure_moves_with_the_drift_of_what_it_did(tmp_path: Path) -> None:
    curriculum = train(tmp_path, rescore=Rescore(fraction=0.5))
    scores = Scores.open(tmp_path)
    partly = [int(taken.was_measured.sum()) for taken in curriculum.cycle.record.passes]
    assert partly[0] == 18 > partly[1]
    np.testing.assert_array_equal(scores.numbers()[RSR], curriculum.store.latest[RSR])  # estimates included
    assert payload(scores)["passes"]["epochs"] == [taken.epoch for taken in curriculum.cycle.record.passes]


def test_a_trainers_folder_without_scores_says_how_to_get_them(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    ended = call("report", tmp_path)
    assert (ended.code, "curriculum.save_run(FOLDER)" in ended.said) == (1, True)
