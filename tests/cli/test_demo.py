"""The demo: real traces, a tiny student."""

from importlib import import_module
from pathlib import Path

import pytest

from distill_sampler.cli import demo_parts, demo_truth
from distill_sampler.cli.demo_parts import candidates, experts_on_right_answers
from tests import tiny

demo = import_module("distill_sampler.cli.demo")  # the package's own name is the command


@pytest.fixture(scope="module", autouse=True)
def needs_the_traces() -> None:
    try:
        demo_parts._problems()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("summary", "answer", "right"),
    [
        ("The smallest value of |36^m - 5^n| is 11, achieved when m = 1 and n = 2.", "11", True),
        ("There are 76 involutions on the set {1, 2, 3, 4, 5, 6}.", "76", True),
        ("The value of a that makes x = -1 a root is a = -5.", "-5", True),
        ("The expansion of (x+y+z)^1999 will have 2,001,000 terms.", "2001000", True),
        ("The smallest value is $\\sqrt{2}-1$.", "-1", False),
        ("The smallest value is 31.", "11", False),
        ("", "11", False),
        ("It is n!.", "n!", None),
    ],
)
def test_an_answer_is_compared_with_the_number_that_the_summary_states(
    summary: str, answer: str, right: bool | None
) -> None:
    assert demo_parts._is_right(summary, answer) is right


def test_experts_contradict_no_wrong_answer_and_many_right_ones() -> None:
    """The rule for answers is the experts' where they can be compared: whoever made no wrong step has the answer."""
    wrong, read = experts_on_right_answers()
    assert (wrong, read) == (19, 29)
    rows = candidates(tiny.tokenizer(), prompts=300, max_length=10**6)
    read_through = [row for row in rows if row["wrong_step"] == -1 and row["correct"] is not None]
    assert len(read_through) >= 8
    assert all(row["correct"] for row in read_through)


def test_contested_problems_have_right_and_wrong_traces() -> None:
    rows = candidates(tiny.tokenizer(), prompts=10, max_length=4000, contested=True)
    assert len(rows) == 40
    for first in range(0, 40, 4):
        assert set(rows[first : first + 4]["correct"]) == {True, False}


@pytest.mark.parametrize("control", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_demo_shows_correctness_control_and_held_out_loss(
    control: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.model(max_position_embeddings=4096).save_pretrained(tmp_path / "student")
    tiny.tokenizer().save_pretrained(tmp_path / "student")
    monkeypatch.setattr(demo, "student_folder", lambda: tmp_path / "student")
    monkeypatch.setattr(demo_truth, "DRAWS", 5)
    opened: list[str] = []
    monkeypatch.setattr(demo.webbrowser, "open", opened.append)
    output = tmp_path / "out"
    demo.run(prompts=1, max_length=1800, epochs=1, output=output, full=False, control=control, show=control, seed=0)
    for name in ("model/adapter_model.safetensors", "scores.parquet", "plans.parquet", "scores.html"):
        assert (output / name).stat().st_size > 0
    said = " ".join(capsys.readouterr().err.split())
    for part in (
        "chosen: lowest RSR",
        "KeepCorrect, then lowest RSR",
        "control: random, same teachers",
        "(90 % of the",
    ):
        assert part in said
    assert "1 of 1, 100%" in said  # with KeepCorrect
    assert "before training" in said
    assert ("after training on the control's traces" in said) == control
    assert ("--control trains" in said) != control
    assert (output / "scores.html").resolve().as_uri() in said.replace(" ", "")
    assert opened == ([(output / "scores.html").resolve().as_uri()] if control else [])
    assert "Is what was chosen correct?" in (output / "scores.html").read_text(encoding="utf-8")
