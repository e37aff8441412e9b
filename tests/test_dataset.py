"""Identity of samples: which tokens count, what the columns say, what is refused."""

from itertools import chain
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from distill_sampler import ScoredDataset
from distill_sampler.dataset import response_mask
from tests import tiny

END, NEWLINE = 9, 8


def reference_mask(input_ids: list[int], labels: list[int], ends: set[int]) -> list[bool]:
    """One row, token by token."""
    scored = [label != -100 for label in labels]
    start = None
    for place in range(len(labels) + 1):
        labelled = place < len(labels) and labels[place] != -100
        if labelled and start is None:
            start = place
        if not labelled and start is not None:
            markers = [at for at in range(start, place) if input_ids[at] in ends]
            if markers and place - markers[-1] <= 3:
                scored[markers[-1] : place] = [False] * (place - markers[-1])
            start = None
    if scored:
        scored[0] = False
    return scored


rows_of_tokens = st.lists(
    st.lists(st.tuples(st.sampled_from([1, 2, NEWLINE, END]), st.booleans()), max_size=12), min_size=1, max_size=6
)


@settings(max_examples=200, deadline=None)
@given(rows=rows_of_tokens, with_marker=st.booleans())
def test_masking_many_rows_equals_masking_each_row(rows: list[list[tuple[int, bool]]], with_marker: bool) -> None:
    input_ids = [[token for token, _ in row] for row in rows]
    labels = [[token if kept else -100 for token, kept in row] for row in rows]
    ends = set() if with_marker else {END}
    offsets = np.cumsum([0, *map(len, rows)])
    mask = response_mask(
        np.array([*chain(*input_ids)], np.int64), np.array([*chain(*labels)], np.int64), offsets, ends
    )  # fmt: skip
    expected = [reference_mask(i, l, ends) for i, l in zip(input_ids, labels, strict=True)]  # noqa: E741
    assert mask.tolist() == [*chain(*expected)]


@pytest.mark.parametrize(
    ("labelled", "counted", "why"),
    [
        ([5, 6, END, NEWLINE], [True, True, False, False], "the end marker and the template's newline are left out"),
        ([5, 6, END], [True, True, False], "a template without the newline"),
        ([5, 6, 7], [True, True, True], "truncation removed the marker: score to the end"),
        ([5, END, 6, 7, 4, 3], [True] * 6, "a marker in the middle of a text is content"),
    ],
)
def test_a_turn_counts_up_to_its_end_marker(labelled: list[int], counted: list[bool], why: str) -> None:
    prompt = [1, 2, 3]
    row = {"input_ids": prompt + labelled, "labels": [-100] * 3 + labelled}
    sample = ScoredDataset([row], end_token_ids=[END]).sample(0)
    assert sample.scored.tolist() == [False] * 3 + counted, why


def test_every_assistant_turn_counts_without_its_end_marker() -> None:
    row = {
        "input_ids": [1, 5, 6, END, NEWLINE, 2, 3, 7, END, NEWLINE],
        "labels": [-100, 5, 6, END, NEWLINE, -100, -100, 7, END, NEWLINE],
    }
    scored = ScoredDataset([row], end_token_ids=[END]).sample(0).scored
    assert np.flatnonzero(scored).tolist() == [1, 2, 7]


def toy(num: int = 5) -> list[dict[str, Any]]:
    return [{"input_ids": [1, 2, 3 + n], "labels": [-100, 2, 3 + n], "prompt_id": f"p{n % 2}"} for n in range(num)]


def test_a_list_of_rows_and_an_arrow_table_have_the_same_identity() -> None:
    rows = toy()
    plain, arrow = ScoredDataset(rows), ScoredDataset(datasets.Dataset.from_list(rows))
    assert plain.fingerprint == arrow.fingerprint
    assert plain.lengths.tolist() == arrow.lengths.tolist() == [3] * 5
    assert plain.num_scored.tolist() == arrow.num_scored.tolist() == [2] * 5
    assert plain.column("prompt_id").codes.tolist() == arrow.column("prompt_id").codes.tolist() == [0, 1, 0, 1, 0]
    assert plain.sample(3).input_ids.tolist() == arrow.sample(3).input_ids.tolist()
    assert arrow[3] == rows[3]


def test_filtered_and_shuffled_rows_are_read_in_their_new_order() -> None:
    rows = datasets.Dataset.from_list(toy(9)).filter(lambda row: row["prompt_id"] == "p0").shuffle(seed=1)
    scored = ScoredDataset(rows)
    assert scored.content_hash.tolist() == ScoredDataset(rows.to_list()).content_hash.tolist()
    assert scored.sample(2).input_ids.tolist() == rows[2]["input_ids"]


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[::-1],
        lambda rows: rows[:-1],
        lambda rows: [{**rows[0], "input_ids": [1, 3, 2]}, *rows[1:]],
        lambda rows: [{**rows[0], "labels": [-100, -100, 3]}, *rows[1:]],
    ],
)
def test_every_change_of_content_changes_the_fingerprint(change: Any) -> None:
    assert ScoredDataset(change(toy())).fingerprint != ScoredDataset(toy()).fingerprint


def test_the_content_hash_depends_on_token_order_and_on_which_tokens_count() -> None:
    rows = [
        {"input_ids": ids, "labels": labels} for ids in ([1, 2, 3], [1, 3, 2]) for labels in ([0, 0, 0], [0, 0, -100])
    ]
    assert len(set(ScoredDataset(rows).content_hash.tolist())) == 4


def test_messages_as_a_group_column_are_compared_by_value(tokenizer: PreTrainedTokenizerBase) -> None:
    prepared = tiny.tokenised(tiny.candidates(3), tokenizer)
    scored = ScoredDataset(prepared)
    assert (
        scored.column("prompt").codes.tolist()
        == scored.column("prompt_id").codes.tolist()
        == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    )


def test_without_a_labels_column_every_token_but_the_first_counts() -> None:
    assert ScoredDataset([{"input_ids": [4, 5, 6]}], labels=None).num_scored.tolist() == [2]


def test_rows_with_nothing_to_score_are_refused_or_dropped() -> None:
    rows = [*toy(3), {"input_ids": [1, 2], "labels": [-100, -100], "prompt_id": "p0"}]
    with pytest.raises(ValueError, match=r"1 of 4 rows have no response token.*row 3.*unscorable='drop'"):
        ScoredDataset(rows)
    assert ScoredDataset(rows, unscorable="drop").scorable.tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match="2 of 2 rows have no response token"):
        ScoredDataset(rows[3:] * 2, unscorable="drop")


def test_a_missing_column_is_reported_with_the_closest_name() -> None:
    with pytest.raises(ValueError, match=r"no column 'promt_id'.*'prompt_id'\. Did you mean 'prompt_id'\?"):
        ScoredDataset(toy()).column("promt_id")
    with pytest.raises(ValueError, match=r"no column 'labels'.*labels=None"):
        ScoredDataset([{"input_ids": [1, 2]}])
    with pytest.raises(ValueError, match=r"no column 'input_ids'.*after tokenisation"):
        ScoredDataset([{"text": "hello"}])


def test_missing_values_in_a_group_column_are_counted() -> None:
    rows = [*toy(2), {**toy(1)[0], "prompt_id": None}]
    with pytest.raises(ValueError, match=r"'prompt_id' has no value in 1 of 3 rows \(first: row 2\)"):
        ScoredDataset(datasets.Dataset.from_list(rows)).column("prompt_id", complete=True)


def test_labels_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one label for each token"):
        ScoredDataset([{"input_ids": [1, 2, 3], "labels": [1, 2]}])


def test_an_empty_or_a_streaming_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        ScoredDataset([])
    with pytest.raises(ValueError, match=r"IterableDataset has no row numbers.*streaming"):
        ScoredDataset(datasets.Dataset.from_list(toy()).to_iterable_dataset())
