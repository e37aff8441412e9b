"""Which responses a trainer has cut off, told from the prepared rows alone."""

from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from distill_sampler import BestOf, Curriculum, ResponseLength, ScoredDataset, Scorer, attach
from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.truncation import UNKNOWN, cut_responses, cut_sentence, response_tokens_cut
from tests import tiny

END, NEWLINE = 257, 198


def of(*rows: tuple[list[int], int]) -> ScoredDataset:
    """Rows of tokens, each with the number of the prompt's."""
    return ScoredDataset(
        [{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]} for ids, prompt in rows], end_token_ids=[END]
    )


def cut(dataset: ScoredDataset, max_length: int | None, **options: Any) -> list[bool]:
    return cut_responses(dataset, max_length=max_length, end_token_ids=[END], **options).tolist()  # type: ignore[no-any-return]


def test_a_row_of_full_length_without_an_end_marker_was_cut() -> None:
    whole, full, short = [1, 2, 3, END, NEWLINE], [1, 2, 3, 4, 5], [1, 2, 3, 4]
    assert cut(of((whole, 2), (full, 2), (short, 2)), 5) == [False, True, False]
    assert cut(of((whole, 2), (full, 2)), 6) == [False, False]
    assert cut(of((full, 2), ([5, 6, 7, 8, 9], 1)), 5) == [True, True]  # all of them, and none shows a marker
    assert cut(of((full, 2)), None) == [False]


def test_the_templates_tail_may_stand_behind_the_end_marker() -> None:
    assert cut(of(([1, 2, END, 7, 8], 1), ([1, END, 7, 8, 9], 1)), 5) == [False, True]


def test_where_the_end_of_rows_was_kept_a_response_without_a_prompt_was_cut() -> None:
    rows = of(([3, 4, 5, END, NEWLINE], 0), ([1, 2, 3, END, NEWLINE], 2), ([3, 4, END, NEWLINE], 0))
    assert cut(rows, 5, truncation_mode="keep_end") == [True, False, False]


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated")
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [57, 75, 92, 120])
def test_what_a_trainer_has_cut_is_found(
    max_length: int,
    mode: Literal["keep_start", "keep_end"],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> None:
    prepared = tiny.tokenised(tiny.candidates(), tokenizer)  # type: ignore[arg-type]
    lengths = np.array([len(row["input_ids"]) for row in prepared])
    responses = np.array([sum(label != -100 for label in row["labels"]) for row in prepared])
    # a cut that took the template's newline alone is none; a row that begins with its response may have lost some
    expected = lengths > max_length + 1 if mode == "keep_start" else responses >= max_length - 1
    settings: dict[str, Any] = {"max_length": max_length, "truncation_mode": mode, "gradient_checkpointing": False}
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=tiny.candidates(),
        args=SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **settings),
    )
    dataset = ScoredDataset(trainer.train_dataset, end_token_ids=[END])
    assert len(dataset) == len(prepared)  # no row was dropped
    found = cut_responses(dataset, max_length=max_length, end_token_ids=[END], truncation_mode=mode)
    np.testing.assert_array_equal(found, expected)


def test_many_rows_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_sampler.truncation._ROWS", 2)
    rows = [([1, 2, 3, 4 if number % 3 else END], 1) for number in range(7)]
    assert cut(of(*rows), 4) == [bool(number % 3) for number in range(7)]


def test_what_was_cut_is_told_by_teacher_and_by_how_much() -> None:
    data = datasets.Dataset.from_list(
        [
            {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "teacher": teacher}
            for teacher in ("ada", "bob", "ada", "ada", None, "cy", "dan", "dan")
        ]
    )
    teachers = ScoredDataset(data).column("teacher")
    tokens_cut = np.array([4, 0, 0, 7, 1, UNKNOWN, 12, UNKNOWN])
    told = cut_sentence(tokens_cut, teachers, by="max_length")
    for part in (
        "6 of 8 responses were cut off at max_length",
        "ada: 2 of 3 by 6 tokens on average",
        "None: 1 of 1 by 1 token;",
        "cy: 1 of 1 by an unknown number of tokens",
        "dan: 2 of 2 by 12 tokens where that is known",
    ):
        assert part in told
    assert "bob" not in told
    assert "6 of 8 responses were cut off at max_length, by 6 tokens on average" in cut_sentence(
        tokens_cut, None, by="max_length"
    )


def test_the_end_marker_is_the_responses_last_token() -> None:
    whole = [1, 2, 3, END, NEWLINE]  # the response is 2, 3 and its marker

    def lost(start: int, stop: int, *ends: int) -> int:
        return response_tokens_cut(whole, np.array([False, True, True, True, True]), slice(start, stop), ends)

    assert [lost(0, stop, END) for stop in range(6)] == [3, 3, 2, 1, 0, 0]
    assert [lost(0, stop) for stop in range(6)] == [4, 4, 3, 2, 1, 0]  # without markers nobody knows what a tail is
    assert [lost(start, 5, END) for start in range(6)] == [0, 0, 1, 2, 3, 3]
    assert response_tokens_cut([1, 2], np.array([False, False]), slice(0, 1), [END]) == 0


# ---- Through a trainer ----


def trained_on(output: Path, data: list[dict[str, Any]], **settings: Any) -> Any:
    args = SFTConfig(
        str(output),
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        **settings,
    )
    return SFTTrainer(
        model=tiny.model(), processing_class=tiny.tokenizer(), train_dataset=datasets.Dataset.from_list(data), args=args
    )


def attached(trainer: Any) -> Curriculum:
    curriculum = Curriculum(
        metrics=[ResponseLength()],
        policies=[BestOf("response_length", per="prompt_id")],
        scorer=Scorer(progress=False),
    )
    attach(trainer, curriculum)
    return curriculum


def as_columns(kind: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    identity = {name: row[name] for name in ("prompt_id", "teacher")}
    if kind == "messages":
        return {"messages": row["prompt"] + row["completion"], **identity}
    if kind == "text":
        return {"text": tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False), **identity}
    return row


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated")
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("kind", ["messages", "prompt and completion", "text"])
def test_it_is_known_how_many_tokens_a_trainer_has_cut(
    kind: str, mode: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = [as_columns(kind, row, tokenizer) for row in tiny.candidates().to_list()]
    length = 75 if mode == "keep_start" else 45
    whole, short = (
        attached(trained_on(tmp_path, data, truncation_mode=mode, max_length=most)).dataset for most in (None, length)
    )
    expected = []
    for sample in whole.samples(range(len(whole))):
        response = np.flatnonzero(sample.scored)
        places = [*response, response[-1] + 1]  # and its marker
        start = 0 if mode == "keep_start" else max(len(sample.input_ids) - length, 0)
        expected.append(sum(not start <= place < start + length for place in places))
    assert 0 < np.count_nonzero(expected) < len(expected)
    assert short.tokens_cut.tolist() == expected
    assert not whole.tokens_cut.any()


def test_tokens_alone_tell_that_a_response_was_cut_but_not_by_how_much(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    prepared: Any = tiny.tokenised(tiny.candidates(), tokenizer)  # type: ignore[arg-type]
    data = [{name: row[name] for name in ("input_ids", "labels", "prompt_id")} for row in prepared]
    dataset = attached(trained_on(tmp_path, data, max_length=75)).dataset
    lengths = np.array([len(row["input_ids"]) for row in prepared])
    assert np.array_equal(dataset.tokens_cut == UNKNOWN, lengths > 76)
    assert set(dataset.tokens_cut.tolist()) == {0, UNKNOWN}


@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_that_a_trainer_dropped_are_told_and_rows_keep_their_number(shuffled: bool, tmp_path: Path) -> None:
    """Of one prompt nothing is left at all, of another one row."""
    data = tiny.candidates(4).to_list()
    for number in (3, 4, 5, 7, 8):
        data[number]["prompt"][0]["content"] += " and again?" * 12
    trainer = trained_on(tmp_path / "run", data, max_length=100, shuffle_dataset=shuffled)
    curriculum = attached(trainer)
    dataset = curriculum.dataset
    assert len(trainer.train_dataset) == len(data) - 5
    kept = dataset.source_rows.tolist()
    assert sorted(kept) == [0, 1, 2, 6, 9, 10, 11]
    assert (kept != sorted(kept)) is shuffled
    assert [data[row]["teacher"] for row in kept] == trainer.train_dataset["teacher"]
    curriculum.start_epoch(0, trainer.model)
    (note,) = (note for note in curriculum.summaries[0].notes if "dropped" in note)
    assert "dropped 5 of 12 rows (" in note
    assert all(f"{name}: {number}" in note for name, number in zip(tiny.TEACHERS, (1, 2, 2), strict=True))
    assert f"1 prompt has no row left (such as prompt_id = {data[3]['prompt_id']})" in note
    assert curriculum.samples()["source_row"].to_pylist() == kept
    curriculum.save_run(tmp_path)
    for name in ("scores.parquet", "plans.parquet"):
        table = pq.read_table(tmp_path / name).to_pylist()
        assert all(row["teacher"] == data[row["source_row"]]["teacher"] for row in table)
        assert all(row["prompt_id"] == data[row["source_row"]]["prompt_id"] for row in table)


def test_rows_that_the_user_left_out_are_not_called_dropped(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = tiny.tokenised(tiny.candidates(), tokenizer)  # type: ignore[arg-type]
    chosen = datasets.Dataset.from_list(list(rows)).select([5, 4, 0])
    for settings in ({"max_length": None}, {"max_length": 75}, {"dataset_kwargs": {"skip_prepare_dataset": True}}):
        trainer = trained_on(tmp_path, list(rows), **settings)
        trainer.train_dataset = chosen if settings.get("max_length", 1) != 75 else trainer.train_dataset
        assert attached(trainer).dataset.dropped is None


def test_a_run_that_is_read_back_prefers_whole_responses_as_training_did(tmp_path: Path) -> None:
    trainer = trained_on(tmp_path / "run", tiny.candidates(4).to_list(), max_length=75)
    curriculum = attached(trainer)
    curriculum.start_epoch(0, trainer.model)
    curriculum.save_run(tmp_path)
    scores = Scores.open(tmp_path)
    assert scores.integers("tokens_cut").tolist() == curriculum.dataset.tokens_cut.tolist()  # type: ignore[union-attr]
    for prefer in (True, False):
        again = scores.choose([BestOf("response_length", per="prompt_id", prefer_whole=prefer)])
        assert (again.plan == curriculum.plans[0]) is prefer
        assert again.cut is not None
        assert again.cut[again.plan.indices].any() is not prefer
