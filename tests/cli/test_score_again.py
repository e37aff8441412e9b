"""Running `score` again: never somebody else's scores, and never the same work twice."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
from peft import LoraConfig, get_peft_model

from distill_sampler.artifacts.score_output import ScoreOutput
from tests import tiny
from tests.cli.conftest import Ended, call, rows, write_lines

SMALL_CHUNKS = ("--batch-tokens", 400)
"""Chunks of 64 candidates."""


def score(data: Path, student: Path, output: Path, *more: object) -> Ended:
    return call("score", data, "--model", student, "--output", output, *more)


def ratios(output: Path) -> list[float]:
    found: list[float] = pq.read_table(output)["rank_surprisal_ratio"].to_pylist()
    return found


def tokens_scored(ended: Ended) -> int:
    found = re.search(r"Scored ([\d,]+) tokens", ended.said)
    return int(found[1].replace(",", "")) if found else 0


@contextmanager
def stopped_after(chunks: int) -> Iterator[None]:
    """The user presses Ctrl-C once so many chunks are kept."""
    add = ScoreOutput.add
    kept = []

    def interrupted(self: ScoreOutput, table: Any) -> None:
        add(self, table)
        kept.append(1)
        if len(kept) == chunks:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScoreOutput, "add", interrupted)
        yield


@pytest.fixture
def student(tmp_path: Path, student_path: Path) -> Path:
    """A folder that a test may change."""
    return Path(shutil.copytree(student_path, tmp_path / "student"))


def with_new_weights(student: Path) -> None:
    tiny.model(seed=1).save_pretrained(student)


def with_another_config(student: Path) -> None:
    file = student / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 1e-5}), encoding="utf-8")


def with_another_tokenizer(student: Path) -> None:
    file = student / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    file.write_text(json.dumps(content), encoding="utf-8")


def with_another_template(student: Path) -> None:
    template = tiny.CHATML.replace("{{ '<|im_start|>' +", "{{ ' <|im_start|>' +")
    assert template != tiny.CHATML
    (student / "chat_template.jinja").write_text(template, encoding="utf-8")


CHANGES = {
    "other weights": with_new_weights,
    "another config": with_another_config,
    "another tokenizer": with_another_tokenizer,
    "another chat template": with_another_template,
}


# ---- The model ----


@pytest.mark.parametrize("said", CHANGES)
def test_a_model_that_changed_in_its_folder_is_not_taken_for_the_old_one(
    said: str, tmp_path: Path, student: Path
) -> None:
    data, output = write_lines(tmp_path / "d.jsonl", rows(30)), tmp_path / "s.parquet"
    with stopped_after(1):
        assert score(data, student, output, *SMALL_CHUNKS).code == 1
    before = Path(shutil.copytree(student, tmp_path / "before"))
    CHANGES[said](student)
    unfinished = score(data, student, output, *SMALL_CHUNKS)
    assert (unfinished.code, said in unfinished.said, "--overwrite" in unfinished.said) == (1, True, True), (
        unfinished.said
    )
    assert score(data, before, output, *SMALL_CHUNKS).code == 0, "what was scored is still there for the old one"
    old = ratios(output)
    finished = score(data, student, output, *SMALL_CHUNKS)
    assert (finished.code, said in finished.said, "--overwrite" in finished.said) == (1, True, True), finished.said
    assert ratios(output) == old
    assert score(data, student, output, *SMALL_CHUNKS, "--overwrite").code == 0
    if said == "other weights":
        assert (np.array(ratios(output)) != np.array(old)).all()


def test_an_adapter_is_known_by_its_content(candidates: Path, student: Path, tmp_path: Path) -> None:
    def adapter(seed: int) -> Path:
        model = get_peft_model(tiny.model(seed), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        model.save_pretrained(tmp_path / "lora")
        return tmp_path / "lora"

    output = tmp_path / "s.parquet"
    assert score(candidates, student, output, "--lora", adapter(0)).code == 0
    assert "nothing to do" in score(candidates, student, output, "--lora", tmp_path / "lora").said
    ended = score(candidates, student, output, "--lora", adapter(1))
    assert (ended.code, "adapter" in ended.said, "adapter_model.safetensors" in ended.said) == (1, True, True)
    ended = score(candidates, student, output)
    assert (ended.code, "with --lora" in ended.said) == (1, True)


def test_names_do_not_matter(candidates: Path, student: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.parquet"
    assert score(candidates, student, output).code == 0
    elsewhere = candidates.rename(tmp_path / "elsewhere.jsonl")
    (student / "README.md").write_text("A note.")
    (student / "optimizer.pt").write_bytes(b"x")
    ended = score(elsewhere, student.rename(tmp_path / "moved"), output)
    assert (ended.code, "nothing to do" in ended.said) == (0, True), ended.said


def test_a_model_of_the_hub_is_known_by_its_commit_and_its_files(
    candidates: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def published(commit: str) -> Path:
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit, encoding="utf-8")
        return Path(shutil.copytree(student, repository / "snapshots" / commit, dirs_exist_ok=True))

    first, second = "1" * 40, "2" * 40
    cached, output = published(first), tmp_path / "s.parquet"
    hub = Path("someone/tiny")
    assert score(candidates, hub, output).code == 0
    assert json.loads(pq.read_schema(output).metadata[b"distill_sampler.revision"]) == first
    for same in (hub, student):  # a folder with the same files is the same model
        assert "nothing to do" in score(candidates, same, output).said
    (cached / "vocab.txt").write_text("another tool has fetched this since", encoding="utf-8")
    assert "nothing to do" in score(candidates, hub, output).said
    published(second)
    assert "nothing to do" in score(candidates, hub, output).said, "another commit of the same files"
    with_new_weights(student)
    published(second)
    for change in ((), ("--revision", first)):
        ended = score(candidates, hub, output, *change)
        assert (ended.code, "other weights" in ended.said) == (int(not change), not change), ended.said
    shutil.copy(student / "model.safetensors", cached)
    assert "other weights" in score(candidates, hub, output, "--revision", first).said


# ---- The data ----


class _Hub:
    """A data set on the hub that is a folder here."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.commit: str | None = None
        self.asked: list[str | None] = []
        self._folder = folder
        folder.mkdir()
        self._load = datasets.load_dataset
        patch.setattr(datasets, "load_dataset", self._loaded)
        patch.setattr(huggingface_hub.HfApi, "dataset_info", self._info)

    def holds(self, many: list[Any]) -> None:
        write_lines(self._folder / "train.jsonl", many)

    def _info(self, name: str, **options: Any) -> Any:
        if self.commit is None:
            raise ConnectionError("no network")
        return SimpleNamespace(sha=self.commit)

    def _loaded(self, name: str, *more: Any, revision: str | None, **options: Any) -> Any:
        self.asked.append(revision)
        return self._load(str(self._folder), *more, **options)


def test_a_data_set_of_the_hub_is_known_by_its_commit(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, name, output = _Hub(tmp_path / "hub", monkeypatch), Path("someone/traces"), tmp_path / "s.parquet"
    hub.holds(rows())
    hub.commit = "abc"
    assert score(name, student, output).code == 0
    assert set(hub.asked) == {"abc"}, "what is read is what it is called"
    assert "nothing to do" in score(name, student, output).said
    hub.commit = "def"
    ended = score(name, student, output)
    assert (ended.code, "someone/traces (train) has other content" in ended.said) == (1, True), ended.said


def test_a_hub_that_tells_no_commit_is_matched_by_content(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, name, output = _Hub(tmp_path / "hub", monkeypatch), Path("someone/traces"), tmp_path / "s.parquet"
    many = rows(60)
    hub.holds(many)
    with stopped_after(1):
        score(name, student, output, *SMALL_CHUNKS)
    hub.holds([*many[30:], *many[:30]])
    ended = score(name, student, output, *SMALL_CHUNKS, "--traces", 30)
    assert (ended.code, "not scored again: 64." in ended.said) == (0, True), ended.said
    assert pq.read_table(output)["teacher"].to_pylist() == [row["teacher"] for row in [*many[30:], *many[:30]]]
    ended = score(name, student, output, *SMALL_CHUNKS)
    assert (ended.code, "nothing to do" in ended.said, "did not say" in ended.said) == (0, True, True), ended.said


def test_finished_scores_of_other_data_are_refused(candidates: Path, student: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.parquet"
    assert score(candidates, student, output).code == 0
    text = candidates.read_text(encoding="utf-8")
    candidates.write_text(text.replace("the answer is 8.", "the answer is 9."), encoding="utf-8")
    assert len(candidates.read_bytes()) == len(text)
    ended = score(candidates, student, output)
    assert (ended.code, "candidates.jsonl has other content" in ended.said, "--overwrite" in ended.said) == (
        1,
        True,
        True,
    )
    more = write_lines(tmp_path / "more.jsonl", rows(1))
    ended = call("score", candidates, more, "--model", student, "--output", output)
    assert (ended.code, "2 files" in ended.said) == (1, True)


def broken(many: list[dict[str, Any]], line: int) -> list[Any]:
    return [*many[: line - 1], {**many[line - 1], "response": None}, *many[line:]]


def moved(many: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*many[100:], *many[:100]]


@pytest.mark.parametrize("order", [list, moved], ids=["in place", "rows moved"])
def test_a_repaired_line_costs_what_was_not_scored_and_no_more(
    order: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], tmp_path: Path, student: Path
) -> None:
    many = rows(60)
    data, output = write_lines(tmp_path / "d.jsonl", broken(many, 170)), tmp_path / "s.parquet"
    more = (*SMALL_CHUNKS, "--traces", 60)
    ended = score(data, student, output, *more)
    assert (ended.code, "line 170" in ended.said) == (1, True)
    # the cure that was told, with a teacher's name corrected on the way
    many[3]["teacher"] = "dan"
    write_lines(data, order(many))
    repaired = score(data, student, output, *more)
    assert repaired.code == 0, repaired.said
    assert "not scored again: 128." in repaired.said
    whole = score(data, student, tmp_path / "whole.parquet", *more)
    assert tokens_scored(repaired) < 0.45 * tokens_scored(whole)
    ours, expected = pq.read_table(output), pq.read_table(tmp_path / "whole.parquet")
    assert ours.schema.equals(expected.schema)
    for name in ours.column_names:
        left, right = ours[name], expected[name]
        if name in ("token_surprisals", "mean_surprisal", "rank_surprisal_ratio", "global_naturalness"):
            flat = [np.hstack(column.to_pylist()) for column in (left, right)]
            np.testing.assert_allclose(*flat, rtol=1e-4)  # read in other batches
        else:
            assert left.equals(right), name
    assert not [path.name for path in tmp_path.iterdir() if "parts" in path.name]


def test_data_that_changes_while_it_is_read_is_not_called_finished(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = write_lines(tmp_path / "d.jsonl", rows(30)), tmp_path / "s.parquet"
    add = ScoreOutput.add

    def add_while_data_grows(self: ScoreOutput, table: Any) -> None:
        add(self, table)
        with data.open("a", encoding="utf-8") as lines:
            lines.write("\n")

    with monkeypatch.context() as patch:
        patch.setattr(ScoreOutput, "add", add_while_data_grows)
        ended = score(data, student, output)
    assert (ended.code, "changed while it was read" in ended.said, output.exists()) == (1, True, False), ended.said
    ended = score(data, student, output)
    assert (ended.code, "not scored again: 90." in ended.said) == (0, True), ended.said


def test_a_repaired_run_that_is_stopped_goes_on_too(tmp_path: Path, student: Path) -> None:
    many = rows(60)
    data, output = write_lines(tmp_path / "d.jsonl", broken(many, 130)), tmp_path / "s.parquet"
    assert score(data, student, output, *SMALL_CHUNKS).code == 1
    write_lines(data, broken(many, 170))
    with stopped_after(1):
        assert score(data, student, output, *SMALL_CHUNKS).code == 1
    write_lines(data, many)
    ended = score(data, student, output, *SMALL_CHUNKS)
    assert ended.code == 0, ended.said
    assert "not scored again: 128." in ended.said
    assert pq.read_table(output)["sample"].to_pylist() == list(range(180))
    assert np.isfinite(ratios(output)).all()


def test_an_attempt_that_scored_nothing_is_in_nobodys_way(tmp_path: Path, student: Path) -> None:
    data, output = write_lines(tmp_path / "d.jsonl", broken(rows(2), 5)), tmp_path / "s.parquet"
    assert score(data, student, output, "--max-length", 100).code == 1
    write_lines(data, rows(3))
    with_new_weights(student)
    ended = score(data, student, output, "--max-length", 90, "--metrics", "global_naturalness")
    assert ended.code == 0, ended.said


def test_smaller_batches_keep_what_is_scored(tmp_path: Path, student: Path) -> None:
    data, output = write_lines(tmp_path / "d.jsonl", rows(60)), tmp_path / "s.parquet"
    with stopped_after(2):
        score(data, student, output, *SMALL_CHUNKS)
    ended = score(data, student, output, "--batch-tokens", 200)
    assert (ended.code, "not scored again: 128." in ended.said) == (0, True), ended.said


def test_tokens_that_are_wanted_now_and_were_not_kept_are_read_again(tmp_path: Path, student: Path) -> None:
    data, output = write_lines(tmp_path / "d.jsonl", rows(60)), tmp_path / "s.parquet"
    with stopped_after(1):
        score(data, student, output, *SMALL_CHUNKS, "--traces", 2)
    with stopped_after(1):
        score(data, student, output, *SMALL_CHUNKS, "--traces", 4)
    assert score(data, student, output, *SMALL_CHUNKS, "--traces", 1).code == 0
    kept = [tokens is not None for tokens in pq.read_table(output)["tokens"].to_pylist()]
    assert kept == [True] * 3 + [False] * 177


def test_unfinished_scores_of_quite_other_data_are_not_thrown_away(tmp_path: Path, student: Path) -> None:
    data, output = write_lines(tmp_path / "d.jsonl", rows(30)), tmp_path / "s.parquet"
    with stopped_after(1):
        score(data, student, output, *SMALL_CHUNKS)
    others = [{**row, "response": row["response"] + " So it is."} for row in rows(30)]
    ended = score(write_lines(tmp_path / "other.jsonl", others), student, output, *SMALL_CHUNKS)
    assert (ended.code, "d.jsonl" in ended.said, "--overwrite" in ended.said) == (1, True, True)
    ended = score(data, student, output, *SMALL_CHUNKS)
    assert (ended.code, "not scored again: 64." in ended.said) == (0, True), ended.said


def test_a_damaged_chunk_from_before_a_repair_is_scored_again(tmp_path: Path, student: Path) -> None:
    many = rows(60)
    data, output = write_lines(tmp_path / "d.jsonl", broken(many, 170)), tmp_path / "s.parquet"
    score(data, student, output, *SMALL_CHUNKS)
    chunk = output.with_name("s.parquet.parts") / "0000001.parquet"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    write_lines(data, many)
    ended = score(data, student, output, *SMALL_CHUNKS)
    assert (ended.code, "not scored again: 64." in ended.said) == (0, True), ended.said
    assert np.isfinite(ratios(output)).all()
