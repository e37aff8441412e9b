"""What soft targets cost: the loss alone in memory and time, and a training step with a live teacher.

    python recipes/benchmarks/distilling.py loss [--positions 8192] [--vocab 151936] [--hidden 896] [--dtype bfloat16]
    python recipes/benchmarks/distilling.py step [--rounds 8] [--length 256]

`loss` runs the forward and backward pass of the divergence from hidden states on, in a process of its own, and prints
its peak memory beyond weights, states and gradients; beside it the plain formula, which holds all logits, at an eighth
of the positions. `step` times a forward and backward pass with `SoftTargets` over the student's forward and backward
pass plus the teacher's forward pass without its output head, interleaved, on random Llamas.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from distill_sampler import ScoredDataset
from distill_sampler.objectives.divergence import Cells, Head, soft_target_loss
from distill_sampler.objectives.live import Setting
from distill_sampler.objectives.soft_targets import SoftTargets
from distill_sampler.reading.head import LogitTransform, linear

console = Console()


def peak_megabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def work(options: argparse.Namespace) -> None:
    """In a process of its own: memory is a high-water mark."""
    dtype = getattr(torch, options.dtype)
    positions = options.positions if options.way == "ours" else options.positions // 8
    weights = [torch.randn(options.vocab, options.hidden).mul_(0.02).to(dtype) for _ in range(2)]
    states = [torch.randn(positions, options.hidden).to(dtype) for _ in range(2)]
    weights[0].requires_grad_(), states[0].requires_grad_()

    def loss(rows: int) -> torch.Tensor:
        coefficients = torch.full((rows,), 1 / rows)
        if options.way == "plain":
            student, teacher = (
                (state[:rows] @ weight.T).float() for state, weight in zip(states, weights, strict=True)
            )
            log_p, log_q = torch.log_softmax(teacher.detach() / 2, -1), torch.log_softmax(student / 2, -1)
            return 4 * (coefficients * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()
        project = linear(weights[1], None, LogitTransform())

        def targets(start: int, stop: int) -> Cells:
            with torch.no_grad():
                return Cells(log_probs=torch.log_softmax(project(states[1][start:stop]).div_(2), -1))

        return soft_target_loss(states[0][:rows], Head(weight=weights[0]), targets, coefficients, temperature=2.0)

    loss(8).backward()  # libraries, and the gradients that training holds anyway
    before = peak_megabytes()
    started = time.perf_counter()
    loss(positions).backward()
    seconds = time.perf_counter() - started
    print(json.dumps({"MB": peak_megabytes() - before, "seconds": seconds, "positions": positions}))


def loss(options: argparse.Namespace) -> None:
    table = Table("way", "positions", "MB beyond weights and gradients", "µs a position", title="the loss alone")
    for way in ("ours", "plain"):
        command = [sys.executable, __file__, "work", "--way", way]
        for name in ("positions", "vocab", "hidden", "dtype"):
            command += [f"--{name}", str(getattr(options, name))]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        micro = 1e6 * found["seconds"] / found["positions"]
        table.add_row(way, f"{found['positions']:,}", f"{found['MB']:,.0f}", f"{micro:,.0f}")
    console.print(table)


def llama(layers: int, hidden: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        )
    )


def step(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    student, teacher = llama(12, 512), llama(16, 768)
    ids = torch.randint(0, 49152, (options.batch_size, options.length))
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids}
    rows = ScoredDataset([{"input_ids": ids[0].tolist(), "labels": ids[0].tolist()}])
    tap = SoftTargets(teacher).tap(Setting(rows))

    def plain() -> None:
        student(**inputs, use_cache=False).loss.backward()
        with torch.no_grad():
            teacher.get_decoder()(input_ids=ids, use_cache=False)

    def distilled() -> None:
        tap.expect(inputs, progress=0.0)
        own = student(**inputs, use_cache=False).loss
        tap.added_to(own, scale=1 / ids[:, 1:].numel()).backward()

    ratios = []
    with tap.open(student, step=0):
        for number in range(options.rounds + 1):
            seconds = {}
            for way in (plain, distilled) if number % 2 else (distilled, plain):
                student.zero_grad(set_to_none=False)
                started = time.perf_counter()
                way()
                seconds[way] = time.perf_counter() - started
            ratios.append(seconds[distilled] / seconds[plain])
    ratios = ratios[1:]
    quartiles = statistics.quantiles(ratios, n=4)
    console.print(
        f"with soft targets / (student forward and backward + teacher's body forward): {statistics.median(ratios):.3f} "
        f"(quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}, {len(ratios)} rounds)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("loss", loss), ("work", work)):
        command = commands.add_parser(name)
        command.add_argument("--positions", type=int, default=8192)
        command.add_argument("--vocab", type=int, default=151936)
        command.add_argument("--hidden", type=int, default=896)
        command.add_argument("--dtype", default="bfloat16")
        command.add_argument("--way", default="ours")
        command.set_defaults(run=function)
    command = commands.add_parser("step")
    command.add_argument("--rounds", type=int, default=8)
    command.add_argument("--length", type=int, default=256)
    command.add_argument("--batch-size", type=int, default=2)
    command.set_defaults(run=step)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
