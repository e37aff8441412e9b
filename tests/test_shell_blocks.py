"""The shell blocks of README, guides and gallery run as they stand, on tiny models with the names that the pages use.

Every line is either run here or listed with the reason why something else runs it.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import tiny
from tests.cli.conftest import call, rows, write_lines

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {
    "python3 -m venv": ".ci/run runs it in a fresh environment",
    "pip install": ".ci/run installs the extras",
    "python recipes/sft.py": "tests/distributed/test_recipes.py runs every configuration",
    "accelerate launch": "tests/distributed/test_recipes.py launches it",
    "python recipes/screenshots.py": "needs Chromium",
    "python recipes/matrix.py": "makes environments",
    "LLAMAFACTORY_PYTHON": "needs environments of other projects",
    "vllm serve": "needs vLLM; tests/engines serve one",
    "distill-sampler compare": "trains for minutes; tests/compare trains a pilot",
    "distill-sampler verify": "tests/test_attach.py compares a log",
    "distill-sampler doctor": "measures the machine for 20 s",
}
"""By its beginning, a line that is not run here, and where it is run or why not."""


def lines(page: Path) -> list[str]:
    """The commands of a page's shell blocks, with continued lines joined."""
    blocks = re.findall(r"```(?:bash|sh|shell)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


CASES = [page for page in PAGES if lines(page)]


def test_lines_that_run_elsewhere_are_still_there() -> None:
    every = [line for page in PAGES for line in lines(page)]
    unused = [start for start in ELSEWHERE if not any(line.startswith(start) for line in every)]
    assert set(unused) <= {"pip install", "python recipes/matrix.py"}


def stage(folder: Path) -> None:
    """The files that the pages name."""
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "STUDENT", "TEACHER", "R1", "BASE", "RUN", "RUN/model"):
        tiny.model(len(name)).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    found: list[dict[str, Any]] = [
        {**row, "id": f"row-{number}", "sample_uuid": f"row-{number}"} for number, row in enumerate(rows())
    ]
    for name in ("candidates", "texts", "data", "answers"):
        write_lines(folder / f"{name}.jsonl", found)
    tokenizer = tiny.tokenizer()
    tokens = [tokenizer(row["response"], add_special_tokens=False)["input_ids"] for row in found]
    numbers = {"token_ids": tokens, "logprobs": [[-0.5] * len(each) for each in tokens]}
    columns = {name: [row[name] for row in found] for name in found[0]}
    pq.write_table(pa.table({**columns, **numbers}), folder / "data.parquet")
    pq.write_table(pa.table({"sample_uuid": columns["sample_uuid"], **numbers}), folder / "numbers.parquet")
    if not (folder / "store.arrow").exists():
        ended = call("teacher-logprobs", folder / "texts.jsonl", "--model", folder / "R1", "--output", "store.arrow")
        assert ended.code == 0, ended.said


@pytest.mark.parametrize("page", CASES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stage(tmp_path)
    for line in lines(page):
        if any(line.startswith(start) for start in ELSEWHERE) or "--endpoint" in line:  # tests/engines serve one
            continue
        program, *arguments = shlex.split(line, comments=True)
        assert program == "distill-sampler", line
        for written in ("scores.parquet", "teacher.arrow", "train.jsonl", "selected.jsonl"):
            if written in arguments and arguments[arguments.index(written) - 1] == "--output":
                (tmp_path / written).unlink(missing_ok=True)
        ended = call(*arguments)
        assert ended.code == 0, f"{line}\n{ended.said}"
