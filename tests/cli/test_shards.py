"""`score --shard` and `merge`: shards join to the file of one process, and a killed shard loses nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_sampler import score_rows
from distill_sampler.rows import chunks
from distill_sampler.serialize import decode_facts
from tests import tiny
from tests.cli.conftest import Ended, call, rows, write_lines

SCORES = ("mean_rank", "mean_surprisal", "rank_surprisal_ratio", "global_naturalness")
TRACES = ("token_ranks", "token_surprisals")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    many = rows(40)  # 120 rows: shards of 48, 40 and 32
    many[100]["correct"] = None
    return write_lines(tmp_path_factory.mktemp("data") / "d.jsonl", many)


@pytest.fixture(scope="module")
def whole(data: Path, student_path: Path) -> Path:
    output = data.with_name("whole.parquet")
    assert call("score", data, "--model", student_path, "--output", output).code == 0
    return output


@pytest.fixture(scope="module")
def shards(data: Path, student_path: Path) -> Path:
    folder = data.with_name("shards")
    for number in (2, 3, 1):
        ended = shard(data, student_path, folder, f"{number}/3")
        assert ended.code == 0, ended.said
    return folder


def shard(data: Path, student: Path, folder: Path, which: str, *more: object) -> Ended:
    return call("score", data, "--model", student, "--output", folder / "s.parquet", "--shard", which, *more)


def require_one_table(ours: pa.Table, expected: pa.Table) -> None:
    """The tables are equal, and the scores to 1e-6, because other batches round differently."""
    assert ours.schema.equals(expected.schema)
    for name in expected.column_names:
        if name in (*SCORES, *TRACES):
            flat = [pa.array(t[name].combine_chunks()) for t in (ours, expected)]
            values = [each.flatten() if pa.types.is_list(each.type) else each for each in flat]
            # the rank of a single token may move by one where two logits are equal but for their last bits
            close = {"rtol": 0, "atol": 1} if name == "token_ranks" else {"rtol": 1e-6, "atol": 1e-6}
            np.testing.assert_allclose(*(each.to_numpy(zero_copy_only=False) for each in values), **close)
        else:
            assert ours[name].to_pylist() == expected[name].to_pylist(), name


def test_shards_join_to_the_file_of_one_process(
    shards: Path, whole: Path, data: Path, student_path: Path, tmp_path: Path
) -> None:
    assert sorted(path.name for path in shards.glob("*.parquet")) == [f"s-{n}-of-3.parquet" for n in (1, 2, 3)]
    ended = call("merge", *sorted(shards.glob("*.parquet"), reverse=True), "--output", tmp_path / "joined.parquet")
    assert ended.code == 0, ended.said
    ours, expected = pq.read_table(tmp_path / "joined.parquet"), pq.read_table(whole)
    require_one_table(ours, expected)
    facts = [decode_facts(table.schema.metadata) for table in (ours, expected)]
    assert facts[0] == facts[1]
    again = call("score", data, "--model", student_path, "--output", tmp_path / "joined.parquet")
    assert "nothing to do" in again.said, "it is the file of one process in every respect"


def test_shards_leave_out_what_one_process_leaves_out(tmp_path: Path, student_path: Path) -> None:
    some: list[Any] = rows(20)
    some[7]["response"] = ""  # no candidate
    some[20] = "no row"
    some[33]["correct"] = "yes"  # a candidate whose column does not fit the others
    for row in some[40:]:
        row.pop("correct")
    data, more = write_lines(tmp_path / "d.jsonl", some), ("--on-error", "skip", "--prompts", 17)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "ROWS_TO_SETTLE", 30)
        for number in (1, 2):
            ended = shard(data, student_path, tmp_path, f"{number}/2", *more)
            assert ended.code == 0, ended.said
        ended = call("score", data, "--model", student_path, "--output", tmp_path / "whole.parquet", *more)
        assert (ended.code, "bad rows, left out: 3" in ended.said) == (0, True), ended.said
    ended = call("merge", *tmp_path.glob("s-?-of-2.parquet"), "--output", tmp_path / "joined.parquet")
    assert ended.code == 0, ended.said
    require_one_table(*(pq.read_table(tmp_path / f"{name}.parquet") for name in ("joined", "whole")))


def test_each_shard_has_its_share(shards: Path) -> None:
    assert [pq.read_metadata(path).num_rows for path in sorted(shards.glob("*.parquet"))] == [48, 40, 32]


def test_there_may_be_more_shards_than_rows(tmp_path: Path, student_path: Path) -> None:
    data = write_lines(tmp_path / "d.jsonl", rows(1))
    for number in (1, 2):
        ended = shard(data, student_path, tmp_path, f"{number}/2")
        assert ended.code == 0, ended.said
    assert pq.read_metadata(tmp_path / "s-2-of-2.parquet").num_rows == 0
    assert call(
        "merge", tmp_path / "s-1-of-2.parquet", tmp_path / "s-2-of-2.parquet", "--output", tmp_path / "j.parquet"
    )
    assert pq.read_table(tmp_path / "j.parquet")["sample"].to_pylist() == [0, 1, 2]


def test_columns_have_the_types_that_one_process_gives_them(tmp_path: Path, student_path: Path) -> None:
    some = [{**row, "grade": number if number < 20 else number / 8} for number, row in enumerate(rows(10))]
    data = write_lines(tmp_path / "d.jsonl", some)
    for number in (1, 2):
        assert shard(data, student_path, tmp_path, f"{number}/2").code == 0
    assert call(
        "merge", tmp_path / "s-1-of-2.parquet", tmp_path / "s-2-of-2.parquet", "--output", tmp_path / "j.parquet"
    )
    assert pq.read_table(tmp_path / "j.parquet")["grade"].to_pylist() == [row["grade"] for row in some]


def test_other_files_are_joined_one_after_the_other(tmp_path: Path, student_path: Path) -> None:
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    some = rows(4)
    for number, part in enumerate((some[:5], some[5:])):
        part = [{**row, "grade": 1 if number else 0.5} for row in part]
        pq.write_table(score_rows(student_path, part, progress=False), pieces / f"{number}.parquet")
    assert call("merge", pieces, "--output", tmp_path / "joined.parquet").code == 0
    joined = pq.read_table(tmp_path / "joined.parquet")
    assert joined["sample"].to_pylist() == list(range(12))
    assert joined["grade"].to_pylist() == [0.5] * 5 + [1.0] * 7
    assert joined["teacher"].to_pylist() == [row["teacher"] for row in some]
    assert call("teachers", tmp_path / "joined.parquet").code == 0


def test_what_does_not_belong_together_is_not_joined(
    tmp_path: Path, shards: Path, data: Path, whole: Path, student_path: Path
) -> None:
    one, two, three = sorted(shards.glob("*.parquet"))
    tiny.model(1).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    shard(data, tmp_path / "other", tmp_path, "3/3")
    shard(write_lines(tmp_path / "d.jsonl", rows(39)), student_path, tmp_path / "data", "3/3")
    pq.write_table(pa.table({"sample": [0]}), tmp_path / "none.parquet")
    for files, sentence in (
        ((one, three), "Of 3 shards, 2 are missing. Score them with `distill-sampler score --shard 2/3`"),
        ((one, two, two, three), "are the same shard"),
        ((one, two, tmp_path / "s-3-of-3.parquet"), "not comparable (weights: was"),
        ((one, two, tmp_path / "data" / "s-3-of-3.parquet"), "shards of other data"),
        ((one, two, three, whole), "no shard"),
        ((one, tmp_path / "none.parquet"), "does not say which student"),
        ((tmp_path / "nowhere",), "nowhere"),
        ((tmp_path / "out.parquet", one, two, three), "is one of the files"),
    ):
        pq.write_table(pq.read_table(one), tmp_path / "out.parquet")
        ended = call("merge", *files, "--output", tmp_path / "out.parquet", "--overwrite")
        assert (ended.code, sentence in ended.said) == (1, True), ended.said
    ended = call("merge", one, two, three, "--output", tmp_path / "out.parquet")
    assert (ended.code, "--overwrite" in ended.said) == (1, True), ended.said


@pytest.mark.parametrize(("which", "cure"), [("0/3", "1/3"), ("4/3", "1/3"), ("3", "3/64"), ("a/3", "3/64")])
def test_a_shard_that_there_is_not_is_refused(
    which: str, cure: str, data: Path, student_path: Path, tmp_path: Path
) -> None:
    ended = shard(data, student_path, tmp_path, which)
    assert (ended.code, f"--shard {which}" in ended.said, cure in ended.said) == (1, True, True), ended.said


@pytest.mark.slow
def test_a_killed_shard_loses_nothing(shards: Path, data: Path, student_path: Path, tmp_path: Path) -> None:
    arguments: list[Any] = ["score", data, "--model", student_path, "--output", tmp_path / "s.parquet"]
    arguments += ["--shard", "1/3", "--batch-tokens", "300"]
    command = [sys.executable, "-c", "from distill_sampler.cli import app; app()", *map(str, arguments)]
    parts = tmp_path / "s-1-of-3.parquet.parts"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not list(parts.glob("[0-9]*.parquet")):
            assert process.poll() is None, "it was over before it could be killed"
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("[0-9]*.parquet")}
    ended = call(*arguments)
    assert (ended.code, "Continuing after" in ended.said) == (0, True), ended.said
    assert kept
    ours, expected = (pq.read_table(folder / "s-1-of-3.parquet") for folder in (tmp_path, shards))
    require_one_table(ours, expected)
