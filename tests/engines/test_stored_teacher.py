"""A store is found by key or by text, laid on the text that is asked about, and not mistaken for another one."""

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_sampler.engines.stored_teacher import StoredTeacher
from distill_sampler.engines.writing import StoredRow, write_store
from distill_sampler.serialize import described, encode_facts


def row(text: str, key: str | None = None, *, first: float = 0.0, **more: Any) -> StoredRow:
    """A token for each two bytes."""
    begins = np.arange(0, len(text.encode()), 2)
    return StoredRow(text=text, key=key, begins=begins, surprisal=first + begins / 10, token_ids=begins + 7, **more)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "store.arrow"
    rows = [row("The first answer.", "a"), row("The second é answer.", "b", first=3), row("Nö.", "c")]
    write_store(found, rows, {"model": "big", "key_column": "id"})
    return found


def test_rows_are_found_by_key_and_by_text(path: Path) -> None:
    teacher = StoredTeacher(path)
    assert len(teacher) == 3
    by_key, by_text = teacher.find("Nö.", "c"), teacher.find("Nö.")
    for found in (by_key, by_text):
        assert found is not None
        assert found.begins.tolist() == [0, 2]
        assert found.token_ids.tolist() == [7, 9]
        assert found.surprisal.tolist() == pytest.approx([0, 0.2])
        assert (found.coverage, found.top_ids) == (1.0, None)
        assert found.surprisal.dtype == np.float32


def test_white_space_at_the_ends_does_not_hide_a_text(path: Path) -> None:
    found = StoredTeacher(path).find("\n\nThe first answer.  ", None)
    assert found is not None
    assert found.begins[:3].tolist() == [2, 4, 6]


def test_a_cut_text_is_found_by_key(path: Path) -> None:
    teacher = StoredTeacher(path)
    found = teacher.find("The second", "b")
    assert found is not None
    assert found.begins.tolist() == [0, 2, 4, 6, 8]
    assert found.coverage == 1.0
    assert teacher.find("The second") is None


def test_what_is_not_there_is_said_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher = StoredTeacher(path)
    with caplog.at_level(logging.WARNING):
        assert teacher.find("Unknown.", "z") is None
        assert teacher.find("Unknown.") is None
    assert len(caplog.records) == 1
    assert "id = 'z'" in caplog.text


def test_too_little_coverage_is_no_number(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert StoredTeacher(path).find("Something else that nobody wrote.", "a") is None
    assert "min_coverage" in caplog.text
    longer = "The first answer." + "!" * 4
    assert StoredTeacher(path).find(longer, "a") is None
    found = StoredTeacher(path, min_coverage=0.5).find(longer, "a")
    assert found is not None
    assert found.coverage == pytest.approx(17 / 21)


def test_one_text_with_other_numbers_needs_a_key(tmp_path: Path) -> None:
    path = tmp_path / "store.arrow"
    write_store(
        path, [row("Yes.", "a"), row("Yes.", "b", first=1.0), row("No.", "c"), row("No.", "d")], {"key_column": "id"}
    )
    teacher = StoredTeacher(path)
    with pytest.raises(ValueError, match=r"'Yes\.' 2 times .*--key-column"):
        teacher.find("Yes.")
    assert teacher.find("No.") is not None  # the same numbers
    found = teacher.find("Yes.", "b")
    assert found is not None
    assert found.surprisal[0] == 1.0


def test_a_key_without_keys_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "store.arrow", [row("Yes.")])
    teacher = StoredTeacher(tmp_path / "store.arrow")
    assert teacher.key_column is None
    with pytest.raises(ValueError, match="--key-column"):
        teacher.find("Yes.", "a")


def test_the_likeliest_tokens_come_with_their_tokens(tmp_path: Path) -> None:
    top_ids = np.arange(6).reshape(2, 3)
    stored = row("Nö.", top_ids=top_ids, top_logprobs=-top_ids.astype(float))
    write_store(tmp_path / "store.arrow", [row("ab", top_ids=top_ids[:1], top_logprobs=top_ids[:1]), stored], top_k=3)
    teacher = StoredTeacher(tmp_path / "store.arrow")
    found = teacher.find("Nö")
    assert teacher.top_k == 3
    assert found is None  # another text
    found = teacher.find("Nö.")
    assert found is not None
    assert found.top_ids is not None
    assert found.top_logprobs is not None
    assert found.top_ids.tolist() == top_ids.tolist()
    assert found.top_logprobs.tolist() == (-top_ids).tolist()


def test_a_copy_is_the_same_store(path: Path) -> None:
    teacher = StoredTeacher(path, min_coverage=0.4)
    copy = pickle.loads(pickle.dumps(teacher))
    assert described(copy) == described(teacher) == f"<{teacher.identity}, min_coverage=0.4>"


def test_stores_of_other_numbers_have_other_identities(tmp_path: Path) -> None:
    made = {
        "one": ([row("Yes.")], {"model": "big", "temperature": 1.0}),
        "same": ([row("Yes.")], {"model": "big", "temperature": 1.0}),
        "numbers": ([row("Yes.", first=0.1)], {"model": "big", "temperature": 1.0}),
        "temperature": ([row("Yes.")], {"model": "big", "temperature": 0.6}),
        "teacher": ([row("Yes.")], {"model": "small", "temperature": 1.0}),
        "text": ([row("Yes!")], {"model": "big", "temperature": 1.0}),
    }
    identities = {}
    for name, (rows, facts) in made.items():
        write_store(tmp_path / f"{name}.arrow", rows, facts)
        identities[name] = StoredTeacher(tmp_path / f"{name}.arrow").identity
    assert identities.pop("same") == identities["one"]
    assert len(set(identities.values())) == len(identities)


def test_processed_log_probabilities_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_store(tmp_path / "store.arrow", [row("Yes.")], {"processed": True, "temperature": 0.6})
    with caplog.at_level(logging.WARNING):
        StoredTeacher(tmp_path / "store.arrow")
    assert "temperature 0.6" in caplog.text


def test_other_files_are_refused(tmp_path: Path, path: Path) -> None:
    table = pa.table({"a": [1]})
    pq.write_table(table, tmp_path / "scores.parquet")
    with pa.ipc.new_file(str(tmp_path / "other.arrow"), table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "cut.arrow").write_bytes(path.read_bytes()[:-20])
    old = table.replace_schema_metadata(encode_facts({"kind": "teacher log-probabilities", "schema": 0}))
    with pa.ipc.new_file(str(tmp_path / "old.arrow"), old.schema) as writer:
        writer.write_table(old)
    for name, cure in {
        "nowhere.arrow": "check the path",
        "scores.parquet": "teacher-logprobs",
        "other.arrow": "teacher-logprobs",
        "cut.arrow": "teacher-logprobs",
        "old.arrow": "version 0",
    }.items():
        with pytest.raises(ValueError, match=cure):
            StoredTeacher(tmp_path / name)
    with pytest.raises(ValueError, match="min_coverage"):
        StoredTeacher(path, min_coverage=90)
