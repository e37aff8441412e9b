"""How full packs are, how far samples move for it, how long packing takes, and what training gains by it.

    python recipes/benchmarks/packs.py fill FILE... [--pack-to 4096 8192 16384] [--batch-window 1024]
    python recipes/benchmarks/packs.py balance FILE... [--pack-to 4096 8192 16384] [--balance 64]
    python recipes/benchmarks/packs.py scale [--samples 10000000]
    python recipes/benchmarks/packs.py throughput FILE [--samples 192] [--pack-to 2048]

`fill` tokenises real traces (files of candidates, `prompt` and `response`) and packs two plans of each: every trace,
and one of each prompt, both shuffled. Beside it is what batches of eight pad to. `balance` shows how much more
attention the costliest pack of a step has than the mean one, for steps of 2, 4 and 8 packs. `scale` packs a plan of
random lengths. `throughput` trains a small random Llama with TRL's `SFTTrainer` on the same traces in turn: padded
batches, `padding_free=True`, TRL's `packing=True`, `attach(batch_tokens=)` and `attach(pack_to=)`; the table has the
tokens of samples per second, and the ratio to padded batches, as medians over the rounds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.append(str(Path(__file__).parents[2]))  # for the tests' tokenizer

import numpy as np
from rich.console import Console
from rich.table import Table

from distill_sampler.planning.packs import Packing, pack_plan
from distill_sampler.types import EpochPlan, IntArray


def lengths_of(path: Path, student: Path | None) -> tuple[IntArray, list[str]]:
    """Tokens of each trace, its prompt included, and the prompt that it answers."""
    from transformers import AutoTokenizer

    from distill_sampler.cli import demo_parts

    tokenizer = AutoTokenizer.from_pretrained(student or demo_parts.student_folder())
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if "ground_truth" in rows[0]:  # GSM8K's own file: four solutions in a line
        rows = [
            {"prompt_id": number, "prompt": row["question"], "response": value["solution"]}
            for number, row in enumerate(rows)
            for value in row.values()
            if isinstance(value, dict)
        ]
    texts = [f"{row['prompt']}\n{row['response']}" for row in rows]
    lengths = [len(tokens) for tokens in tokenizer(texts, verbose=False)["input_ids"]]
    return np.array(lengths, np.int64), [str(row["prompt_id"]) for row in rows]


def fill(options: argparse.Namespace) -> None:
    table = Table(box=None)
    headings = ["traces", "plan", "samples", "tokens", "pack_to", "window 1", "window 64", "moved", "batches of 8"]
    for heading in [*headings, "batch_tokens"]:
        table.add_column(heading, justify="left" if heading in ("traces", "plan") else "right")
    for path in options.files:
        lengths, prompts = lengths_of(path, options.student)
        rng = np.random.default_rng(0)
        shuffled = rng.permutation(len(lengths))
        first = list({prompts[sample]: int(sample) for sample in shuffled}.values())
        for capacity in options.pack_to:
            fits = lengths <= capacity
            for name, indices in (("all", shuffled), ("one a prompt", rng.permutation(first))):
                plan = EpochPlan(indices=indices[fits[indices]])
                (_, strict), (_, packed), (_, batches) = (
                    pack_plan(plan, lengths, packing)
                    for packing in (
                        Packing(capacity=capacity, window=1),
                        Packing(capacity=capacity),
                        Packing(capacity=capacity, window=options.batch_window, padded=True),
                    )
                )
                own = lengths[plan.indices]
                padded = sum(len(own[at : at + 8]) * own[at : at + 8].max() for at in range(0, len(own), 8))
                table.add_row(
                    path.name.partition(".")[0],
                    name,
                    str(len(plan)),
                    f"{own.sum():,}",
                    str(capacity),
                    f"{strict.fill:.1%}",
                    f"{packed.fill:.1%}",
                    str(packed.moved),
                    f"{padded / own.sum():.2f}",
                    f"{1 + (batches.padding or 0) / batches.tokens:.3f}",
                )
    Console(width=140).print(table)


def balance(options: argparse.Namespace) -> None:
    table = Table(box=None)
    steps = (2, 4, 8)
    for heading in ["traces", "pack_to", "packs", "balance", *(f"{step} a step" for step in steps), "tokens", "moved"]:
        table.add_column(heading, justify="left" if heading == "traces" else "right")
    for path in options.files:
        lengths, _ = lengths_of(path, options.student)
        shuffled = np.random.default_rng(0).permutation(len(lengths))
        for capacity in options.pack_to:
            plan = EpochPlan(indices=shuffled[lengths[shuffled] <= capacity])
            for number in (1, options.balance):
                packed, counts = pack_plan(plan, lengths, Packing(capacity=capacity, balance=number))
                assert packed.packs is not None
                own = lengths[packed.indices]
                sums = np.add.reduceat(own, packed.packs[:-1])
                costs = np.add.reduceat(own**2, packed.packs[:-1])
                table.add_row(
                    path.name.partition(".")[0],
                    str(capacity),
                    str(counts.packs),
                    str(number),
                    *(f"{_slowest(costs, step):.2f}" for step in steps),
                    f"{_slowest(sums, 8):.3f}",
                    str(counts.moved),
                )
    Console(width=140).print(table)
    print("a step: attention of its costliest pack / of its mean pack, mean over the steps; tokens: the same, 8 a step")


def _slowest(costs: IntArray, step: int) -> float:
    by_step = costs[: len(costs) // step * step].reshape(-1, step)
    return float((by_step.max(1) / by_step.mean(1)).mean())


def scale(options: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(800), 0.8, options.samples), 8, 8192).astype(np.int64)
    plan = EpochPlan(indices=rng.permutation(options.samples))
    for window in (1, 64):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started, used = time.perf_counter(), time.process_time()
        _, counts = pack_plan(plan, lengths, Packing(capacity=8192, window=window))
        seconds, cpu = time.perf_counter() - started, time.process_time() - used
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"window {window}: {options.samples:,} samples in {counts.packs:,} packs, {counts.fill:.2%} full, "
            f"{seconds:.1f} s ({cpu:.1f} s of CPU), {(after - before) / 2**20:.2f} GB beside {before / 2**20:.2f} GB"
        )


def throughput(options: argparse.Namespace) -> None:
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from distill_sampler import Curriculum, Shuffle, attach
    from tests import tiny

    disable_progress_bars()
    torch.set_num_threads(1)
    lengths, _ = lengths_of(options.file, options.student)
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.permutation(lengths)[: options.samples], options.pack_to)
    tokens = [rng.integers(0, 250, length).tolist() for length in lengths]
    rows = [{"input_ids": row, "labels": [-100] * (len(row) // 5) + row[len(row) // 5 :]} for row in tokens]

    def trained(way: str) -> float:
        """Tokens of samples per second."""
        torch.manual_seed(0)
        shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, max_position_embeddings=options.pack_to, **shape))
        settings: dict[str, Any] = {"max_length": options.pack_to, "per_device_train_batch_size": options.batch_size}
        if way == "padding_free=True":
            settings.update(padding_free=True, max_length=None)
        if way in ("packing=True", "attach(pack_to=)", "attach(batch_tokens=)"):
            settings["per_device_train_batch_size"] = 1
        with tempfile.TemporaryDirectory() as folder:
            trainer = SFTTrainer(
                model=model,
                processing_class=tiny.tokenizer(),
                train_dataset=Dataset.from_list(rows),
                args=SFTConfig(
                    output_dir=folder,
                    num_train_epochs=1,
                    packing=way == "packing=True",
                    save_strategy="no",
                    report_to="none",
                    use_cpu=True,
                    bf16=False,
                    gradient_checkpointing=False,
                    disable_tqdm=True,
                    logging_strategy="no",
                    **settings,
                ),
            )
            name = way.removeprefix("attach(").removesuffix("=)")
            if name != way:
                limit: dict[str, Any] = {name: options.pack_to}
                attach(trainer, Curriculum(metrics=[], policies=[Shuffle()]), **limit)
            started = time.process_time()
            trainer.train()
            return float(lengths.sum() / (time.process_time() - started))

    ways = ["packing=False", "padding_free=True", "packing=True", "attach(batch_tokens=)", "attach(pack_to=)"]
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(options.rounds):
        for way in ways if number % 2 == 0 else ways[::-1]:
            found[way].append(trained(way))
            print(f"round {number}, {way}: {found[way][-1]:,.0f} tokens per second of CPU", flush=True)
    table = Table(box=None)
    for heading in ("way", "tokens/s", "ratio"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for way in ways:
        ratio = statistics.median(a / b for a, b in zip(found[way], found[ways[0]], strict=True))
        table.add_row(way, f"{statistics.median(found[way]):,.0f}", f"{ratio:.2f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=Path, help="folder with the tokenizer; by default the demo's")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("fill")
    command.add_argument("files", type=Path, nargs="+")
    command.add_argument("--pack-to", type=int, nargs="+", default=[4096, 8192, 16384])
    command.add_argument("--batch-window", type=int, default=1024, help="the window of batch_tokens")
    command.set_defaults(run=fill)
    command = commands.add_parser("balance")
    command.add_argument("files", type=Path, nargs="+")
    command.add_argument("--pack-to", type=int, nargs="+", default=[4096, 8192, 16384])
    command.add_argument("--balance", type=int, default=64)
    command.set_defaults(run=balance)
    command = commands.add_parser("scale")
    command.add_argument("--samples", type=int, default=10_000_000)
    command.set_defaults(run=scale)
    command = commands.add_parser("throughput")
    command.add_argument("file", type=Path)
    command.add_argument("--samples", type=int, default=192)
    command.add_argument("--pack-to", type=int, default=2048)
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--rounds", type=int, default=3)
    command.set_defaults(run=throughput)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
