"""datatrove and Ray, the real packages: their tables are the command line's, and a killed task loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import call, rows, write_lines
from tests.rows.test_score_rows import SCORES

LINES = [{**row, "id": str(number)} for number, row in enumerate(rows(24))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 candidates in four files."""
    folder = tmp_path_factory.mktemp("clusters") / "candidates"
    folder.mkdir()
    for number in range(4):
        write_lines(folder / f"{number}.jsonl", LINES[18 * number : 18 * number + 18])
    return folder


@pytest.fixture(scope="module")
def by_command(data: Path, student_path: Path) -> pa.Table:
    output = data.with_name("scores.parquet")
    ended = call("score", data, "--model", student_path, "--output", output, "--traces", 0)
    assert ended.code == 0, ended.said
    return pq.read_table(output)


def require_one_table(ours: pa.Table, expected: pa.Table) -> None:
    """The same rows in any order, with scores that differ by 1e-6 at most, because other batches round differently."""
    ours, expected = ours.sort_by("id"), expected.sort_by("id")
    for name in ("id", "prompt_id", "teacher", "correct", "content_hash", "scoring_hash", "num_tokens", "length"):
        assert ours[name].to_pylist() == expected[name].to_pylist(), name
    for name in SCORES:
        np.testing.assert_allclose(ours[name].to_numpy(), expected[name].to_numpy(), rtol=1e-6, atol=1e-6)


# ---- datatrove ----


@pytest.fixture
def step(student_path: Path, tmp_path: Path) -> Any:
    pytest.importorskip("datatrove", reason="the extra 'datatrove' is not installed")
    from distill_sampler.integrations.datatrove import StudentScores

    return StudentScores(str(student_path), tmp_path / "scores", batch_tokens=300)


def documents(lines: list[dict[str, Any]]) -> Iterator[Any]:
    from datatrove.data import Document

    for line in lines:
        kept = {name: value for name, value in line.items() if name not in ("response", "id")}
        yield Document(text=line["response"], id=line["id"], metadata=kept)


def test_documents_go_on_with_their_scores(step: Any, by_command: pa.Table, tmp_path: Path) -> None:
    scored = list(step.run(documents(LINES), rank=2))
    assert [document.id for document in scored] == [line["id"] for line in LINES]
    for document, row in zip(scored, by_command.sort_by("sample").to_pylist(), strict=True):
        assert document.metadata["rank_surprisal_ratio"] == pytest.approx(row["rank_surprisal_ratio"], abs=1e-6)
    require_one_table(pq.read_table(tmp_path / "scores" / "00002.parquet"), by_command)


def test_a_task_that_is_run_again_reads_only_what_has_changed(step: Any, tmp_path: Path) -> None:
    first = [document.metadata for document in step.run(documents(LINES))]
    before = pq.read_table(tmp_path / "scores" / "00000.parquet")
    changed = [dict(line) for line in LINES]
    changed[40]["response"] = "Something else."
    again = [document.metadata for document in step.run(documents(changed))]
    assert [number for number, (a, b) in enumerate(zip(first, again, strict=True)) if a != b] == [40]
    after = pq.read_table(tmp_path / "scores" / "00000.parquet")
    equal = [a == b for a, b in zip(before.to_pylist(), after.to_pylist(), strict=True)]
    assert equal == [number != 40 for number in range(72)]


def test_documents_that_cannot_be_used_go_on_without_scores(student_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("datatrove", reason="the extra 'datatrove' is not installed")
    from distill_sampler.integrations.datatrove import StudentScores

    lines = [dict(line) for line in LINES[:6]]
    for bad in (2, 5):
        lines[bad]["prompt"] = 7
    step = StudentScores(str(student_path), tmp_path, on_error="skip")
    scored = list(step.run(documents(lines)))
    assert [document.id for document in scored] == [line["id"] for line in lines]
    assert ["global_naturalness" in document.metadata for document in scored] == [True, True, False, True, True, False]
    with pytest.raises(ValueError, match="on_error= skip"):
        list(StudentScores(str(student_path), tmp_path / "stop").run(documents(lines)))


def test_a_task_without_documents_has_no_file(step: Any, tmp_path: Path) -> None:
    assert list(step.run(iter(()), rank=7)) == []
    assert not (tmp_path / "scores").exists()


def test_messages_are_read_too(student_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("datatrove", reason="the extra 'datatrove' is not installed")
    from datatrove.data import Document

    from distill_sampler.integrations.datatrove import StudentScores

    turns = [{"role": "user", "content": LINES[0]["prompt"]}, {"role": "assistant", "content": LINES[0]["response"]}]
    (scored,) = StudentScores(str(student_path), tmp_path).run(iter([Document(text=turns, id="0")]))  # type: ignore[arg-type]
    assert np.isfinite(scored.metadata["rank_surprisal_ratio"])


PIPELINE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from distill_sampler.integrations.datatrove import StudentScores

if __name__ == "__main__":
    data, model, folder = sys.argv[1:]
    LocalPipelineExecutor(
        [JsonlReader(data, text_key="response"), StudentScores(model, f"{folder}/scores", batch_tokens=100)],
        tasks=4, workers=2, logging_dir=f"{folder}/logs",
    ).run()
"""


@pytest.mark.slow
def test_four_tasks_of_datatrove_give_one_table_also_after_a_kill(student_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("datatrove", reason="the extra 'datatrove' is not installed")
    lines = [{**row, "id": str(number)} for number, row in enumerate(rows(400))]
    data = tmp_path / "candidates"
    data.mkdir()
    for number in range(4):
        write_lines(data / f"{number}.jsonl", lines[300 * number : 300 * number + 300])
    script = tmp_path / "pipeline.py"
    script.write_text(PIPELINE, encoding="utf-8")
    command = [sys.executable, str(script), str(data), str(student_path), str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while not list((tmp_path / "scores").glob("*.parts/[0-9]*.parquet")):
            assert process.poll() is None, "it was over before it could be killed"
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
    assert list((tmp_path / "scores").glob("*.parts/[0-9]*.parquet"))
    assert len(list((tmp_path / "scores").glob("0000?.parquet"))) < 4
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=600)
    logs = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "logs" / "logs").glob("*.log"))
    assert "not scored again" in logs
    stats = json.loads((tmp_path / "logs" / "stats.json").read_text(encoding="utf-8"))
    assert [step["stats"]["scored"] for step in stats if "scored" in step["stats"]] == [1200]
    for what, source, more in (("merge", tmp_path / "scores", ()), ("score", data, ("--model", student_path))):
        ended = call(what, source, *more, "--output", tmp_path / f"{what}.parquet")
        assert ended.code == 0, ended.said
    require_one_table(*(pq.read_table(tmp_path / f"{what}.parquet") for what in ("merge", "score")))


# ---- Ray ----


def test_a_batch_of_ray_has_the_types_of_its_columns(student_path: Path) -> None:
    from distill_sampler.integrations.ray import StudentScores

    scorer = StudentScores(str(student_path))
    batch = pa.Table.from_pylist(LINES[:3]).append_column("grade", pa.array([None, None, None], pa.int64()))
    table = scorer(batch)
    assert table.schema.field("grade").type == pa.int64()
    assert scorer(batch.slice(1))["rank_surprisal_ratio"].to_pylist() == pytest.approx(
        table["rank_surprisal_ratio"].to_pylist()[1:], abs=1e-6
    )
    with pytest.raises(ValueError, match="batch_format='pyarrow'"):
        scorer({"prompt": np.array(["a"])})  # type: ignore[arg-type]


RAY = """
import os
import signal
import sys
from pathlib import Path

import ray
from distill_sampler.integrations.ray import StudentScores

data, model, folder = sys.argv[1:]


class Dies:
    def __init__(self, model):
        self.scores = StudentScores(model)

    def __call__(self, batch):
        table = self.scores(batch)
        try:
            Path(folder + ".died").touch(exist_ok=False)
        except FileExistsError:
            return table
        os.kill(os.getpid(), signal.SIGKILL)


ray.init(num_cpus=4, include_dashboard=False, object_store_memory=200_000_000)
scores = ray.data.read_json(data).map_batches(
    Dies, fn_constructor_args=[model], batch_format="pyarrow", batch_size=10, concurrency=2
)
scores.write_parquet(folder)
ray.shutdown()
"""


@pytest.mark.slow
def test_two_actors_of_ray_give_one_table_also_if_one_is_killed(
    data: Path, student_path: Path, by_command: pa.Table, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    script = tmp_path / "scores.py"
    script.write_text(RAY, encoding="utf-8")
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, str(script), str(data), str(student_path), str(tmp_path / "scores")]
    subprocess.run(command, check=True, env=environment, timeout=600)
    assert (tmp_path / "scores.died").exists()
    assert len(list((tmp_path / "scores").glob("*.parquet"))) > 1
    ended = call("merge", tmp_path / "scores", "--output", tmp_path / "joined.parquet")
    assert ended.code == 0, ended.said
    require_one_table(pq.read_table(tmp_path / "joined.parquet"), by_command)
