"""The recipes run as their docstrings say, on a tiny student: one process, and two on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.distributed.launcher import launch

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    tiny.model().save_pretrained(folder / "student")
    tiny.tokenizer().save_pretrained(folder / "student")
    with open(folder / "candidates.jsonl", "w", encoding="utf-8") as file:
        for place, row in enumerate(tiny.candidates(8)):
            domain = "general" if row["prompt_id"] in ("sum-0", "sum-1") else "reasoning"
            more = {"correct": place % 3 != 1, "domain": domain, "temperature": 1.0 if place % 3 else 0.6}
            file.write(json.dumps({**row, **more}) + "\n")
    return folder


def run(stage: Path, recipe: str, *options: str, config: str | None = None) -> str:
    path = ROOT / "accelerate_configs" / config if config else None
    if config and "zero" in config:
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    done = launch(ROOT / "recipes" / recipe, *options, cwd=stage, config=path)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("recipe", "config"),
    [(recipe, config) for recipe in ("loop.py", "trainer.py") for config in (None, "cpu.yaml", "cpu_zero2.yaml")]
    + [("loop.py", "cpu_zero3.yaml")],
)
def test_a_plain_recipe_trains_and_resumes(recipe: str, config: str | None, stage: Path) -> None:
    name = f"{recipe}-{config}"
    options = ["--model", str(stage / "student"), "--data", str(stage / "candidates.jsonl"), "--batch-size", "2"]
    options += ["--learning-rate", "1e-2", "--output", str(stage / name)]
    printed = run(stage, recipe, *options, config=config)
    assert printed.count("8 of 24 candidates") == 2  # two epochs, said by one process
    assert (stage / name / "model.safetensors").exists()
    again = run(stage, recipe, *options, "--resume", "--epochs", "3", config=config)
    assert again.count("8 of 24 candidates") == 1


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_of_the_sft_recipe_runs(config: Path, stage: Path) -> None:
    options = ["--config", str(config), "--data", str(stage / "candidates.jsonl"), "--use_cpu", "true"]
    options += ["--model_name_or_path", str(stage / "student"), "--output_dir", str(stage / config.stem)]
    options += ["--bf16", "false", "--report_to", "none", "--gradient_accumulation_steps", "1", "--logging_steps", "1"]
    if config.stem in ("best_teacher", "lark"):
        options += ["--num_samples", "8"]
    if config.stem == "teacher_guided":
        program = "from distill_sampler.cli import app; app()"
        command = [sys.executable, "-c", program, "teacher-logprobs", "candidates.jsonl"]
        subprocess.run([*command, "--model", "student", "--output", "store.arrow"], cwd=stage, check=True)
    if config.stem == "distill":
        options += ["--teacher", str(stage / "student")]
    printed = run(stage, "sft.py", *options)
    assert "curriculum/score_age_max" in printed
    assert ("soft_targets" in printed) == (config.stem == "distill")
    assert list((stage / config.stem).glob("*model.safetensors"))


def test_the_sft_recipe_runs_sharded_on_two_processes_as_the_readme_says(stage: Path) -> None:
    options = ["--config", str(ROOT / "recipes" / "configs" / "best_of_n.yaml"), "--use_cpu", "true", "--bf16", "false"]
    options += ["--data", str(stage / "candidates.jsonl"), "--model_name_or_path", str(stage / "student")]
    options += ["--output_dir", str(stage / "zero3"), "--report_to", "none", "--gradient_accumulation_steps", "1"]
    printed = run(stage, "sft.py", *options, config="cpu_zero3.yaml")
    assert printed.count("8 of 24 candidates") == 2
    assert (stage / "zero3" / "model.safetensors").exists()


def test_a_factory_can_make_the_curriculum(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (stage / "my_curriculum.py").write_text(
        "from distill_sampler import Curriculum, RankSurprisalRatio, SortBy\n"
        "def make():\n"
        "    return Curriculum(metrics=[RankSurprisalRatio()], policies=[SortBy('rank_surprisal_ratio')])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(stage))
    options = ["--curriculum", "my_curriculum:make", "--data", str(stage / "candidates.jsonl"), "--use_cpu", "true"]
    options += [
        "--model_name_or_path",
        str(stage / "student"),
        "--output_dir",
        str(stage / "factory"),
        "--max_steps",
        "2",
    ]
    assert "24 of 24 candidates" in run(stage, "sft.py", *options, "--bf16", "false", "--report_to", "none")
