"""Metrics with a stored teacher: the numbers of the live one, no forward of it, by path and by name."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from distill_sampler import (
    BestOf,
    Curriculum,
    ExcessLoss,
    Metric,
    ModelReader,
    ScoredDataset,
    Scorer,
    TeacherSentences,
    TeacherStudentGap,
    attach,
)
from distill_sampler.engines.writing import StoredRow, write_store
from distill_sampler.protocols import PassInfo
from distill_sampler.serialize import as_typed, described
from distill_sampler.specs import parse_metrics, recorded_metric
from tests import tiny
from tests.cli.conftest import call, rows, student_path, write_lines

__all__ = ["student_path"]  # a fixture
OWN = tiny.tokenizer(("i", "s"), ("Ġ", "t"), (".", "Ġ"), ("e", "Ġ"))
BETA = 0.0


def teacher() -> ModelReader:
    return ModelReader(tiny.model(1, vocab_size=300), tokenizer=OWN)


def store(path: Path, dataset: ScoredDataset, tokenizer: Any, *, key: str | None = None, leave_out: int = 0) -> Path:
    """A store of what the live teacher makes of a data set's responses."""
    live = TeacherStudentGap(teacher=teacher(), tokenizer=tokenizer)
    stored = []
    for row in range(leave_out, len(dataset)):
        sample = dataset.sample(row, () if key is None else (key,))
        own = live._own(sample, "teacher", live.readers["teacher"])
        assert own is not None
        with live.readers["teacher"].open(PassInfo(tokens=100)) as read:
            (stats,) = read([own.view])
        stored.append(
            StoredRow(
                text="".join(live.text(sample).turns),
                key=None if key is None else str(sample.columns[key]),
                begins=own.begins,
                surprisal=stats.surprisal,
            )
        )
    write_store(path, stored, {"model": "tiny", **({} if key is None else {"key_column": key})})
    return path


def metrics(of: Any, tokenizer: Any) -> list[Metric]:
    return [
        TeacherSentences(teacher=of, tokenizer=tokenizer, beta=BETA),
        TeacherStudentGap(teacher=of, tokenizer=tokenizer),
        ExcessLoss(reference=of, tokenizer=tokenizer),
    ]


def scores_of(found: list[Metric], dataset: ScoredDataset) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    for block in Scorer(progress=False).score(tiny.model(), dataset, found, np.arange(len(dataset))):
        for name, values in block.columns.items():
            columns.setdefault(name, np.zeros(len(dataset)))[block.indices] = values
    return columns


def test_a_stored_teacher_gives_the_numbers_of_the_live_one_and_reads_nothing(
    tmp_path: Path, dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = store(tmp_path / "store.arrow", dataset, tokenizer)
    live, stored = (scores_of(metrics(of, tokenizer), dataset) for of in (teacher(), str(path)))
    assert live["teacher_sentences"].any()
    for name, values in live.items():
        assert stored[name] == pytest.approx(values, abs=1e-5), name
    for metric in metrics(str(path), tokenizer):
        assert metric.readers == {}
        views = metric.views(dataset.sample(0))
        assert views is not None
        assert [view.reader for view in views] == ["student"]


def test_rows_are_found_by_the_key_column_of_the_store(
    tmp_path: Path, dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = dataset.rows.add_column("uuid", [f"u{row}" for row in range(len(dataset))])  # type: ignore[attr-defined]
    keyed = ScoredDataset(rows, end_token_ids=[257])
    path = store(tmp_path / "store.arrow", keyed, tokenizer, key="uuid", leave_out=2)
    metric = TeacherSentences(teacher=str(path), tokenizer=tokenizer, beta=BETA)
    assert metric.uses_columns == ("uuid",)
    found = scores_of([metric], keyed)["teacher_sentences"]
    assert np.isnan(found[:2]).all()  # not in the store: the metric does not apply
    assert np.isfinite(found[2:]).all()
    cut = rows.map(lambda row: {"input_ids": row["input_ids"][:-6], "labels": row["labels"][:-6]})
    assert np.isfinite(scores_of([metric], ScoredDataset(cut, end_token_ids=[257]))["num_sentences"][2:]).all()


def test_what_a_store_holds_is_the_metrics_identity_and_not_where_it_lies(
    tmp_path: Path, dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = store(tmp_path / "store.arrow", dataset, tokenizer)
    copy = tmp_path / "elsewhere" / "copy.arrow"
    copy.parent.mkdir()
    shutil.copy(path, copy)
    other = store(tmp_path / "other.arrow", dataset, tokenizer, leave_out=1)
    one, same, different = (described(TeacherSentences(teacher=str(each))) for each in (path, copy, other))
    assert one == same
    assert one != different


@pytest.mark.parametrize("kind", ["stored", "live"])
def test_a_file_of_scores_names_the_metric_so_that_it_can_be_shown(
    kind: str, tmp_path: Path, dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    of: Any = teacher() if kind == "live" else str(store(tmp_path / "store.arrow", dataset, tokenizer))
    again = recorded_metric(as_typed(TeacherSentences(teacher=of, by="share")))
    assert isinstance(again, TeacherSentences)
    assert again.by == "share"
    assert again.higher_is_better
    assert again.readers == {}  # a file makes no reader
    with pytest.raises(ValueError, match=r"TeacherSentences\(teacher=.*ModelReader\(model"):
        again.with_tokenizer(tokenizer).views(dataset.sample(0))


def test_the_command_line_takes_a_stored_teacher_by_name(
    tmp_path: Path, student_path: Path, dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = store(tmp_path / "store.arrow", dataset, tokenizer)
    data = write_lines(tmp_path / "candidates.jsonl", rows())  # the texts of `dataset`
    ended = call(
        "score",
        data,
        *("--model", student_path, "--output", tmp_path / "scores.parquet"),
        *("--metrics", f"TeacherSentences(teacher='{path}', beta={BETA}), ExcessLoss(reference='{path}')"),
    )
    assert ended.code == 0, ended.said
    table = pq.read_table(tmp_path / "scores.parquet")
    expected = scores_of(metrics(str(path), tokenizer), dataset)
    for name in ("teacher_sentences", "teacher_share", "excess_loss"):
        assert table[name].to_numpy() == pytest.approx(expected[name], abs=1e-4), name
    chosen = tmp_path / "chosen.jsonl"
    policy = "BestOf(teacher_sentences, per=prompt_id)"
    ended = call("select", tmp_path / "scores.parquet", "--policy", policy, "--output", chosen)
    assert ended.code == 0, ended.said
    assert len(chosen.read_text(encoding="utf-8").splitlines()) == 6


def test_a_trainer_takes_a_stored_teacher_by_path(
    tmp_path: Path, dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = store(tmp_path / "store.arrow", dataset, tokenizer)
    trainer = Trainer(
        model=tiny.model(),
        train_dataset=tiny.tokenised(tiny.candidates(), tokenizer),
        processing_class=tokenizer,
        args=TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=1,
            per_device_train_batch_size=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
    )
    (metric,) = parse_metrics(f"TeacherSentences(teacher='{path}', beta={BETA})")
    curriculum = Curriculum(
        metrics=[metric], policies=[BestOf("teacher_sentences", per="prompt_id")], scorer=Scorer(progress=False)
    )
    attach(trainer, curriculum)
    trainer.train()
    first = curriculum.cycle.record.passes[0].columns["teacher_sentences"]
    assert first.tolist() == scores_of(metrics(str(path), tokenizer), dataset)["teacher_sentences"].tolist()


def test_what_is_no_teacher_is_refused(tmp_path: Path, dataset: ScoredDataset) -> None:
    with pytest.raises(ValueError, match=r"TeacherSentences\(teacher=3\).*\.arrow"):
        TeacherSentences(teacher=3)
    with pytest.raises(ValueError, match=r"ExcessLoss\(reference=None\)"):
        ExcessLoss(reference=None)
    with pytest.raises(ValueError, match=r"nowhere\.arrow"):
        TeacherSentences(teacher=str(tmp_path / "nowhere.arrow"))
    with pytest.raises(ValueError, match=r"bytes_per_token=0"):
        TeacherStudentGap(teacher=teacher(), bytes_per_token=0)
    with pytest.raises(ValueError, match=r"beta=2"):
        TeacherSentences(teacher=teacher(), beta=2)
    with pytest.raises(ValueError, match=r"by='shares'"):
        TeacherSentences(teacher=teacher(), by="shares")
    with pytest.raises(ValueError, match=r"first_bytes=0"):
        TeacherSentences(teacher=teacher(), first_bytes=0)
    with pytest.raises(ValueError, match=r"TeacherSentences\(tokenizer=…\)"):
        TeacherSentences(teacher=teacher()).views(dataset.sample(0))
    asking = TeacherSentences(teacher=teacher(), tokenizer=tiny.tokenizer(), prompt="question")
    sample = replace(dataset.sample(0), columns={"question": 3})
    with pytest.raises(ValueError, match=r"prompt='question'.*int"):
        asking.views(sample)
