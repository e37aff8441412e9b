"""What a trainer's log and trackers are told: few numbers unless more are asked for, and each plan's table."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from distill_sampler import (
    BestOf,
    Curriculum,
    CurriculumLoop,
    GlobalNaturalness,
    RankSurprisalRatio,
    ScoredDataset,
    Scorer,
    Shuffle,
    attach,
)
from distill_sampler.integrations.trackers import show_plan
from tests import tiny
from tests.online.test_loss_weights import trainer_of

RSR = "rank_surprisal_ratio"
FEW = {
    *(f"curriculum/{metric}/{side}" for metric in (RSR, "global_naturalness") for side in ("candidates", "chosen")),
    *(f"curriculum/share/{teacher}" for teacher in tiny.TEACHERS),
    *(f"curriculum/{name}" for name in ("score_age_median", "score_age_max", "scoring_share")),
}


def curriculum(**changes: Any) -> Curriculum:
    return Curriculum(
        metrics=[RankSurprisalRatio(), GlobalNaturalness()],
        policies=[BestOf(RSR, per="prompt_id"), Shuffle()],
        scorer=Scorer(progress=False),
        **changes,
    )


def names(entries: Any) -> set[str]:
    return {name for entry in entries for name in entry if name.startswith("curriculum/")}


def trained(output: Path, tokenizer: PreTrainedTokenizerBase, logs: Any = "few", **changes: Any) -> Any:
    trainer = trainer_of("Trainer", output, tokenizer, num_train_epochs=2, **changes)
    attach(trainer, curriculum(), logs=logs)
    trainer.train()
    return trainer


def test_the_log_has_few_numbers_by_default(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert names(trained(tmp_path, tokenizer).state.log_history) == FEW


def test_all_numbers_are_there_on_request(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    told = names(trained(tmp_path, tokenizer, "all").state.log_history)
    assert told > FEW
    assert "curriculum/scoring_tokens_per_second" in told
    assert not [name for name in told if "hash" in name]


def test_other_requests_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"logs='some'.*'few' or 'all'"):
        trained(tmp_path, tokenizer, "some")


def test_the_trainers_speed_counts_what_was_trained_on(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = trained(tmp_path, tokenizer, **saving)
    last = trainer.state.log_history[-1]
    # two of six candidates an epoch, for two epochs
    assert last["train_samples_per_second"] * last["train_runtime"] == pytest.approx(4, rel=1e-2)
    again = trainer_of("Trainer", tmp_path, tokenizer, num_train_epochs=5, **saving)
    attach(again, curriculum())
    again.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path)))
    last = again.state.log_history[-1]  # of the three epochs after the checkpoint
    assert last["train_samples_per_second"] * last["train_runtime"] == pytest.approx(6, rel=1e-2)


def test_a_loop_gives_the_numbers_of_a_trainers_log(tokenizer: PreTrainedTokenizerBase) -> None:
    accelerator, model = Accelerator(cpu=True), tiny.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rows = tiny.tokenised(tiny.candidates(2), tokenizer)
    observing = curriculum(observe=True)
    loop = CurriculumLoop(observing, ScoredDataset(rows), accelerator, logs="few")
    tokens = rows.select_columns(["input_ids", "labels"])
    loader = torch.utils.data.DataLoader(
        tokens, batch_size=2, sampler=loop.sampler, collate_fn=DataCollatorForSeq2Seq(tokenizer)
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    entries = []
    for _ in loop.epochs(2):
        for batch in loop.batches(model, loader):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        entries.append(loop.numbers())
    assert loop.numbers() == {}  # each number is told once
    losses = {name for entry in entries for name in entry if name.startswith("curriculum/loss/teacher/")}
    chosen = {rows[int(index)]["teacher"] for plan in observing.plans for index in plan.indices}
    assert losses == {f"curriculum/loss/teacher/{teacher}" for teacher in chosen}
    assert names(entries) - losses == FEW
    for entry in entries:
        surprisal = [value for name, value in entry.items() if name in losses]
        mean = -entry["curriculum/global_naturalness/chosen"]
        assert min(surprisal) - 1e-3 <= mean <= max(surprisal) + 1e-3  # nothing was learned at a rate of 0


class Writer:
    """Stands for TensorBoard's."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, str, int]] = []

    def add_text(self, name: str, text: str, step: int) -> None:
        self.texts.append((name, text, step))


def test_the_table_of_a_plan_has_a_line_for_each_teacher(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of("Trainer", tmp_path, tokenizer)
    attached, writer = curriculum(), Writer()
    attach(trainer, attached)
    trainer.train()
    show_plan(attached.summaries[0], [("tensorboard", writer), ("another", object())])
    ((name, text, step),) = writer.texts
    header, rule, *lines = text.splitlines()
    assert (name, step) == ("curriculum/plan", 0)
    assert header == f"| teacher | candidates | tokens | {RSR} | global_naturalness | chosen | share |"
    assert {line.split(" | ")[0].strip("| ") for line in lines} == set(tiny.TEACHERS)
    assert {line.count("|") for line in (header, rule, *lines)} == {8}


# ---- The real packages ----


@pytest.mark.slow
def test_tensorboard_has_the_numbers_and_the_table(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(logs))
        trained(tmp_path / "student", tokenizer, report_to="tensorboard")
    events = EventAccumulator(str(next(logs.rglob("events*")).parent))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in FEW} <= scalars
    assert len(events.Tensors("curriculum/plan/text_summary")) == 2  # one for each epoch
    text = events.Tensors("curriculum/plan/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(teacher in text for teacher in tiny.TEACHERS)


@pytest.mark.slow
def test_wandb_has_the_numbers_and_the_table(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(tmp_path))
        patch.setenv("WANDB_SILENT", "true")
        trained(tmp_path / "student", tokenizer, report_to="wandb")
        told = dict(wandb.run.summary)
        wandb.finish()
    assert {f"train/{name}" for name in FEW} <= set(told)
    tables = [path.read_text() for path in tmp_path.rglob("*.table.json")]
    assert len(tables) == 2
    assert all(teacher in table for table in tables for teacher in tiny.TEACHERS)


@pytest.mark.slow
def test_trackio_has_the_numbers_and_the_table(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
        pytest.importorskip("trackio", reason="trackio is not installed")
        trained(tmp_path / "student", tokenizer, report_to="trackio", project="p")
    with sqlite3.connect(tmp_path / "trackio" / "p.db") as database:
        entries = [json.loads(text) for (text,) in database.execute("SELECT metrics FROM metrics ORDER BY step")]
    assert {f"train/{name}" for name in FEW} <= {name for entry in entries for name in entry}
    tables = [entry["curriculum/plan"] for entry in entries if "curriculum/plan" in entry]
    assert [entry["train/global_step"] for entry in entries if "curriculum/plan" in entry] == [0, 1]
    for table in tables:
        assert {row["teacher"] for row in table["_value"]} == set(tiny.TEACHERS)
