"""Somebody else's metrics, policy and reader, in every place that ours are used in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from bigram_tutor.metrics import RewardPerNat, TutorRatio
from bigram_tutor.policies import KeepMiddle
from bigram_tutor.readers import Bigrams
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from distill_sampler import Curriculum, Metric, Sample, Scorer, Shuffle, TokenStats, attach
from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.report.leaderboard import rank_teachers
from distill_sampler.specs import parse_policies
from distill_sampler.testing import check_metric, check_policy, check_reader
from tests import tiny
from tests.cli.conftest import call, rows, student_path, write_lines
from tests.outside.conftest import Install, candidates

__all__ = ["student_path"]  # a fixture
NAMES = ("reward_per_nat", "tutor_ratio")


def test_they_keep_their_contracts(tutors: tuple[Path, Path]) -> None:
    tutor, other = (Bigrams(str(path)) for path in tutors)
    check_reader(tutor, unlike=other, vocabulary=tiny.VOCAB)
    check_metric(TutorRatio(tutor=tutor))
    check_metric(RewardPerNat(), columns={"reward": [0.0, 1.0, None]})
    check_policy(KeepMiddle("reward_per_nat"), metrics=[RewardPerNat()])


def train(folder: Path, metrics: Sequence[Metric], *, epochs: int = 2, resume: bool = False) -> Curriculum:
    tokenizer = tiny.tokenizer()
    trainer = Trainer(
        model=tiny.model(),
        train_dataset=tiny.tokenised(candidates(), tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        args=TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            save_strategy="epoch",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
    )
    curriculum = Curriculum(
        metrics=metrics,
        policies=[KeepMiddle(metrics[-1].name, share=0.5), Shuffle()],
        num_samples=6,
        scorer=Scorer(progress=False),
    )
    attach(trainer, curriculum)
    trainer.train(resume_from_checkpoint=resume)
    return curriculum


@pytest.fixture
def run_folder(tmp_path: Path, tutors: tuple[Path, Path]) -> Path:
    folder = tmp_path / "run"
    train(folder, [TutorRatio(tutor=Bigrams(str(tutors[0]))), RewardPerNat()])
    return folder


@pytest.fixture
def score_file(
    tmp_path: Path, tutors: tuple[Path, Path], student_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> Path:
    rewards = candidates()["reward"]
    data = write_lines(
        tmp_path / "candidates.jsonl",
        [{**row, "reward": reward} for row, reward in zip(rows(), rewards, strict=True)],
    )
    output = tmp_path / "scores.parquet"
    with monkeypatch.context() as context:
        context.syspath_prepend(str(install().parent))
        metrics = f"reward_per_nat,TutorRatio(tutor=Bigrams('{tutors[0]}'))"
        ended = call("score", data, "--model", student_path, "--metrics", metrics, "--output", output)
    assert ended.code == 0, ended.said
    return output


@pytest.mark.parametrize("source", ["run_folder", "score_file"])
@pytest.mark.parametrize("installed", [True, False])
def test_their_scores_survive_save_report_teachers_and_select(
    source: str, installed: bool, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: Path = request.getfixturevalue(source)
    site = tmp_path / "site"
    if installed and not site.exists():
        request.getfixturevalue("install")()
    elif not installed:
        monkeypatch.setattr("sys.path", [each for each in __import__("sys").path if each != str(site)])
    scores = Scores.open(path)
    assert set(scores.metrics) == set(NAMES)
    kinds = {type(metric).__name__ for metric in scores.metrics.values()}
    assert kinds == ({"TutorRatio", "RewardPerNat"} if installed else {"RecordedMetric"})
    for command in ("teachers", "report"):
        for name in NAMES:
            output = ("--output", tmp_path / "report.html") if command == "report" else ()
            ended = call(command, path, "--metric", name, *output)
            assert ended.code == 0, ended.said
            assert name.replace("_", " ") in ended.said or command == "report"
    board = rank_teachers(scores, metric="tutor_ratio", draws=0)
    assert board is not None
    numbers = scores.numbers()
    for line in board.lines:  # its own group score where the code is, the mean where it is not
        own = np.array(scores.column("teacher").values)[scores.column("teacher").codes] == line.teacher  # type: ignore[union-attr]
        student, tutor, ratio = (numbers[name][own] for name in scores.metrics["tutor_ratio"].columns)
        expected = student.sum() / tutor.sum() if installed else ratio.mean()
        assert line.scores["tutor_ratio"].value == pytest.approx(expected, rel=1e-5)
    chosen = scores.choose(parse_policies(["bigram_tutor.policies:KeepMiddle(reward_per_nat, share=0.5)"]))
    assert len(chosen.plan) == 6  # half of the two teachers that have a reward
    left = int(np.flatnonzero(~chosen.in_plan & np.isnan(numbers["reward_per_nat"]))[0])
    assert "left out by KeepMiddle: it has no reward_per_nat (the metric does not apply to it)" in chosen.reason(left)
    selected = tmp_path / "selected.parquet"
    ended = call("select", path, "--policy", "bigram_tutor.policies:KeepMiddle(reward_per_nat)", "--output", selected)
    assert ended.code == 0, ended.said
    assert set(NAMES) <= set(pq.read_table(selected).column_names)


def test_a_metric_gets_the_column_that_it_reads_and_abstains_without_a_word_of_nan(score_file: Path) -> None:
    table = pq.read_table(score_file).to_pylist()
    for row in table:
        assert np.isnan(row["reward_per_nat"]) == (row["reward"] is None), row
        assert (row["reward_per_nat_missing"] == 1) == (row["reward"] is None)
        assert (row["reward_per_nat"] == 0) == (row["reward"] == 0) or row["reward"] is None


def test_another_tutor_is_refused_on_resume(tmp_path: Path, tutors: tuple[Path, Path]) -> None:
    train(tmp_path / "run", [TutorRatio(tutor=Bigrams(str(tutors[0])))], epochs=1)
    renamed = tmp_path / "renamed.npy"
    renamed.write_bytes(tutors[0].read_bytes())
    with pytest.raises(ValueError, match=r"metrics.*bigrams [0-9a-f]+.*bigrams [0-9a-f]+.*accept_changes=True"):
        train(tmp_path / "run", [TutorRatio(tutor=Bigrams(str(tutors[1])))], resume=True)
    # a tutor is what it says, not where it lies
    train(tmp_path / "run", [TutorRatio(tutor=Bigrams(str(renamed)))], resume=True)


def test_another_tutor_is_refused_when_scoring_goes_on(
    tmp_path: Path, tutors: tuple[Path, Path], student_path: Path, install: Install
) -> None:
    install()
    data = write_lines(tmp_path / "candidates.jsonl", rows())
    metrics = f"TutorRatio(tutor=Bigrams('{tutors[0]}'))"
    score = ("score", data, "--model", student_path, "--output", tmp_path / "scores.parquet", "--metrics", metrics)
    assert call(*score).code == 0
    assert call(*score).code == 0  # there is nothing to do
    tutors[0].write_bytes(tutors[1].read_bytes())
    ended = call(*score)
    assert ended.code == 1, ended.said
    assert "metrics" in ended.said


VIEWS: list[int] = []
"""How many views each reading of `Counted` was of."""


@dataclass(frozen=True)
class Counted(Bigrams):
    """The tutor, and how much it is asked."""

    @contextmanager
    def open(self, info: Any) -> Any:
        with super().open(info) as read:

            def counted(views: Any) -> Any:
                VIEWS.append(len(views))
                return read(views)

            yield counted


@dataclass(frozen=True, kw_only=True)
class MeanEntropy(Metric):
    """Wants a statistic that the tutor does not offer."""

    name: str = "mean_entropy"
    uses_statistics: tuple[str, ...] = field(default=("entropy",))

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> dict[str, float]:
        assert stats[0].entropy is not None
        return {self.name: float(stats[0].entropy.mean())}


def test_what_a_frozen_reader_gave_is_read_once(tmp_path: Path, tutors: tuple[Path, Path]) -> None:
    VIEWS.clear()
    tutor = Counted(str(tutors[0]))
    curriculum = train(tmp_path, [MeanEntropy(), TutorRatio(tutor=tutor)], epochs=3)
    assert sum(VIEWS) == len(candidates())  # every sample once, whatever the number of epochs
    first, *later = (taken.columns for taken in curriculum.cycle.record.passes)
    assert len(later) == 2
    for columns in later:
        assert np.array_equal(columns["tutor_ratio_tutor"], first["tutor_ratio_tutor"])
        assert not np.allclose(columns["tutor_ratio_student"], first["tutor_ratio_student"])
