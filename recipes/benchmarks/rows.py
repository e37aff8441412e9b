"""How commands grow with the rows: `python recipes/benchmarks/rows.py [COMMAND ...] [--sizes N ...]`.

For each size, `score`, the second of four shards of it, `merge` of all four, `teachers`, `select` and `report` run on a
file of short candidates with four teachers per prompt, each in its own process. The student has one layer, 64 words and
one thread, so the cost of the rows remains. Memory is the process's high-water mark (`ru_maxrss`), read after the
command's imports and at its end. A million rows take about ten minutes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEACHERS = ("ada", "bob", "cy", "dee")
WORDS = 62
COMMANDS = ("score", "shard", "merge", "teachers", "select", "report")
BEST = "BestOf(rank_surprisal_ratio, per=prompt_id)"
IMPORTS = {"report": "distill_sampler.report.page"}
"""The module that a command loads, if it does not have the command's name."""


def make_student(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {**{f"w{word}": word for word in range(WORDS)}, "<end>": WORDS, "<unknown>": WORDS + 1}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unknown>").save_pretrained(folder)
    shape = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.5, eos_token_id=WORDS,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)


def make_candidates(path: Path, size: int) -> None:
    """Prompts of three words; responses of four to eight, nearly all different from one another."""
    rng = random.Random(0)
    words = [f"w{word}" for word in range(WORDS)]
    with path.open("w", encoding="utf-8") as lines:
        for number in range(size):
            if number % len(TEACHERS) == 0:
                prompt, domain = " ".join(rng.choices(words, k=3)), rng.choice(("sums", "proofs"))
            row = {
                "prompt_id": f"prompt-{number // len(TEACHERS)}",
                "teacher": TEACHERS[number % len(TEACHERS)],
                "prompt": f"{prompt} ",
                "response": " ".join(rng.choices(words, k=rng.randint(4, 8))),
                "domain": domain,
                "correct": rng.random() < 0.5,
            }
            lines.write(json.dumps(row) + "\n")


def peak_megabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(arguments: Sequence[str]) -> dict[str, float]:
    """Run a command as users do. Returns seconds without imports, and megabytes after the imports and at the end."""
    from distill_sampler.cli import app

    importlib.import_module(IMPORTS.get(arguments[0], f"distill_sampler.cli.{arguments[0]}"))
    imports = peak_megabytes()
    started = time.perf_counter()
    app(list(arguments), standalone_mode=False)
    return {"seconds": time.perf_counter() - started, "imports MB": imports, "peak MB": peak_megabytes()}


def apart(what: str, *arguments: object) -> Any:
    """Run an action in its own process. This process stays small, because a child starts at its parent's high-water
    mark."""
    command = [sys.executable, __file__, "--one", json.dumps([what, *map(str, arguments)])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def do(what: str, *arguments: str) -> Any:
    """The actions that run in their own process."""
    if what == "student":
        make_student(Path(arguments[0]))
    elif what == "candidates":
        make_candidates(Path(arguments[0]), int(arguments[1]))
    else:
        return measure([what, *arguments])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"some of {', '.join(COMMANDS)}; default: all")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6], help="numbers of rows")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)  # what the subprocess is asked for
    options = parser.parse_args()
    if options.one:
        print("\n" + json.dumps(do(*options.one)))
        return
    wanted = options.commands or COMMANDS
    head = ["rows", "seconds", "rows/s", "imports MB", "peak MB", "output MB"]
    print("| command | " + " | ".join(head) + " |\n|---|" + "---:|" * len(head), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        student, data, scores, joined, chosen, page = (
            Path(folder) / name for name in ("m", "d.jsonl", "s.parquet", "j.parquet", "c.jsonl", "r.html")
        )
        apart("student", student)
        for size in options.sizes:
            apart("candidates", data, size)
            scoring = ("score", data, "--model", student, "--device", "cpu", "--overwrite", "--output")
            shards = [Path(folder) / f"shards-{number}-of-4.parquet" for number in range(1, 5)]
            if "merge" in wanted:
                for number in (1, 3, 4):
                    apart(*scoring, Path(folder) / "shards.parquet", "--shard", f"{number}/4")
            for name, output, *command in (
                ("score", scores, *scoring, scores),
                ("shard", shards[1], *scoring, Path(folder) / "shards.parquet", "--shard", "2/4"),
                ("merge", joined, "merge", *shards, "--output", joined, "--overwrite"),
                ("teachers", None, "teachers", scores),
                ("select", chosen, "select", scores, "--policy", BEST, "--output", chosen),
                ("report", page, "report", scores, "--output", page),
            ):
                if name not in wanted:
                    continue
                row = apart(*command)
                written = "" if output is None else f"{output.stat().st_size / 1e6:.1f}"
                cells = [f"{size:,}", f"{row['seconds']:.1f}", f"{size / row['seconds']:,.0f}"]
                cells += [f"{row['imports MB']:.0f}", f"{row['peak MB']:.0f}", written]
                print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
