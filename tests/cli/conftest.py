"""A tiny student on disk, candidates as files, and the command line as a function."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distill_sampler.cli import app
from tests import tiny


@dataclass(frozen=True)
class Ended:
    code: int
    said: str
    """Everything that was printed, on one line."""


def call(*arguments: object) -> Ended:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", "", result.output)
    return Ended(result.exit_code, re.sub(r"\s+", " ", plain))


@pytest.fixture(scope="session")
def student_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def rows(num_prompts: int = 6) -> list[dict[str, Any]]:
    """Candidates as text, with a verdict."""
    return [
        {
            "prompt_id": row["prompt_id"],
            "prompt": row["prompt"][0]["content"],
            "teacher": row["teacher"],
            "response": row["completion"][0]["content"],
            "correct": row["teacher"] != "cy",
        }
        for row in tiny.candidates(num_prompts)
    ]


def write_lines(path: Path, values: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.fixture
def candidates(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "candidates.jsonl", rows())


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory, student_path: Path) -> Path:
    """Scores of the candidates by the tiny student; the data lies beside them."""
    folder = tmp_path_factory.mktemp("scored")
    data = write_lines(folder / "candidates.jsonl", rows())
    output = folder / "scores.parquet"
    ended = call("score", data, "--model", student_path, "--output", output)
    assert ended.code == 0, ended.said
    return output


Call = Callable[..., Ended]
