"""Scoring on several processes, compared with one process on the same data and the same cores.

    python recipes/benchmarks/processes.py [--processes 2] [--data FILE] [--prompts N] …

N processes with T threads each are compared with one process with T threads (N processes can be at most N times as
fast) and with one process with N × T threads (the same cores). Processes communicate through gloo, and the student is
wrapped in DDP as in training. All of them load it once and then take turns; the first round does not count. Collectives
are counted where they are called: what the library sends, without DDP's broadcasts of buffers (a few hundred bytes per
forward). Student, traces and options are those of `scoring.py forward`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scoring import DTYPES, Scores, load, ratio, score


@dataclass(frozen=True)
class Pass:
    """What one process did while everything was scored once."""

    seconds: float
    scores: Scores
    sent: list[int]
    """Bytes passed to each collective."""
    shapes: list[tuple[int, int]]
    """`(rows, tokens)` of each forward, padding included."""


def work(rank: int, world_size: int, options: argparse.Namespace, meeting_point: str, commands: Connection) -> None:
    """A worker process: receives numbers of threads and scores everything with each, until it receives None."""
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        model, dataset, _ = load(options)
    sent: list[int] = []
    shapes: list[tuple[int, int]] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=world_size)
        model = torch.nn.parallel.DistributedDataParallel(model)
        count_into(sent)
    commands.send("ready")
    while (threads := commands.recv()) is not None:
        torch.set_num_threads(threads)
        sent.clear()
        shapes.clear()
        started = time.perf_counter()
        scores = score(model, dataset, batch_tokens=options.batch_tokens, impl="chunked")
        commands.send(Pass(time.perf_counter() - started, scores, list(sent), list(shapes)))
    if world_size > 1:
        dist.destroy_process_group()


def count_into(sent: list[int]) -> None:
    """From now on, record the bytes of every collective."""

    def counted(collective: Any, tensor: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent.append(args[tensor].nbytes)
            return collective(*args, **kwargs)

        return call

    dist.all_reduce = counted(dist.all_reduce, 0)
    dist.all_gather = counted(dist.all_gather, 1)  # the first argument is the list of results


@dataclass(frozen=True)
class Crew:
    """Processes that score together."""

    commands: list[Connection]

    @classmethod
    def of(cls, size: int, options: argparse.Namespace, folder: Path) -> Crew:
        spawn = torch.multiprocessing.get_context("spawn")
        commands = []
        for rank in range(size):
            ours, theirs = spawn.Pipe()
            meeting_point = str(folder / f"meeting-{size}")
            spawn.Process(target=work, args=(rank, size, options, meeting_point, theirs), daemon=True).start()
            theirs.close()  # so that this process ends if a worker dies
            commands.append(ours)
        for command in commands:
            command.recv()
        return cls(commands)

    def score(self, threads: int) -> list[Pass]:
        for command in self.commands:
            command.send(threads)
        return [command.recv() for command in self.commands]

    def dismiss(self) -> None:
        for command in self.commands:
            command.send(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="interleaved repeats")
    parser.add_argument("--model", type=Path, help="a folder with a student (default: the demo's)")
    parser.add_argument("--data", type=Path, help="traces, .jsonl or .jsonl.gz (default: the demo's)")
    parser.add_argument("--prompts", type=int, default=3, help="groups to use")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a trace that are read")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--batch-tokens", type=int, help="default: the library's, 2048 on a CPU")
    options = parser.parse_args()
    size = options.processes
    threads = max(1, torch.get_num_threads() // size)

    _, dataset, _ = load(options)
    tokens = int(dataset.lengths.sum())
    with tempfile.TemporaryDirectory() as folder:
        one, several = Crew.of(1, options, Path(folder)), Crew.of(size, options, Path(folder))
        variants = {
            f"1 process × {threads} thread(s)": (one, threads),
            f"1 process × {size * threads} threads": (one, size * threads),
            f"{size} processes × {threads} thread(s)": (several, threads),
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        passes: dict[str, list[Pass]] = {}
        for number in range(options.rounds + 1):
            for name, (crew, with_threads) in variants.items():
                passes[name] = crew.score(with_threads)
                if number:
                    seconds[name].append(max(part.seconds for part in passes[name]))
        one.dismiss()
        several.dismiss()
    report(seconds, passes, tokens, len(dataset))


def report(seconds: Mapping[str, list[float]], passes: Mapping[str, list[Pass]], tokens: int, num_samples: int) -> None:
    single, same_cores, together = seconds
    print(f"| | tokens/s | speed / {single} | speed / {same_cores} |\n|---|---:|---:|---:|")
    for name, times in seconds.items():
        speed = tokens / statistics.median(times)
        print(
            f"| {name} | {speed:,.0f} | {ratio(seconds, single, name):.2f} | {ratio(seconds, same_cores, name):.2f} |"
        )
    alone, parts = passes[single][0], passes[together]
    read = np.array([sum(rows * length for rows, length in part.shapes) for part in parts])
    idle = sum(shape == (1, 2) for part in parts for shape in part.shapes) / sum(len(part.shapes) for part in parts)
    sent = parts[0].sent
    # a ring sends each byte of a sum twice, minus what a process keeps
    ring = 2 * (len(parts) - 1) / len(parts)
    error = max(np.nanmax(np.abs(parts[0].scores[name] / alone.scores[name] - 1)) for name in alone.scores)
    print(
        f"\n{len(sent)} collectives with {sum(sent) / num_samples:.0f} bytes a sample, "
        f"{sum(sent) * ring / num_samples:.0f} sent by each process of a ring.\n"
        f"{len(parts[0].shapes)} forwards of each process ({len(alone.shapes)} of one alone), {idle:.0%} of them idle "
        f"or probes; the busiest reads {read.max() / read.mean():.3f} of the mean, padding included.\n"
        f"Scores differ from one process's by {error:.1e} at most, relatively."
    )


if __name__ == "__main__":
    main()
