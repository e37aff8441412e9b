"""Scoring on many processes, simulated: balance of the work, idle forward passes, bytes sent.

    python recipes/benchmarks/ranks.py [--samples 100000] [--batch-tokens 16384]

Distributes and batches traces with log-normal lengths (median 1,000 tokens) as the library does. No model is run.
"""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

from distill_sampler.distributed import Ranks
from distill_sampler.reading.batching import token_batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--columns", type=int, default=3, help="Numbers for each sample; RSR has three.")
    parser.add_argument("--metrics", type=int, default=1)
    options = parser.parse_args()

    lengths = np.sort(np.random.default_rng(0).lognormal(np.log(1000), 0.8, options.samples).astype(np.int64))[::-1]
    table = Table("processes", "busiest / mean tokens", "forwards each", "idle forwards", "sends", "bytes a sample")
    for world_size in (1, 2, 8, 64, 256):
        cuts = np.cumsum(lengths) // (8 * options.batch_tokens * world_size)
        blocks = np.split(lengths, np.flatnonzero(np.diff(cuts)) + 1)
        tokens, forwards, most = np.zeros(world_size), np.zeros(world_size), 0
        for block in blocks:
            counts = []
            for rank in range(world_size):
                share = block[Ranks(rank=rank, world_size=world_size).share(block)]
                tokens[rank] += share.sum()
                counts.append(len(list(token_batches(share, options.batch_tokens))))
            forwards += counts
            most += max(counts)
        # a block's sum has a float64 for each number, two for each metric (its tokens, and whether they were too many),
        # and one for all tokens; a ring sends each byte about twice
        numbers = options.columns + 2 * options.metrics + 1
        sent = 0 if world_size == 1 else 8 * numbers * 2 * (world_size - 1) / world_size
        table.add_row(
            str(world_size),
            f"{tokens.max() / tokens.mean():.3f}",
            str(most),
            f"{1 - forwards.sum() / (most * world_size):.1%}",
            str(2 * len(blocks) if world_size > 1 else 0),
            f"{sent:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
