"""What the relatives of RSR cost beside it: `python recipes/benchmarks/relatives.py [options]`.

One scoring pass with RSR, global naturalness, IFD, LARK and ASLEC against one with RSR alone and IFD's second view,
which no other metric can share. The student is the demo's, the traces too; `--model` and `--data` take others, as in
`scoring.py`. Variants take turns, and medians of per-round ratios are printed.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scoring import DTYPES, first, load, ratio, take_turns
from transformers import AutoTokenizer

from distill_sampler import (
    AslecParts,
    GlobalNaturalness,
    InstructionFollowingDifficulty,
    Lark,
    RankSurprisalRatio,
    ScoredDataset,
    Scorer,
)
from distill_sampler.cli import demo_parts


def score(model: Any, dataset: ScoredDataset, metrics: list[Any]) -> int:
    """One pass; gives the tokens that the student read."""
    passed = Scorer(progress=False).score(model, dataset, metrics, np.arange(len(dataset)))
    return sum(scored.tokens for scored in passed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, dataset, _ = load(options)
    tokenizer = AutoTokenizer.from_pretrained(options.model or demo_parts.student_folder())
    rsr, ifd, lark = RankSurprisalRatio(), InstructionFollowingDifficulty(), Lark()
    aslec = AslecParts(tokenizer=tokenizer)
    variants = {
        "RSR alone": [rsr],
        "RSR and IFD's second view": [rsr, ifd],
        "all: RSR, global, IFD, LARK, ASLEC": [rsr, GlobalNaturalness(), ifd, lark, aslec],
        "all, LARK over the top 50": [rsr, GlobalNaturalness(), ifd, Lark(top_50=True), aslec],
    }
    for metrics in variants.values():
        score(model, first(dataset, 4), metrics)
    tokens = {name: score(model, dataset, metrics) for name, metrics in variants.items()}
    seconds = take_turns(
        {name: partial(score, model, dataset, metrics) for name, metrics in variants.items()}, options.rounds
    )
    alone, with_view, *_ = variants
    print("| | tokens read | time / RSR alone | time / RSR and IFD's second view |\n|---|---:|---:|---:|")
    for name in variants:
        print(
            f"| {name} | {tokens[name]:,} | {ratio(seconds, name, alone):.2f} | {ratio(seconds, name, with_view):.2f} |"
        )


if __name__ == "__main__":
    main()
