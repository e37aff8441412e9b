"""The `score` command: every format gives the same numbers, a kill loses nothing, bad input gets a sentence."""

import gc
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from distill_sampler import GlobalNaturalness, RankSurprisalRatio, ScoredDataset, Scorer
from distill_sampler.artifacts.score_output import ScoreOutput
from distill_sampler.rows import chunks
from tests import tiny
from tests.cli.conftest import call, rows, write_lines

METRICS = ("mean_rank", "mean_surprisal", "rank_surprisal_ratio", "global_naturalness")


def numbers(path: Path) -> np.ndarray[Any, Any]:
    return np.stack([pq.read_table(path)[name].to_numpy() for name in METRICS])


def scoring(data: Path | str, student: Path, output: Path, *more: object) -> tuple[int, str]:
    ended = call("score", data, "--model", student, "--output", output, *more)
    return ended.code, ended.said


def as_written(form: str, folder: Path) -> Path:
    """The same candidates in a format."""
    lines = rows()
    text = "".join(json.dumps(row) + "\n" for row in lines).encode()
    path = folder / {"gz": "d.jsonl.gz", "zst": "d.jsonl.zst", "json": "d.json", "parquet": "d.parquet"}.get(
        form, "d.jsonl"
    )
    chat = [
        {
            **row,
            "messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}],
        }
        for row in lines
    ]
    if form == "gz":
        path.write_bytes(gzip.compress(text))
    elif form == "zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(text)
    elif form == "json":
        path.write_text(json.dumps({"data": lines}), encoding="utf-8")
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(lines), path)
    elif form == "folder":
        (folder / "some").mkdir()
        write_lines(folder / "some" / "a.jsonl", lines[:7])
        write_lines(folder / "some" / "b.jsonl", lines[7:])
        return folder / "some"
    elif form == "saved":
        tiny.candidates().save_to_disk(folder / "saved")
        return folder / "saved"
    elif form == "completion":
        write_lines(path, [{**row, "completion": row["response"], "response": None} for row in lines])
        write_lines(path, [{("completion" if k == "response" else k): v for k, v in row.items()} for row in lines])
    elif form == "messages":
        write_lines(path, [{k: v for k, v in row.items() if k not in ("prompt", "response")} for row in chat])
    elif form == "conversational":
        write_lines(path, [dict(row) for row in tiny.candidates()])
    elif form == "nested":
        write_lines(
            path,
            [
                {
                    "prompt_id": group[0]["prompt_id"],
                    "question": group[0]["prompt"],
                    "candidates": [{"text": row["response"], "teacher": row["teacher"]} for row in group],
                }
                for group in (lines[start : start + 3] for start in range(0, len(lines), 3))
            ],
        )
    elif form == "by teacher":
        write_lines(
            path,
            [
                {
                    "prompt_id": g[0]["prompt_id"],
                    "prompt": g[0]["prompt"],
                    "responses": {r["teacher"]: r["response"] for r in g},
                }
                for g in (lines[start : start + 3] for start in range(0, len(lines), 3))
            ],
        )
    return path


FORMS = ["gz", "zst", "json", "parquet", "folder", "saved", "completion", "messages", "conversational", "nested"]


@pytest.mark.parametrize("form", [*FORMS, "by teacher"])
def test_every_format_of_the_same_candidates_gives_the_same_numbers(
    form: str, tmp_path: Path, student_path: Path, scored: Path
) -> None:
    output = tmp_path / "scores.parquet"
    code, said = scoring(as_written(form, tmp_path), student_path, output)
    assert code == 0, said
    np.testing.assert_array_equal(numbers(output), numbers(scored))
    table = pq.read_table(output)
    for name in ("prompt_id", "teacher"):
        assert table[name].to_pylist() == pq.read_table(scored)[name].to_pylist()


def test_numbers_are_those_of_the_library_on_the_prepared_data(scored: Path, student_path: Path) -> None:
    tok, model = tiny.tokenizer(), tiny.model()
    dataset = ScoredDataset(tiny.tokenised(tiny.candidates(), tok), end_token_ids=[257])
    metrics = [RankSurprisalRatio(), GlobalNaturalness()]
    columns = {name: np.full(len(dataset), np.nan, np.float32) for name in METRICS}
    for block in Scorer(progress=False).score(model, dataset, metrics, np.arange(len(dataset))):
        for name, values in block.columns.items():
            columns[name][block.indices] = values
    np.testing.assert_allclose(numbers(scored), np.stack(list(columns.values())), rtol=1e-5)
    assert pq.read_table(scored)["num_tokens"].to_pylist() == dataset.num_scored.tolist()


def test_the_file_says_what_it_belongs_to_and_carries_the_other_columns(scored: Path, student_path: Path) -> None:
    told = {key.decode(): value.decode() for key, value in pq.read_schema(scored).metadata.items()}
    assert json.loads(told["distill_sampler.model"]) == str(student_path)
    assert "RankSurprisalRatio(rank_clip=100" in told["distill_sampler.metrics"]
    assert len(json.loads(told["distill_sampler.dataset"])) == 16
    assert pq.read_table(scored)["correct"].to_pylist() == [row["correct"] for row in rows()]


def test_kept_tokens_spell_the_response_and_their_means_are_the_scores(scored: Path) -> None:
    for row, source in zip(pq.read_table(scored).to_pylist(), rows(), strict=True):
        assert "".join(row["tokens"]) == source["response"]
        assert row["prompt_text"] == source["prompt"]
        assert np.mean(np.minimum(row["token_ranks"], 100)) == pytest.approx(row["mean_rank"], rel=1e-5)
        assert np.mean(row["token_surprisals"]) == pytest.approx(row["mean_surprisal"], rel=1e-5)


def test_only_so_many_prompts_are_kept_token_by_token(candidates: Path, student_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.parquet"
    scoring(candidates, student_path, output, "--traces", 2)
    assert [tokens is not None for tokens in pq.read_table(output)["tokens"].to_pylist()] == [True] * 6 + [False] * 12


def test_characters_of_several_tokens_are_told_once(tmp_path: Path, student_path: Path) -> None:
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": "smile", "response": "naïve 😀 fin"}])
    scoring(data, student_path, tmp_path / "s.parquet")
    assert "".join(pq.read_table(tmp_path / "s.parquet")["tokens"].to_pylist()[0]) == "naïve 😀 fin"


def test_a_slice_has_every_candidate_of_its_prompts_however_the_file_is_sorted(
    tmp_path: Path, student_path: Path
) -> None:
    by_teacher = sorted(rows(), key=lambda row: row["teacher"])
    data = write_lines(tmp_path / "d.jsonl", by_teacher)
    assert scoring(data, student_path, tmp_path / "s.parquet", "--prompts", 2)[0] == 0
    table = pq.read_table(tmp_path / "s.parquet").select(["prompt_id", "teacher"]).to_pylist()
    assert sorted((row["prompt_id"], row["teacher"]) for row in table) == [
        (f"sum-{prompt}", teacher) for prompt in range(2) for teacher in tiny.TEACHERS
    ]
    ended = call("select", tmp_path / "s.parquet", "--policy", "Shuffle", "--output", tmp_path / "o.jsonl")
    assert (ended.code, len((tmp_path / "o.jsonl").read_text().splitlines())) == (0, 6)


def test_a_data_set_on_the_hub_is_streamed_by_its_name(
    tmp_path: Path, student_path: Path, scored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a folder here: without scripts, one data file a split, two subsets."""
    hub = tmp_path / "hub"
    for subset in ("main", "other"):
        (hub / subset).mkdir(parents=True)
        write_lines(hub / subset / "test.jsonl", rows() if subset == "main" else rows(1))
    (hub / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {s}\n  data_files:\n  - split: test\n    path: {s}/test.jsonl\n" for s in ("main", "other")
        )
        + "---\n",
        encoding="utf-8",
    )
    load = datasets.load_dataset
    asked = []

    def from_folder(name: str, *more: Any, **options: Any) -> Any:
        asked.append(name)
        return load(str(hub), *more, **options)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    output = tmp_path / "s.parquet"
    code, said = scoring("someone/traces", student_path, output, "--split", "test")
    assert code == 1
    assert "loading it from the hub failed" in said
    assert "main" in said, "the subsets that there are"
    more = ("--split", "test", "--subset", "main")
    code, said = scoring("someone/traces", student_path, output, *more, "--overwrite")
    assert code == 0, said
    np.testing.assert_array_equal(numbers(output), numbers(scored))
    ended = call("select", output, "--policy", "KeepTop(rank_surprisal_ratio, num=3)", "--output", tmp_path / "o.jsonl")
    assert (ended.code, len((tmp_path / "o.jsonl").read_text().splitlines())) == (0, 3), ended.said
    assert set(asked) == {"someone/traces"}


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, student_path: Path) -> None:
    """What a chunk leaves behind is nothing: Python objects at each chunk's end, by the tenth as by the second."""
    data = write_lines(tmp_path / "d.jsonl", rows(120))
    counts = []
    add = ScoreOutput.add

    def counted(self: ScoreOutput, table: pa.Table) -> None:
        add(self, table)
        gc.collect()
        counts.append(len(gc.get_objects()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScoreOutput, "add", counted)
        assert scoring(data, student_path, tmp_path / "s.parquet", "--batch-tokens", 256, "--traces", 2)[0] == 0
    assert len(counts) >= 5
    assert max(counts[2:]) - counts[1] < 200, counts


# ---- Going on ----


def test_an_interrupted_run_goes_on_and_ends_with_the_same_file(
    tmp_path: Path, student_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_lines(tmp_path / "d.jsonl", rows(60))
    whole, pieces = tmp_path / "whole.parquet", tmp_path / "pieces.parquet"
    more = ("--batch-tokens", 400)
    assert scoring(data, student_path, whole, *more)[0] == 0
    add = ScoreOutput.add
    calls = []

    def interrupted(self: ScoreOutput, table: pa.Table) -> None:
        add(self, table)
        calls.append(1)
        if len(calls) in (1, 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(ScoreOutput, "add", interrupted)
    code, said = scoring(data, student_path, pieces, *more)
    assert (code, "64 candidates are kept. Run the same command again" in said) == (1, True)
    code, said = scoring(data, student_path, pieces, *more)
    assert (code, "Continuing after 64" in said) == (1, True)
    assert scoring(data, student_path, pieces, *more)[0] == 0
    assert len(calls) == 3
    assert pieces.read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "pieces" in path.name] == ["pieces.parquet"]


def test_going_on_with_other_settings_is_refused(
    candidates: Path, student_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: ScoreOutput, metadata: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "scores.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(ScoreOutput, "join", killed)
        scoring(candidates, student_path, output)
    code, said = scoring(candidates, student_path, output, "--max-length", 100)
    assert code == 1
    assert "was made with max_length = None, now it is 100" in said
    assert "--overwrite" in said
    assert scoring(candidates, student_path, output)[0] == 0
    assert "nothing to do" in scoring(candidates, student_path, output)[1]
    assert scoring(candidates, student_path, output, "--max-length", 100)[0] == 1
    assert scoring(candidates, student_path, output, "--max-length", 100, "--overwrite")[0] == 0


@pytest.mark.slow
def test_a_killed_process_goes_on_and_ends_with_the_same_file(tmp_path: Path, student_path: Path) -> None:
    data = write_lines(tmp_path / "d.jsonl", rows(600))

    def command_line(output: Path) -> list[str]:
        code = "from distill_sampler.cli import app; app()"
        options = ["--model", str(student_path), "--output", str(output), "--batch-tokens", "256"]
        return [sys.executable, "-c", code, "score", str(data), *options]

    pieces = tmp_path / "pieces.parquet"
    for _ in range(3):
        process = subprocess.Popen(command_line(pieces), stderr=subprocess.DEVNULL)
        parts = pieces.with_name("pieces.parquet.parts")
        before = len(list(parts.glob("*.parquet")))
        deadline = time.monotonic() + 120
        while len(list(parts.glob("*.parquet"))) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    for output in (pieces, tmp_path / "whole.parquet"):
        subprocess.run(command_line(output), check=True, stderr=subprocess.DEVNULL)
    assert pieces.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path: Path, student_path: Path) -> None:
    data = write_lines(tmp_path / "d.jsonl", rows(60))
    arguments = ["score", str(data), "--model", str(student_path), "--device", "cpu", "--batch-tokens", "512"]
    code = f"import sys; sys.argv[1:] = {arguments} + sys.argv[1:]\nfrom distill_sampler.cli import app; app()"
    (tmp_path / "run.py").write_text(code, encoding="utf-8")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    for output, prefix in ((tmp_path / "two.parquet", launch), (tmp_path / "one.parquet", [sys.executable])):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        script = [*prefix, str(tmp_path / "run.py"), "--output", str(output)]
        subprocess.run(script, check=True, env=environment, timeout=300)
    np.testing.assert_allclose(numbers(tmp_path / "two.parquet"), numbers(tmp_path / "one.parquet"), rtol=1e-5)
    one, two = (pq.read_table(tmp_path / f"{name}.parquet")["tokens"].to_pylist() for name in ("one", "two"))
    assert one == two


# ---- Bad input ----


def bad(line: str) -> list[bytes]:
    good = [json.dumps(row).encode() for row in rows(2)]
    return [good[0], line.encode(), *good[1:]]


BAD_LINES = {
    "it is not JSON": '{"prompt": "a", ',
    "it is a list, not an object": "[1, 2]",
    "the response is empty": json.dumps({"prompt": "a", "response": " "}),
    "the response is missing, not text": json.dumps({"prompt": "a", "response": None}),
    "the response is a number, not text": json.dumps({"prompt": "a", "response": 3}),
    "it has no column 'response' (only prompt, text), unlike the first row": json.dumps({"prompt": "a", "text": "b"}),
    "half a surrogate pair": '{"prompt": "a", "response": "\\ud800 b"}',
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_stops_with_its_number_and_reason_or_is_left_out_and_counted(
    reason: str, tmp_path: Path, student_path: Path
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_bytes(b"\n".join(bad(BAD_LINES[reason])) + b"\n")
    code, said = scoring(data, student_path, tmp_path / "s.parquet")
    assert code == 1
    assert "d.jsonl, line 2" in said
    assert reason in said
    assert "--on-error skip" in said
    code, said = scoring(data, student_path, tmp_path / "s.parquet", "--on-error", "skip")
    assert code == 0, said
    assert "bad rows, left out: 1." in said
    assert pq.read_metadata(tmp_path / "s.parquet").num_rows == 6


def test_a_cut_off_gzip_keeps_what_could_be_read(tmp_path: Path, student_path: Path) -> None:
    data = tmp_path / "d.jsonl.gz"
    noise = [{**row, "note": os.urandom(400).hex()} for row in rows(20)]
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in noise).encode())
    data.write_bytes(whole[: len(whole) // 2])
    code, said = scoring(data, student_path, tmp_path / "s.parquet")
    assert code == 1
    assert "the file is cut off or damaged" in said
    code, said = scoring(data, student_path, tmp_path / "s.parquet", "--on-error", "skip")
    assert code == 0, said
    assert 0 < pq.read_metadata(tmp_path / "s.parquet").num_rows < 60


def test_a_column_that_changes_its_kind_is_told(
    tmp_path: Path, student_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "ROWS_TO_SETTLE", 100)
    many = rows(60)
    many[150]["correct"] = "yes"
    data = write_lines(tmp_path / "d.jsonl", many)
    code, said = scoring(data, student_path, tmp_path / "s.parquet", "--batch-tokens", 400)
    assert code == 1
    assert "line 151: 'correct' is 'yes', but in the first rows it is a bool" in said


def test_candidates_that_repeat_word_for_word_are_counted(tmp_path: Path, student_path: Path) -> None:
    data = write_lines(tmp_path / "d.jsonl", [*rows(2), rows(2)[0]])
    assert "repeat another word for word; each counts: 1." in scoring(data, student_path, tmp_path / "s.parquet")[1]


def test_an_id_that_stands_for_two_prompts_and_a_missing_teacher_are_told(tmp_path: Path, student_path: Path) -> None:
    many = rows(3)
    many[0]["prompt"], many[4]["teacher"] = "Something else?", None
    data = write_lines(tmp_path / "d.jsonl", many)
    assert scoring(data, student_path, tmp_path / "s.parquet")[0] == 0
    said = call("teachers", tmp_path / "s.parquet").said
    assert "Different prompts share 1 value of 'prompt_id' (for example 'sum-0')" in said
    assert "1 responses do not name their teacher; they are not ranked" in said
    assert "None" not in said


def test_a_folder_that_mixes_schemas_is_told_where(tmp_path: Path, student_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "a.jsonl", rows(2))
    write_lines(tmp_path / "data" / "b.jsonl", [{"question": "a", "answer": "b"}])
    code, said = scoring(tmp_path / "data", student_path, tmp_path / "s.parquet")
    assert (code, "b.jsonl, line 1: it has no column 'prompt' (only question, answer)" in said) == (1, True), said
    code, said = scoring(tmp_path / "data", student_path, tmp_path / "s.parquet", "--on-error", "skip")
    assert (code, "bad rows, left out: 1." in said) == (0, True)


def test_a_response_that_max_length_cuts_off_has_no_score_and_is_counted(
    candidates: Path, student_path: Path, tmp_path: Path
) -> None:
    code, said = scoring(candidates, student_path, tmp_path / "s.parquet", "--max-length", 90)
    assert code == 0
    code, said = scoring(candidates, student_path, tmp_path / "t.parquet", "--max-length", 10)
    assert "without a score, because --max-length cut off all of their response: 18." in said


def test_traces_longer_than_the_student_reads_are_ranked_by_what_can_be_had(candidates: Path, tmp_path: Path) -> None:
    tiny.model(max_position_embeddings=52).save_pretrained(tmp_path / "student")
    tiny.tokenizer().save_pretrained(tmp_path / "student")
    metrics = ("--metrics", "rank_surprisal_ratio,LocalNaturalness(window=0,min_tokens=1,max_tokens=8)")
    code, said = scoring(candidates, tmp_path / "student", tmp_path / "s.parquet", *metrics)
    assert code == 0, said
    assert "candidates without some score, because the student has too few positions for them: 18." in said
    table = pq.read_table(tmp_path / "s.parquet")
    assert np.isnan(table["rank_surprisal_ratio"].to_numpy()).all()
    assert np.isfinite(table["local_naturalness"].to_numpy()).any()
    ended = call("teachers", tmp_path / "s.parquet")
    assert ended.code == 0, ended.said
    assert "first by local naturalness" in ended.said
    ended = call("report", tmp_path / "s.parquet", "--output", tmp_path / "r.html")
    assert ended.code == 0, ended.said


def test_scores_that_nobody_has_are_kept_and_said(candidates: Path, tmp_path: Path) -> None:
    tiny.model(max_position_embeddings=52).save_pretrained(tmp_path / "student")
    tiny.tokenizer().save_pretrained(tmp_path / "student")
    code, said = scoring(candidates, tmp_path / "student", tmp_path / "s.parquet")
    assert code == 0
    assert "note: No sample has a rank_surprisal_ratio: there is nothing to rank." in said
    assert "The scores are in" in said


def test_without_a_teacher_column_the_cure_is_named(tmp_path: Path, student_path: Path) -> None:
    data = write_lines(
        tmp_path / "d.jsonl", [{"prompt": row["prompt"], "response": row["response"]} for row in rows(2)]
    )
    code, said = scoring(data, student_path, tmp_path / "s.parquet")
    assert (code, "--teacher-column" in said) == (0, True)
    ended = call("teachers", tmp_path / "s.parquet")
    assert ended.code == 1
    assert "--teacher-column" in ended.said


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    tok = tiny.tokenizer()
    tok.chat_template = None
    tok.save_pretrained(tmp_path / "student")
    tiny.model().save_pretrained(tmp_path / "student")
    code, said = scoring(as_written("messages", tmp_path), tmp_path / "student", tmp_path / "s.parquet")
    assert (code, "has no chat template" in said, "--chat-template" in said) == (1, True, True)
    code, said = scoring(
        write_lines(tmp_path / "t.jsonl", rows()), tmp_path / "student", tmp_path / "s.parquet", "--overwrite"
    )
    assert (code, "Template: none" in said) == (0, True)
    (tmp_path / "chatml.jinja").write_text(tiny.CHATML, encoding="utf-8")
    more = ("--chat-template", tmp_path / "chatml.jinja", "--overwrite")
    assert scoring(as_written("messages", tmp_path), tmp_path / "student", tmp_path / "s.parquet", *more)[0] == 0


SMALL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_a_model_that_is_no_causal_language_model_is_refused(candidates: Path, tmp_path: Path) -> None:
    students = {
        "bert": BertForMaskedLM(BertConfig(**SMALL, initializer_range=0.5)),
        "t5": T5ForConditionalGeneration(
            T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
    }
    for name, model in students.items():
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
        code, said = scoring(candidates, tmp_path / name, tmp_path / "s.parquet")
        assert (code, "is not a causal language model" in said) == (1, True), said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.jsonl"], "There is no file or folder nowhere.jsonl"),
        (["DATA", "--output", "scores.csv"], "give a name that ends in .parquet"),
        (["DATA", "--output", "/proc/none/scores.parquet"], "cannot be written"),
        (["DATA", "--output", "."], "is a folder; give the name of a file in it"),
        (["DATA", "--model", "./nowhere"], "There is no model folder ./nowhere"),
        (["DATA", "--metrics", "rank_suprisal_ratio"], "Did you mean 'rank_surprisal_ratio'?"),
        (["DATA", "--metrics", "RankSurprisalRatio(clip=3)"], "Its arguments: rank_clip=100"),
        (["DATA", "--rank-clip", "0"], "ranks start at 1"),
        (["DATA", "--device", "tpu9"], "--device tpu9"),
        (["DATA", "--dtype", "int3"], "choose one of"),
        (["DATA", "--response-column", "reply"], "--response-column: the data has no column 'reply'"),
        (["EMPTY"], "There are no rows"),
        (["UNKNOWN"], "looks like a prompt with a response"),
        (["DATA", "--max-length", "1"], "--max-length 1: a prompt and a response"),
    ],
)
def test_refusals_are_one_sentence_with_the_cure(
    arguments: list[str], sentence: str, candidates: Path, student_path: Path, tmp_path: Path
) -> None:
    empty, unknown = tmp_path / "empty.jsonl", write_lines(tmp_path / "u.jsonl", [{"a": 1}])
    empty.touch()
    named = {"DATA": str(candidates), "EMPTY": str(empty), "UNKNOWN": str(unknown)}
    defaults = {"--model": student_path, "--output": tmp_path / "s.parquet"}
    more = [str(part) for name, value in defaults.items() if name not in arguments for part in (name, value)]
    ended = call("score", *(named.get(argument, argument) for argument in arguments), *more)
    assert ended.code == 1
    assert sentence in ended.said
    assert ended.said.count("Error:") == 1


# ---- Options ----


def test_options_come_from_a_file_and_what_is_typed_wins(candidates: Path, student_path: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {student_path}\nmax-length: 60\ntraces: 1\noutput: {tmp_path / 'a.parquet'}\n")
    ended = call("score", candidates, "--config", config, "--max-length", 80)
    assert ended.code == 0, ended.said
    told = pq.read_schema(tmp_path / "a.parquet").metadata
    assert json.loads(told[b"distill_sampler.max_length"]) == 80
    assert json.loads(told[b"distill_sampler.traces"]) == 1
    config.write_text("modle: x\n")
    ended = call("score", candidates, "--config", config)
    assert (ended.code, "Did you mean 'model'?" in ended.said) == (2, True)


def test_help_reads_no_heavy_library() -> None:
    code = "import sys\nfrom distill_sampler.cli import app\ntry: app(['score', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'transformers', 'trl', 'datasets', 'plotly', 'jinja2'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--batch-tokens" in done.stdout


@pytest.mark.slow
def test_the_real_student_scores_real_traces(student_folder: Path, shared: Path, tmp_path: Path) -> None:
    data = shared / "data" / "zeroeval_gsm_open_permissive.jsonl.gz"
    code, said = scoring(data, student_folder, tmp_path / "s.parquet", "--prompts", 2)
    assert code == 0, said
    assert np.isfinite(numbers(tmp_path / "s.parquet")).all()
