"""Do a teacher's scores tell how good its students become? |Spearman| for each student, as in the RSR paper's tables.

    python recipes/correlation_grid.py teachers.csv

The file has a row for each student and teacher: columns `student`, `teacher`, the quality of the student after training
on this teacher (`--quality`), and scores of the teacher's responses by the student before training (`--scores`). The
last column is what scores without any meaning reach: the mean over random orders, which is far from 0 for few teachers.
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from distill_sampler.correlation import spearman

ORDERS = 10_000


def grid(rows: list[dict[str, str]], scores: list[str], quality: str) -> dict[str, dict[str, float]]:
    """|Spearman| by student and score, with a row `mean`; `random` is the mean over random orders."""
    of: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        of[row["student"]].append(row)
    found: dict[str, dict[str, float]] = {}
    for student, own in of.items():
        outcome = [float(row[quality]) for row in own]
        found[student] = {score: abs(spearman([float(row[score]) for row in own], outcome)) for score in scores}
        found[student]["random"] = by_chance(len(own))
    found["mean"] = {name: float(np.mean([each[name] for each in found.values()])) for name in (*scores, "random")}
    return found


def by_chance(teachers: int) -> float:
    rng = np.random.default_rng(0)
    places = np.arange(teachers) - (teachers - 1) / 2
    orders = rng.permuted(np.tile(places, (ORDERS, 1)), axis=1)
    return float(np.abs(orders @ places / (places @ places)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--scores", nargs="+", default=["rsr", "rsr_200", "avg_surprisal", "avg_tokens"])
    parser.add_argument("--quality", default="post_training_accuracy")
    options = parser.parse_args()
    with options.table.open(encoding="utf-8", newline="") as file:
        found = grid(list(csv.DictReader(file)), options.scores, options.quality)
    names = [*options.scores, "random"]
    print("| student | " + " | ".join(names) + " |\n|---|" + "---:|" * len(names))
    for student, values in found.items():
        print(f"| {student} | " + " | ".join(f"{values[name]:.3f}" for name in names) + " |")


if __name__ == "__main__":
    main()
