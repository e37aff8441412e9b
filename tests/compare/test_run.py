"""Comparisons from beginning to end, on a tiny student."""

import csv
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_sampler.cli.compare import Options, run, show_runs, tables_of
from distill_sampler.compare.generated import verifier
from distill_sampler.compare.runner import runs_in
from recipes.correlation_grid import by_chance, grid
from tests import tiny
from tests.distributed.launcher import launch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    tiny.model().save_pretrained(folder / "student")
    tiny.tokenizer().save_pretrained(folder / "student")
    with open(folder / "candidates.jsonl", "w", encoding="utf-8") as file:
        for place, row in enumerate(tiny.candidates(10)):
            file.write(json.dumps({**row, "correct": place * 7 % 5 != 0, "human": "It is so."}) + "\n")
    return folder


def options(stage: Path, output: Path, **changes: object) -> Options:
    common = {
        "data": [str(stage / "candidates.jsonl")],
        "model": str(stage / "student"),
        "output": output,
        "arms": ["none", "matched_random", "rsr"],
        "seeds": 2,
        "budget": 3000,
        "held_out": 3,
        "human": "human",
        "learning_rate": 1e-2,
        "batch_size": 1,
        "device": "cpu",
        "bf16": False,
    }
    return Options(**{**common, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(stage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "comparison"
    run(options(stage, output))
    return output


def test_a_comparison_writes_its_runs_and_tables(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = runs_in(made)
    assert [(each.arm, each.seed) for each in runs] == [
        (arm, seed) for seed in (0, 1) for arm in ("matched_random", "none", "rsr")
    ]
    trained = [each for each in runs if each.arm != "none"]
    assert all(abs(each.response_tokens / 3000 - 1) <= 0.01 for each in trained)
    for seed in (0, 1):
        own = {each.arm: each for each in runs if each.seed == seed}
        assert own["rsr"].teachers == own["matched_random"].teachers
        assert own["rsr"].answers != own["none"].answers
    held_out = [{answer.prompt for answer in each.answers} for each in runs if each.arm == "rsr"]
    assert not held_out[0] & held_out[1]  # seeds hold out different prompts
    table = (made / "table.md").read_text(encoding="utf-8")
    assert "rsr did not beat" in table or "rsr beat" in table or "rsr was worse" in table
    assert "would have been seen with probability 0.8" in table
    assert "Circular" in table
    assert (made / "comparison.svg").read_text(encoding="utf-8").startswith("<svg")
    # the small file gives the same tables
    show_runs(made / "runs.jsonl")
    assert capsys.readouterr().out.strip() == table.strip() == tables_of(made).strip()


def test_a_rerun_gives_the_same_table_and_losses_bit_for_bit(made: Path, stage: Path, tmp_path: Path) -> None:
    run(options(stage, tmp_path / "again", seeds=1))
    again, first = ({(each.arm, each.seed): each for each in runs_in(folder)} for folder in (tmp_path / "again", made))
    for key, each in again.items():
        assert each.answers == first[key].answers
        assert each.plan == first[key].plan


def test_a_tokenizer_without_a_padding_token_changes_nothing(stage: Path, tmp_path: Path) -> None:
    shutil.copytree(stage / "student", tmp_path / "student")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "student")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "student")
    assert AutoTokenizer.from_pretrained(tmp_path / "student").pad_token_id is None
    found = []
    for number, student in enumerate((stage / "student", tmp_path / "student")):
        common = {"seeds": 1, "arms": ["rsr"], "unit": "samples", "budget": 4, "batch_size": 4}
        run(options(stage, tmp_path / str(number), model=str(student), **common))
        found += runs_in(tmp_path / str(number))
    assert found[0].answers == found[1].answers


def test_candidates_that_another_process_is_scoring_are_waited_for(
    made: Path, stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, flock = tmp_path / "comparison", fcntl.flock
    (output / "scores").mkdir(parents=True)
    with (output / "scores" / "0.lock").open("w") as held:
        flock(held, fcntl.LOCK_EX)

        def the_other_ends(file: Any, flags: int) -> None:
            if not flags & fcntl.LOCK_NB:
                for path in (made / "scores").glob("*.npz"):
                    shutil.copy(path, output / "scores")
                flock(held, fcntl.LOCK_UN)
            flock(file, flags)

        monkeypatch.setattr(fcntl, "flock", the_other_ends)
        run(options(stage, output, arms=["rsr"], seeds=1))
    assert not (output / "scores" / "cost.jsonl").exists()
    (own,) = runs_in(output)
    assert own.plan in {each.plan for each in runs_in(made)}


def test_where_other_processes_make_all_runs_there_is_a_line_and_no_error(
    stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "comparison"
    (output / "runs").mkdir(parents=True)
    with (output / "runs" / "none-0.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        run(options(stage, output, arms=["none"], seeds=1))
    assert "Other processes are making the remaining runs" in capsys.readouterr().err
    run(options(stage, output, arms=["none"], seeds=1))
    assert len(runs_in(output)) == 1


def test_runs_that_are_there_are_not_made_again(made: Path, stage: Path) -> None:
    (made / "runs" / "rsr-1.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in (made / "runs").glob("*.json")}
    table = (made / "table.md").read_text(encoding="utf-8")
    run(options(stage, made))
    assert (made / "runs" / "rsr-1.json").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (made / "table.md").read_text(encoding="utf-8") == table


@pytest.mark.parametrize("change", [{"budget": 4000}, {"margin": 0.5}, {"learning_rate": 1e-3}, {"held_out": 2}])
def test_other_settings_are_refused_in_the_same_folder(change: dict[str, object], made: Path, stage: Path) -> None:
    with pytest.raises(ValueError, match=r"--output .* other settings.*another folder"):
        run(options(stage, made, **change))


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        ({"held_out": 10}, "--held-out"),
        ({"margin": 0.0}, "--margin"),
        ({"correct": "verdict"}, "--correct-column"),
        ({"max_length": 20}, "--max-length"),
        ({"budget": 10}, "--budget"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, object], cure: str, stage: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=cure):
        run(options(stage, tmp_path / "refused", **change))
    if "held_out" in change:
        run(options(stage, tmp_path / "refused", arms=["none"], seeds=1))  # the folder is still free


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        ({"correct": "verdict"}, "--correct-column verdict"),
        ({"human": "humann"}, "--human-column: the column 'humann'"),
        ({"group": "problem"}, "problem"),
        ({"arms": ["mine=BestOf(rsr, per=promt_id)"]}, "--arm mine: .*Did you mean 'prompt_id'"),
    ],
)
def test_a_column_that_the_data_lack_is_refused_before_a_model_is_looked_for(
    change: dict[str, object], cure: str, stage: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=cure):
        run(options(stage, tmp_path / "refused", model=str(tmp_path / "nowhere"), **change))


def test_an_arm_that_needs_verdicts_is_refused_where_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "candidates.jsonl").write_text("\n".join(map(json.dumps, tiny.candidates(2))), encoding="utf-8")
    with pytest.raises(ValueError, match=r"--arm best_single_teacher .*--correct-column"):
        run(options(tmp_path, tmp_path / "refused", human=None, arms=["best_single_teacher"]))


def test_the_student_that_is_scored_again_chooses_in_rounds(stage: Path, tmp_path: Path) -> None:
    run(options(stage, tmp_path / "rounds", arms=["rsr_rescored"], seeds=1, budget=4000))
    (one,) = runs_in(tmp_path / "rounds")
    assert one.rescored_tokens > 0
    assert abs(one.response_tokens / 4000 - 1) <= 0.01
    assert one.steps == one.samples


ANSWERS: dict[str, str] = {}


def even(answer: str, row: dict[str, object]) -> bool:
    """A verifier."""
    ANSWERS[str(row["question"])] = answer
    return len(answer) % 2 == 0


def test_a_student_answers_held_out_prompts_as_it_would_one_by_one(stage: Path, tmp_path: Path) -> None:
    data = tmp_path / "candidates.jsonl"
    with open(stage / "candidates.jsonl", encoding="utf-8") as rows, open(data, "w", encoding="utf-8") as file:
        for row in map(json.loads, rows):
            question = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            file.write(json.dumps({**row, "question": question}) + "\n")
    how = {"data": [str(data)], "arms": ["none", "random"], "verifier": f"{__name__}:even", "max_new_tokens": 6}
    ANSWERS.clear()
    run(options(stage, tmp_path / "out", **how, seeds=1))
    runs = {each.arm: each for each in runs_in(tmp_path / "out")}
    for each in runs.values():
        assert set(each.solved) == {answer.prompt for answer in each.answers}
    assert "solved" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "answering" in (tmp_path / "out" / "costs.md").read_text(encoding="utf-8")

    ANSWERS.clear()
    run(options(stage, tmp_path / "untrained", **{**how, "arms": ["none"]}, seeds=1))
    tok, model = tiny.tokenizer(), AutoModelForCausalLM.from_pretrained(stage / "student").eval()
    assert len(ANSWERS) == 3
    for question, answer in ANSWERS.items():
        ids = tok.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        alone = model.generate(input_ids=ids, do_sample=False, max_new_tokens=6, pad_token_id=tok.pad_token_id)
        assert answer == tok.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("answer", "solution", "right"),
    [
        ("She pays $1,200.00.", "12 * 100 = 1200\n#### 1200", True),
        ("It is 7, or 8", "#### 7", False),
        ("-3", "#### 3", False),
        ("no idea", "#### 3", False),
    ],
)
def test_the_last_numbers_decide(answer: str, solution: str, right: bool) -> None:
    assert verifier("last_number", human="solution")(answer, {"solution": solution}) is right


@pytest.mark.parametrize(
    ("name", "human", "cure"),
    [("last_number", None, "--human-column"), ("exact", "human", "package.module:function")],
)
def test_a_verifier_that_cannot_be_is_refused(name: str, human: str | None, cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        verifier(name, human=human)


def test_the_grid_reproduces_the_papers_numbers(shared: Path) -> None:
    with (shared / "reference" / "rsr_paper_teachers.csv").open(encoding="utf-8", newline="") as file:
        found = grid(list(csv.DictReader(file)), ["rsr", "avg_surprisal"], "post_training_accuracy")
    assert found["mean"]["rsr"] == pytest.approx(0.847, abs=0.0005)
    assert found["mean"]["avg_surprisal"] < 0.55
    assert found["mean"]["random"] == pytest.approx(by_chance(11))
    assert 0.2 < by_chance(11) < 0.3


@pytest.mark.slow
def test_a_comparison_that_is_killed_goes_on(made: Path, stage: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    call = [sys.executable, str(ROOT / "recipes" / "compare_policies.py"), str(stage / "candidates.jsonl")]
    call += ["--model", str(stage / "student"), "--output", str(output), "--seeds", "2", "--budget", "3000"]
    call += ["--held-out", "3", "--human-column", "human", "--learning-rate", "1e-2", "--batch-size", "1"]
    call += [
        "--no-bf16",
        "--device",
        "cpu",
        *(part for arm in ("none", "matched_random", "rsr") for part in ("--arm", arm)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for number, ending in enumerate((signal.SIGTERM, signal.SIGKILL), 1):
        process = subprocess.Popen(call, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list((output / "runs").glob("*.json"))) < number:
            time.sleep(0.05)
        process.send_signal(ending)
        process.wait()
        assert len(list((output / "runs").glob("*.json"))) < 6
    subprocess.run(call, env=environment, check=True, capture_output=True)
    assert (output / "table.md").read_text(encoding="utf-8") == (made / "table.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_two_processes_of_accelerate_make_the_same_plans(made: Path, stage: Path, tmp_path: Path) -> None:
    call = [str(stage / "candidates.jsonl"), "--model", str(stage / "student"), "--output", "two", "--seeds", "1"]
    call += ["--budget", "3600", "--held-out", "3", "--human-column", "human", "--batch-size", "1", "--no-bf16"]
    call += ["--device", "cpu", "--arm", "matched_random", "--arm", "rsr"]
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    done = launch(ROOT / "recipes" / "compare_policies.py", *call, cwd=tmp_path, config=config)
    assert done.returncode == 0, done.stderr[-4000:]
    runs = {each.arm: each for each in runs_in(tmp_path / "two")}
    assert runs["rsr"].teachers == runs["matched_random"].teachers
    assert runs["rsr"].steps == runs["rsr"].samples // 2
    assert len(runs["rsr"].answers) == len(runs_in(made)[0].answers)


@pytest.mark.slow
def test_a_pilot_says_what_it_would_take(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(options(stage, tmp_path / "pilot", arms=(), pilot=True, seeds=1))
    printed = capsys.readouterr().out
    for subject in ("Spread of rank_surprisal_ratio", "Stability of", "Cost of the matched control", "Noise of rsr"):
        assert subject in printed
    assert printed.count("To see") == 3
