"""Which responses a trainer has cut off, told from the prepared rows alone."""

from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from distill_sampler import ScoredDataset
from distill_sampler.truncation import count_by_teacher, cut_responses
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


def test_they_are_counted_by_teacher() -> None:
    data = datasets.Dataset.from_list(
        [
            {"input_ids": [1, 2, last], "labels": [-100, 2, last], "teacher": teacher}
            for teacher, last in (("ada", 3), ("bob", END), ("ada", END), ("ada", 4), (None, 5))
        ]
    )
    dataset = ScoredDataset(data, end_token_ids=[END])
    found = cut_responses(dataset, max_length=3, end_token_ids=[END])
    assert count_by_teacher(found, dataset.column("teacher")) == {"ada": (2, 3), "bob": (0, 1), "None": (1, 1)}
