"""Puts human solutions beside the candidates, for the guard of `distill-sampler compare --human-column human`.

    python recipes/add_solutions.py candidates.jsonl.gz solutions.jsonl.gz --output joined.jsonl

Both files are lines of JSON. A solution belongs to the candidates whose prompt is the same text. Candidates without a
solution are left out, and counted.
"""

import argparse
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("candidates", type=Path)
parser.add_argument("solutions", type=Path)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--prompt", default="prompt", help="column of the candidates' prompt")
parser.add_argument("--question", default="question", help="column of the prompt beside the solution")
parser.add_argument("--solution", default="ground_truth", help="column of the solution")
parser.add_argument("--strip", default=r"<<.*?>>", help="remove this from solutions (GSM8K's calculator marks)")
parser.add_argument("--column", default="human", help="the new column")


def rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def same(prompt: str) -> str:
    return " ".join(prompt.split())


def main() -> None:
    options = parser.parse_args()
    solutions = {
        same(row[options.question]): re.sub(options.strip, "", row[options.solution]) for row in rows(options.solutions)
    }
    left_out = 0
    with options.output.open("w", encoding="utf-8") as lines:
        for row in rows(options.candidates):
            solution = solutions.get(same(row[options.prompt]))
            if solution is None:
                left_out += 1
                continue
            lines.write(json.dumps({**row, options.column: solution}, ensure_ascii=False) + "\n")
    print(f"{options.output}: {left_out} candidates without a solution were left out")


if __name__ == "__main__":
    main()
