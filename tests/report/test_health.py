"""Data health and correctness, the first things on the page."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_sampler import KeepCorrect
from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.report.health import script_of
from distill_sampler.report.page import render
from distill_sampler.report.payload import payload


def scored(folder: Path, rows: list[dict[str, Any]]) -> Scores:
    table = pa.Table.from_pylist(rows)
    if "content_hash" in table.column_names:
        place = table.column_names.index("content_hash")
        table = table.set_column(place, "content_hash", table["content_hash"].cast(pa.uint64()))
    pq.write_table(table, folder / "scores.parquet")
    return Scores.open(folder / "scores.parquet")


def rows_of(num_prompts: int, **columns: Any) -> list[dict[str, Any]]:
    """Two responses to each prompt: teacher x has the better score."""
    return [
        {
            "sample": number,
            "prompt_id": f"p{number // 2}",
            "teacher": "xy"[number % 2],
            "num_tokens": 20 + number % 5,
            "content_hash": number,
            "global_naturalness": -1.0 - number % 2 - 0.01 * (number % 7),
            **{name: make(number) for name, make in columns.items()},
        }
        for number in range(2 * num_prompts)
    ]


def test_the_headline_compares_the_choice_with_the_pool_and_with_keep_correct(tmp_path: Path) -> None:
    # x is right in a quarter of the prompts, y in all of them, and the score prefers x
    data = payload(scored(tmp_path, rows_of(40, correct=lambda n: n % 2 == 1 or n % 8 == 0)))
    found = data["correctness"]
    assert found["pool"] == pytest.approx(50 / 80)
    assert found["chosen"] == pytest.approx(10 / 40)
    assert found["kept"] == 1.0
    lead, told, changed = found["sentences"]
    assert lead == "Chosen: 25 % correct (40 judged). Pool: 62 % (80 judged)."
    assert told.startswith("The choice prefers wrong responses (difference -")
    assert "KeepCorrect('correct', if_none='drop')" in changed
    assert "40 of 40 prompts" in changed
    page = render(data)
    assert page.index("Is what was chosen correct?") < page.index("Is the data healthy?") < page.index("Which teacher")


def test_a_choice_that_is_like_the_pool_is_said_to_be(tmp_path: Path) -> None:
    data = payload(scored(tmp_path, rows_of(40, correct=lambda n: (n // 2) % 2 == 0)))
    assert data["correctness"]["sentences"][1].startswith("The choice cannot be told apart from the pool")


def test_few_prompts_are_no_ground_for_a_conclusion(tmp_path: Path) -> None:
    data = payload(scored(tmp_path, rows_of(9, correct=lambda n: n % 2 == 1)))
    assert data["correctness"]["sentences"][1].startswith("9 judged prompts are too few")


def test_a_choice_by_keep_correct_is_not_filtered_again(tmp_path: Path) -> None:
    scores = scored(tmp_path, rows_of(40, correct=lambda n: n % 2 == 1))
    data = payload(scores, policies=[KeepCorrect("correct", if_none="drop")])
    assert len(data["correctness"]["sentences"]) == 2
    assert data["correctness"]["chosen"] == 1.0


def test_unknown_correctness_is_not_counted(tmp_path: Path) -> None:
    data = payload(scored(tmp_path, rows_of(40, correct=lambda n: None if n % 2 else n % 8 == 0)))
    assert data["correctness"]["judged"] == 40
    assert payload(scored(tmp_path, rows_of(4)))["correctness"] is None


def test_an_import_path_in_a_file_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_sampler.report import correctness

    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    choice = payload(scored(tmp_path, rows_of(4, correct=bool)))  # any choice; its policies are replaced
    assert choice["correctness"] is not None

    class Hostile:
        policies = (type("Facts", (), {"text": "planted:Policy"})(),)

    assert correctness._recorded(Hostile()) == []  # type: ignore[arg-type]


def test_every_check_counts_by_teacher(tmp_path: Path) -> None:
    loop, other = "again and again " * 200, "Пусть x будет числом, тогда ответ равен двум."
    data = payload(
        scored(
            tmp_path,
            rows_of(
                20,
                tokens_cut=lambda n: 7 if n == 2 else 0,
                content_hash=lambda n: 0 if n in (4, 6) else n + 100,
                global_naturalness=lambda n: -500.0 if n == 8 else -1.0 - 0.01 * (n % 7),
                prompt_text=lambda n: "Why?",
                tokens=lambda n: [loop if n == 1 else other if n == 3 else f"Response number {n}: so be it."],
                token_ranks=lambda n: [1],
                token_surprisals=lambda n: [0.5],
            ),
        )
    )
    x, y, everyone = sorted(data["health"]["rows"], key=lambda row: row["teacher"] == "all" or row["teacher"] == "y")
    assert (x["teacher"], x["counts"]) == ("x", {"empty": 0, "cut off": 1, "loops": 0, "duplicates": 2, "extreme": 1})
    if y["teacher"] == "all":
        y, everyone = everyone, y
    assert y["counts"]["loops"] == 1
    assert everyone["counts"] == {"empty": 0, "cut off": 1, "loops": 1, "duplicates": 2, "extreme": 1}
    assert everyone["scripts"] == {"Latin": pytest.approx(39 / 40), "Cyrillic": pytest.approx(1 / 40)}
    flags = dict(zip(data["points"]["sample"], data["points"]["flags"], strict=True))
    checks = list(data["health"]["checks"])
    assert flags[8] == 1 << checks.index("extreme")
    assert flags[2] == 1 << checks.index("cut off")
    assert flags[0] == 0


def test_what_the_file_cannot_say_is_said(tmp_path: Path) -> None:
    data = payload(scored(tmp_path, rows_of(4)))
    assert data["health"]["unknown"] == ["cut off", "loops"]
    assert "Not known here: cut off, loops" in render(data)


def test_the_script_of_a_text_is_that_of_its_letters() -> None:
    assert script_of("Let x = 2.") == "Latin"
    assert script_of("设 x = 2, 则答案是四") == "Han"
    assert script_of("123 + 4") == ""


def test_the_first_trace_is_the_most_telling_one(tmp_path: Path) -> None:
    # x is chosen everywhere. p3: a right one over a wrong one; p1: the same with a larger difference; p0: a wrong one
    right = {0: False, 1: True, 2: True, 3: False, 6: True, 7: False}
    better = {2: -0.1, 3: -9.0, 0: -0.1, 1: -20.0}
    texts = {"prompt_text": lambda n: f"{n}", "tokens": lambda n: ["t"], "token_ranks": lambda n: [1]}
    rows = rows_of(4, correct=right.get, token_surprisals=lambda n: [1.0], **texts)
    for number, value in better.items():
        rows[number]["global_naturalness"] = value
    data = payload(scored(tmp_path, rows))
    assert [prompt["group"] for prompt in data["traces"]] == ["p1", "p3", "p2", "p0"]
    assert np.mean([item["chosen"] for prompt in data["traces"] for item in prompt["items"]]) == 0.5
