"""Time and memory that planning an epoch takes: `python recipes/benchmarks/planning.py [--sizes N ...]`.

For each size, one subprocess plans [KeepCorrect, BestOf, MixDomains, SortBy, Shuffle within buckets] for N samples in
N / 4 groups, which are spread over the data set at random. Memory is the process's high-water mark (`ru_maxrss`), read
after importing the library, after creating the inputs, and at the end. The inputs alone take 60 bytes per sample.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from distill_sampler.policies import BestOf, KeepCorrect, MixDomains, Shuffle, SortBy, apply_one_by_one
from distill_sampler.protocols import Pool
from distill_sampler.types import Column, EpochPlan, FloatArray, Sample, View

POLICIES = [
    KeepCorrect("correct", if_none="keep_best", metric="score", per="prompt_id"),
    BestOf("score", per="prompt_id"),
    MixDomains({"reasoning": 3, "general": 1}),
    SortBy("score"),
    Shuffle(bucket=8192),
]


@dataclass(frozen=True)
class Score:
    """A metric that is only looked up. This script makes its scores."""

    name: str = "score"
    columns: tuple[str, ...] = ("score",)
    higher_is_better: bool = False

    def views(self, sample: Sample) -> tuple[View, ...]:
        raise NotImplementedError

    def reduce(self, sample: Sample, stats: object) -> Mapping[str, float]:
        raise NotImplementedError

    def aggregate(self, columns: Mapping[str, FloatArray]) -> float:
        return float(columns[self.name].mean())


def make_pool(size: int) -> Pool:
    rng = np.random.default_rng(0)
    scores = rng.lognormal(size=size)
    scores[rng.integers(size, size=size // 100)] = np.nan  # up to one in a hundred has no score
    groups = rng.integers(size // 4, size=size)
    # each prompt has one domain, so the domain follows from the group; half of the responses are correct
    domains = (groups % 3 == 0).astype(np.int64)
    return Pool(
        epoch=0,
        metrics={"score": Score()},
        scores={"score": scores},
        columns={
            "prompt_id": Column(codes=groups, values=range(size // 4)),
            "correct": Column(codes=rng.integers(2, size=size), values=(False, True)),
            "domain": Column(codes=domains, values=("reasoning", "general")),
        },
        lengths=rng.integers(100, 32_000, size=size),
        content_hash=rng.integers(2**64, size=size, dtype=np.uint64),
    )


def peak_megabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(size: int) -> dict[str, float]:
    """For one plan of `size` samples: seconds of each policy and in total, and megabytes at three moments."""
    result = {"size": float(size), "imports MB": peak_megabytes()}
    pool = make_pool(size)
    plan = EpochPlan(indices=np.arange(size))
    result["inputs MB"] = peak_megabytes()
    begun = before = time.perf_counter()
    for policy, made in apply_one_by_one(POLICIES, plan, pool, seed=0):
        now = time.perf_counter()
        result[type(policy).__name__] = now - before
        result["planned"] = len(made)
        before = now
    result["seconds"] = before - begun
    result["peak MB"] = peak_megabytes()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7], help="numbers of samples")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # what the subprocess is asked for
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    names = [type(policy).__name__ for policy in POLICIES]
    head = ["size", "planned", *names, "seconds", "imports MB", "inputs MB", "peak MB"]
    print("| " + " | ".join(head) + " |\n|" + "---:|" * len(head), flush=True)
    for size in arguments.sizes:
        command = [sys.executable, __file__, "--one", str(size)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        cells = [f"{row[h]:,.0f}" if "MB" in h or h in ("size", "planned") else f"{row[h]:.3f}" for h in head]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
