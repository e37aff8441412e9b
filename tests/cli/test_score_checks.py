"""What `score` says before it loads a model, what it never runs, and what it does with names that are its own."""

import importlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import dynamic_module_utils

import distill_sampler
from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.policies import BestOf
from distill_sampler.protocols import Metric
from distill_sampler.sources.candidates import Layout, read_candidates
from distill_sampler.sources.files import Sources
from distill_sampler.types import Sample, TokenStats
from tests import tiny
from tests.cli.conftest import Ended, call, rows, write_lines
from tests.cli.test_score_again import stopped_after


def score(data: Path, student: Path, output: Path, *more: object) -> Ended:
    return call("score", data, "--model", student, "--output", output, *more)


def test_the_version_is_told() -> None:
    ended = call("--version")
    assert (ended.code, ended.said.strip()) == (0, f"distill-sampler {distill_sampler.__version__}")


# ---- Names ----

OURS = [
    "sample",
    "length",
    "epoch",
    "step",
    "content_hash",
    "tokens",
    "rank_surprisal_ratio",
    "global_naturalness_missing",
]


def test_columns_of_the_user_that_are_called_like_ours_are_kept_and_said(tmp_path: Path, student_path: Path) -> None:
    many = [{**row, **{name: f"{name} {number}" for name in OURS}} for number, row in enumerate(rows(60))]
    data, output = write_lines(tmp_path / "d.jsonl", many), tmp_path / "s.parquet"
    small = ("--batch-tokens", 400)
    ended = score(data, student_path, tmp_path / "whole.parquet", *small)
    assert ended.code == 0, ended.said
    table = pq.read_table(tmp_path / "whole.parquet")
    for name in OURS:
        assert table[f"{name}_in_data"].to_pylist() == [row[name] for row in many]
        assert f"'{name}' as '{name}_in_data'" in ended.said
    assert table["sample"].to_pylist() == list(range(180))
    with stopped_after(1):
        score(data, student_path, output, *small)
    assert "'step' as 'step_in_data'" in score(data, student_path, output, *small).said
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_prompts_and_teachers_may_stand_in_columns_called_like_ours(tmp_path: Path, student_path: Path) -> None:
    """As in the published data, where `sample` is the number of a problem."""
    many = [{**row, "sample": row["prompt_id"], "step": row["teacher"]} for row in rows(6)]
    many = [{name: value for name, value in row.items() if name not in ("prompt_id", "teacher")} for row in many]
    data, output = write_lines(tmp_path / "d.jsonl", many), tmp_path / "s.parquet"
    ended = score(data, student_path, output, "--group-column", "sample", "--teacher-column", "step")
    assert ended.code == 0, ended.said
    table = pq.read_table(output)
    assert table["sample"].to_pylist() == list(range(18))
    assert table["sample_in_data"].to_pylist() == [row["sample"] for row in many]
    scores = Scores.open(output)
    assert (scores.group, scores.teacher) == ("sample_in_data", "step_in_data")
    assert len(scores.choose([BestOf("rank_surprisal_ratio", per="sample")]).plan) == 6
    selected = tmp_path / "o.jsonl"
    ended = call("select", output, "--policy", "BestOf(rank_surprisal_ratio, per=sample)", "--output", selected)
    assert ended.code == 0, ended.said
    chosen = [json.loads(line) for line in selected.read_text(encoding="utf-8").splitlines()]
    assert sorted(row["sample"] for row in chosen) == sorted({row["sample"] for row in many})


def test_a_training_set_keeps_columns_that_are_called_like_its_own(tmp_path: Path, student_path: Path) -> None:
    many = [
        {**row, "weight": number, "completion": "short", "rank_surprisal_ratio": "x"}
        for number, row in enumerate(rows(2))
    ]
    data, output = write_lines(tmp_path / "d.jsonl", many), tmp_path / "s.parquet"
    score(data, student_path, output, "--response-column", "response")
    ended = call("select", output, "--policy", "Shuffle", "--output", tmp_path / "o.jsonl")
    assert ended.code == 0, ended.said
    for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert (row["completion_in_data"], row["rank_surprisal_ratio_in_data"]) == ("short", "x")
        assert many[row["weight_in_data"]]["response"] == row["completion"][0]["content"]
        assert isinstance(row["rank_surprisal_ratio"], float)


# ---- Code of a model ----

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_only_when_the_user_says_so(
    tmp_path: Path, candidates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, marker = tmp_path / "student", tmp_path / "it-ran"
    tiny.model().save_pretrained(student)
    tiny.tokenizer().save_pretrained(student)
    (student / "own.py").write_text(CODE.format(marker=str(marker)), encoding="utf-8")
    config = json.loads((student / "config.json").read_text(encoding="utf-8"))
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (student / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}), encoding="utf-8")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    for command in (("score", candidates, "--output", tmp_path / "s.parquet"), ("doctor", "--seconds", 0)):
        ended = call(*command, "--model", student, "--device", "cpu")
        assert (ended.code, "--trust-remote-code" in ended.said) == (1, True), ended.said
        assert not marker.exists()
    ended = score(candidates, student, tmp_path / "s.parquet", "--trust-remote-code")
    assert ended.code == 0, ended.said
    assert marker.exists()
    (student / "own.py").write_text((student / "own.py").read_text(encoding="utf-8") + "\n# edited\n", encoding="utf-8")
    ended = score(candidates, student, tmp_path / "s.parquet", "--trust-remote-code")
    assert (ended.code, "own.py" in ended.said) == (1, True), ended.said


# ---- Before the model is loaded ----


@dataclass(frozen=True, kw_only=True)
class Agreement(Metric):
    """Reads a column of lists."""

    name: str = "agreement"

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return ("votes",)

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        return {self.name: float(sum(sample.columns["votes"]))}


@pytest.fixture
def agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--metrics` gives a metric that reads a column, whatever it says."""
    module = importlib.import_module("distill_sampler.cli.score")  # the command of that name hides it
    monkeypatch.setattr(module, "parse_metrics", lambda text, **settings: [Agreement()])


def test_metrics_read_columns_of_any_kind(tmp_path: Path, student_path: Path, agreement: None) -> None:
    many = [{**row, "votes": [number, 1]} for number, row in enumerate(rows(60))]
    data, output = write_lines(tmp_path / "d.jsonl", many), tmp_path / "s.parquet"
    ended = score(data, student_path, output)
    assert ended.code == 0, ended.said
    assert pq.read_table(output)["agreement"].to_pylist() == [number + 1.0 for number in range(180)]
    assert "votes" not in pq.read_table(output).column_names, "lists are not carried along"
    ended = call("select", output, "--policy", "Shuffle", "--output", tmp_path / "o.jsonl")
    assert ended.code == 0, ended.said
    # what a metric reads belongs to the content: another value is another score
    (tmp_path / "s.parquet").unlink()
    with stopped_after(1):
        score(data, student_path, output, "--batch-tokens", 400)
    many[5]["votes"] = [99]
    write_lines(data, many)
    ended = score(data, student_path, output, "--batch-tokens", 400)
    assert (ended.code, "not scored again: 63." in ended.said) == (0, True), ended.said
    assert pq.read_table(output)["agreement"].to_pylist()[5] == 99.0


def test_what_the_template_writes_belongs_to_the_content(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    data = write_lines(tmp_path / "d.jsonl", [rows(1)[0], {**rows(1)[0], "tools": tools}, rows(1)[0]])
    hashes = [each.content_hash for each in read_candidates(Sources([str(data)]), Layout())]  # type: ignore[union-attr]
    assert (hashes[0] == hashes[2], hashes[0] == hashes[1]) == (True, False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--output", "/proc/none/scores.parquet"], "cannot be written"),
        (["--metrics", "rank_surprisal_ratio,RankSurprisalRatio(rank_clip=5)"], "Two metrics give the same numbers"),
        (["--response-column", "reply"], "the data has no column 'reply'"),
        (["--chat-template", "nowhere.jinja"], "--chat-template nowhere.jinja: there is no such file"),
        (["--dtype", "int3"], "--dtype int3"),
        (["--lora", "nowhere"], "--lora nowhere"),
        (["BROKEN"], "line 1"),
        (["MESSAGES"], "--chat-template FILE"),
        (["MESSAGES", "--plain"], "Leave --plain out"),
    ],
)
def test_what_can_be_refused_without_the_model_is_refused_without_it(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    candidates: Path,
    student_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = Path(shutil.copytree(student_path, tmp_path / "student"))
    for weights in student.glob("*.safetensors"):
        weights.write_bytes(b"no weights")  # loading it would fail with another sentence
    (student / "chat_template.jinja").unlink()
    broken = write_lines(tmp_path / "broken.jsonl", [{"prompt": "a", "response": ""}, *rows(1)])
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    named = {"BROKEN": str(broken), "MESSAGES": str(write_lines(tmp_path / "chat.jsonl", chat))}
    data = named.get(arguments[0], str(candidates))
    more = [argument for argument in arguments if argument not in named]
    output = () if "--output" in more else ("--output", tmp_path / "s.parquet")
    ended = call("score", data, "--model", student, *output, *more)
    assert (ended.code, sentence in ended.said) == (1, True), ended.said


def test_a_column_that_a_metric_reads_is_missed_before_the_model_is_loaded(
    tmp_path: Path, candidates: Path, agreement: None
) -> None:
    ended = score(candidates, tmp_path / "no-model", tmp_path / "s.parquet")
    assert (ended.code, "the column 'votes'" in ended.said) == (1, True), ended.said
    data = write_lines(tmp_path / "d.jsonl", [{**rows(1)[0], "votes": [1]}, *rows(1)])
    ended = score(data, tmp_path / "no-model", tmp_path / "s.parquet")
    assert "There is no model folder" in ended.said or "cannot be loaded" in ended.said
