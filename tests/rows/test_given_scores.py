"""`Curriculum(scores=)`: what was computed before training is not computed again, and foreign scores are refused."""

import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from distill_sampler import (
    Curriculum,
    GlobalNaturalness,
    RankSurprisalRatio,
    Rescore,
    ScoredDataset,
    Scorer,
    attach,
    score_rows,
)
from distill_sampler.reading import scorer as scoring
from tests import tiny
from tests.cli.test_score_checks import Agreement
from tests.rows.test_score_rows import METRICS
from tests.test_attach import RSR, TRAINERS, curriculum, plain_trainer, sft_trainer, trained


def scores_of(path: Path, rows: Any = None, **options: Any) -> Path:
    """A file of scores by the student before training."""
    rows = list(tiny.candidates()) if rows is None else rows
    model = options.pop("model", None) or tiny.model()
    options = {"metrics": METRICS, "tokenizer": tiny.tokenizer(), "progress": False, **options}
    pq.write_table(score_rows(model, rows, **options), path)
    return path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each call of the scorer reads."""
    counts: list[int] = []
    score = Scorer.score

    def counted(self: Scorer, student: Any, dataset: Any, metrics: Any, indices: Any, **how: Any) -> Any:
        counts.append(len(indices))
        return score(self, student, dataset, metrics, indices, **how)

    monkeypatch.setattr(scoring.Scorer, "score", counted)
    return counts


def run(trainer: Any, attached: Curriculum, **how: Any) -> tuple[list[int], dict[str, list[float]]]:
    trainer.batches = []
    attach(trainer, attached)
    trainer.train(**how)
    return trained(trainer), {name: weight.flatten().tolist() for name, weight in trainer.model.state_dict().items()}


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_run_takes_its_first_scores_from_a_file_and_is_the_same_run(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, read: list[int]
) -> None:
    file = scores_of(tmp_path / "scores.parquet", list(reversed(list(tiny.candidates()))))
    read.clear()
    given = curriculum(scores=str(file), metrics=METRICS)
    order, weights = run(TRAINERS[kind](tmp_path / "given", tokenizer), given)
    assert read == [0, 18], "only before the second epoch"
    expected, expected_weights = run(TRAINERS[kind](tmp_path / "own", tokenizer), curriculum(metrics=METRICS))
    assert order == expected
    assert weights == expected_weights
    first = pq.read_table(tmp_path / "given" / "scores.parquet").filter(pa.compute.field("pass") == 0)
    by_file = {row["scoring_hash"]: row for row in pq.read_table(file).to_pylist()}
    assert len(first) == 18
    for row in first.to_pylist():
        for name in ("rank_surprisal_ratio", "mean_rank", "global_naturalness"):
            assert row[name] == by_file[row["content_hash"]][name], "the file's scores, bit for bit"
    assert "from a file" in str(given.summaries[0].table().renderables[0])
    assert given.summaries[0].scoring.from_file == 18
    assert RSR in given.explain(0, epoch=0)


def test_a_lora_that_was_not_trained_yet_takes_the_scores_of_its_base(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, read: list[int]
) -> None:
    file = scores_of(tmp_path / "scores.parquet")
    read.clear()
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    attached = curriculum(scores=file, rescore=Rescore.never())
    run(sft_trainer(tmp_path / "run", tokenizer, peft_config=config), attached)
    assert sum(read) == 0


def test_a_trainer_with_autocast_takes_scores_that_were_computed_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, student_path: Path, read: list[int]
) -> None:
    table = score_rows(student_path, tiny.candidates(), metrics=METRICS, autocast="bfloat16", progress=False)
    pq.write_table(table, tmp_path / "scores.parquet")
    read.clear()
    attached = curriculum(scores=tmp_path / "scores.parquet", rescore=Rescore.never())
    run(sft_trainer(tmp_path / "run", tokenizer, bf16=True), attached)
    assert sum(read) == 0
    attached = curriculum(scores=tmp_path / "scores.parquet")
    attach(sft_trainer(tmp_path / "float32", tokenizer), attached)
    with pytest.raises(ValueError, match="computes differently now"):
        attached.start_epoch(0, tiny.model())


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_needs_the_file_no_more(
    stop: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, read: list[int]
) -> None:
    file = scores_of(tmp_path / "scores.parquet")
    settings = {"save_strategy": "steps", "save_steps": 1}
    order, weights = run(plain_trainer(tmp_path / "run", tokenizer, **settings), curriculum(scores=file))
    file.unlink()
    read.clear()
    rest, resumed = run(
        plain_trainer(tmp_path / "run", tokenizer, **settings),
        curriculum(scores=file),
        resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"),
    )
    assert rest == order[2 * stop :]
    assert resumed == weights
    assert sum(read) == (18 if stop <= 3 else 0), "only before the second epoch"


def test_samples_that_are_not_in_the_file_are_scored(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, read: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    file = scores_of(tmp_path / "scores.parquet", list(tiny.candidates())[:15])
    read.clear()
    attached = curriculum(scores=file, rescore=Rescore.never())
    with caplog.at_level(logging.WARNING):
        order, weights = run(plain_trainer(tmp_path / "given", tokenizer), attached)
    assert read == [3]
    assert "3 of 18 samples (first: sample 15) are not in" in caplog.text
    expected, expected_weights = run(plain_trainer(tmp_path / "own", tokenizer), curriculum(rescore=Rescore.never()))
    assert (order, weights) == (expected, expected_weights)
    assert np.isfinite(attached.store.latest[RSR]).all()


def test_scores_that_do_not_fit_are_refused_with_the_part_that_does_not(tmp_path: Path, dataset: ScoredDataset) -> None:
    rows = list(tiny.candidates())
    longer = [{**row, "completion": [{"role": "assistant", "content": "Well. " * 9}]} for row in rows]
    pq.write_table(pa.table({"sample": [0], RSR: [1.0]}), tmp_path / "by hand.parquet")
    changed = tiny.model()
    changed.lm_head.weight.data[7, 7] += 1e-3
    for file, words in (
        (tmp_path / "nowhere.parquet", ["nowhere.parquet"]),
        (tmp_path / "by hand.parquet", ["does not say which student"]),
        (scores_of(tmp_path / "metrics.parquet", metrics=[GlobalNaturalness()]), ["RankSurprisalRatio", "--metrics"]),
        (scores_of(tmp_path / "clip.parquet", metrics=[RankSurprisalRatio(rank_clip=50)]), ["rank_clip=50"]),
        (scores_of(tmp_path / "weights.parquet", model=changed), ["other weights", "leave scores= out"]),
        (scores_of(tmp_path / "dtype.parquet", model=tiny.model().bfloat16()), ["dtype", "bfloat16", "scores="]),
        (scores_of(tmp_path / "data.parquet", longer), ["none of the 18 samples", "max_length"]),
        (scores_of(tmp_path / "cut.parquet", rows, max_length=40), ["none of the 18 samples", "max_length 40"]),
    ):
        attached = curriculum(scores=file)
        attached.bind(dataset)
        with pytest.raises(ValueError, match=r"scores") as refused:
            attached.start_epoch(0, tiny.model())
        assert [word for word in words if word not in str(refused.value)] == [], str(refused.value)


def test_a_table_that_is_no_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)scores=.*path of a file"):
        curriculum(scores=pa.table({"sample": [0]}))


def test_what_metrics_read_in_columns_belongs_to_the_sample(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{**row, "votes": [number, 1]} for number, row in enumerate(tiny.candidates())]
    metrics = [RankSurprisalRatio(), Agreement()]
    file = scores_of(tmp_path / "scores.parquet", rows, metrics=metrics)
    rows[4]["votes"] = [99]
    data = ScoredDataset(tiny.tokenised(datasets.Dataset.from_list(rows), tokenizer), end_token_ids=[257])
    attached = curriculum(scores=file, metrics=metrics)
    attached.bind(data)
    attached.start_epoch(0, tiny.model())
    assert attached.summaries[0].scoring.from_file == 17
    assert attached.store.latest["agreement"].tolist()[3:6] == [4, 99, 6]
