"""Scoring and observing on an accelerator, in one command: `python recipes/benchmarks/accelerator.py [options]`.

Random weights of published shapes, random tokens: throughput depends on neither. For each shape and length of the
samples, bare forward passes of the body and scoring passes (RSR and global naturalness) take turns on the same
batches of `--batch-tokens`. Each pass runs over n and over 3n batches, so what a batch costs is known apart from what
a pass costs once. Training steps with and without observing take turns too, where their memory suffices. The first
table has medians:

- *bare*, *scoring*: tokens a second, by the time that one more batch takes;
- *scoring / bare*: the ratio of these times, beside the least that it can be, *floor*: body and head at the same speed,
  all tokens scored;
- *once a pass*: what a scoring pass takes besides its batches (the probe of the model, mostly);
- *observing / stock step*: forward and backward of `--step-tokens`, with and without observing; no optimizer step.

With `--compiled`, a second line has the same with compiled layers, *bare* too. Compilation is not measured.

The second table is a roofline. A large product and a large copy give the device's speeds, which are printed first. A
batch takes at least its FLOP over the one and its bytes over the other, whichever is longer, for body and head each.
The bytes are what must move at least: the body's weights once, the head's once for each chunk of positions, and the
float32 logits out and in. The activations of the body are not counted, so a small body cannot reach its bound.

At the end, `reductions.py` compares the reductions that the device can run with float64 on it. Without an accelerator,
the command runs the smallest shape on the CPU, which shows that it works. `--json FILE` keeps each round's seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import reductions
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

from distill_sampler import GlobalNaturalness, RankSurprisalRatio, ScoredDataset, Scorer
from distill_sampler.integrations.batches import batch_of
from distill_sampler.reading.layers import compiled_layers
from distill_sampler.reading.observer import Observer
from distill_sampler.reading.token_stats import chunk_for, usual_batch_tokens
from distill_sampler.types import EpochPlan

console = Console(width=150)
METRICS = [RankSurprisalRatio(), GlobalNaturalness()]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The published shape of a model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocab: int
    tied: bool = False

    def make(self, device: torch.device, dtype: torch.dtype) -> Any:
        config = Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            tie_word_embeddings=self.tied,
            max_position_embeddings=32_768,
        )
        config.dtype = dtype
        torch.manual_seed(0)
        with torch.device(device):
            return Qwen2ForCausalLM(config).to(dtype).eval()


SHAPES = {
    "tiny": Shape(hidden=64, inner=128, layers=2, heads=4, key_value_heads=2, vocab=2048),
    "SmolLM2-135M": Shape(hidden=576, inner=1536, layers=30, heads=9, key_value_heads=3, vocab=49_152, tied=True),
    "Qwen2.5-0.5B": Shape(hidden=896, inner=4864, layers=24, heads=14, key_value_heads=2, vocab=151_936, tied=True),
    "Qwen2.5-1.5B": Shape(hidden=1536, inner=8960, layers=28, heads=12, key_value_heads=2, vocab=151_936, tied=True),
    "Qwen2.5-7B": Shape(hidden=3584, inner=18_944, layers=28, heads=28, key_value_heads=4, vocab=152_064),
    "Llama-3.1-8B": Shape(hidden=4096, inner=14_336, layers=32, heads=32, key_value_heads=8, vocab=128_256),
}


class Device:
    """Measures seconds on a device."""

    def __init__(self, name: str, dtype: str) -> None:
        self.at = torch.device(name)
        self.dtype: torch.dtype = getattr(torch, dtype)
        size = 8192 if self.is_accelerator else 1024
        left, right = torch.randn(2, size, size, device=self.at).to(self.dtype)
        source = torch.zeros(2**28 if self.is_accelerator else 2**24, device=self.at)
        room = torch.empty_like(source)
        works: Sequence[Callable[[], Any]] = [lambda: left @ right, lambda: room.copy_(source)]
        for work in works:
            self.seconds(work)
        product, copy = self.in_turns(works, 5)
        self.product = 2 * size**3 / statistics.median(product)
        """FLOP a second of a large product."""
        self.copy = 2 * source.nbytes / statistics.median(copy)
        """Bytes a second that a large copy reads and writes."""

    @property
    def is_accelerator(self) -> bool:
        return self.at.type != "cpu"

    def seconds(self, work: Callable[[], Any]) -> float:
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        if self.is_accelerator:
            torch.accelerator.synchronize()

    def in_turns(self, works: Sequence[Callable[[], Any]], rounds: int, seconds: float = math.inf) -> list[list[float]]:
        """Seconds of each, in rounds: at most so many, and after the second no more than begin within the given time.
        Every other round goes backwards."""
        found: list[list[float]] = [[] for _ in works]
        started = time.perf_counter()
        for number in range(rounds):
            if number >= 2 and time.perf_counter() - started > seconds:
                break
            for place in range(len(works))[:: -1 if number % 2 else 1]:
                found[place].append(self.seconds(works[place]))
        return found

    def forget_peak(self) -> None:
        if self.at.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gigabytes(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e9 if self.at.type == "cuda" else float("nan")


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Seconds of passes over few and over many batches, one of each in a round."""

    few: list[float]
    many: list[float]
    batches: tuple[int, int]

    @property
    def each_batch(self) -> list[float]:
        """What one more batch took, in each round."""
        few, many = self.batches
        return [(long - short) / (many - few) for short, long in zip(self.few, self.many, strict=True)]

    @property
    def batch(self) -> float:
        return statistics.median(self.each_batch)

    @property
    def once(self) -> float:
        """What a pass takes besides its batches."""
        return statistics.median(self.few) - self.batches[0] * self.batch


@dataclass(frozen=True, kw_only=True)
class Part:
    """The arithmetic of body or head for one batch."""

    flop: float
    bytes: float

    def least(self, device: Device) -> float:
        return max(self.flop / device.product, self.bytes / device.copy)


def parts_of(model: Any, rows: int, length: int, device: Device) -> tuple[Part, Part]:
    """Body and head for a batch of samples of one length, all of whose tokens are scored."""
    config, tokens = model.config, rows * length
    body = [weight for name, weight in model.base_model.named_parameters() if "embed" not in name]
    inner, head = sum(weight.numel() for weight in body), model.get_output_embeddings().weight
    attention = 2.0 * config.num_hidden_layers * config.hidden_size * rows * length**2  # causal: half of the square
    chunks = math.ceil(tokens / chunk_for(config.vocab_size, device.at))
    logits = 4.0 * tokens * config.vocab_size
    return (
        Part(flop=2.0 * inner * tokens + attention, bytes=sum(weight.nbytes for weight in body)),
        Part(flop=2.0 * head.numel() * tokens, bytes=chunks * head.nbytes + 2 * logits),
    )


def passes(device: Device, model: Any, rows: int, length: int, options: argparse.Namespace) -> dict[str, Passes]:
    """Bare and scoring passes, with batches of so many samples of one length; the same with compiled layers."""
    rng = np.random.default_rng(0)

    def bare(ids: Any, compiled: bool = False) -> None:
        with torch.no_grad(), compiled_layers(model.base_model) if compiled else nullcontext():
            for batch in ids:
                model.base_model(input_ids=batch, use_cache=False)

    one = torch.from_numpy(rng.integers(0, model.config.vocab_size, (1, rows, length))).to(device.at)
    seconds = min(device.seconds(partial(bare, one)) for _ in range(3))
    scorers = [Scorer(batch_tokens=rows * length, compile_layers=each, progress=False) for each in (False, True)]
    block = scorers[0].reader(model).block_tokens // (rows * length)
    few = min(max(round(0.15 / seconds), 1), 32)
    few -= few % block if few > block else 0  # whole blocks: results of each are put together on the host
    batches = few, 3 * few
    ids = rng.integers(0, model.config.vocab_size, (max(batches), rows, length))
    dataset = ScoredDataset([{"input_ids": row, "labels": row} for row in ids.reshape(-1, length).tolist()])

    def score(number: int, compiled: bool = False) -> None:
        for _ in scorers[compiled].score(model, dataset, METRICS, np.arange(number * rows)):
            pass

    there = torch.from_numpy(ids).to(device.at)
    works: dict[str, list[Callable[[], Any]]] = {}
    for compiled in [False, True] if options.compiled else [False]:
        works["bare, compiled" if compiled else "bare"] = [partial(bare, there[:each], compiled) for each in batches]
        works["scoring, compiled" if compiled else "scoring"] = [partial(score, each, compiled) for each in batches]
    for shorter, _ in works.values():  # the libraries' first use
        device.seconds(shorter)
    found = iter(device.in_turns([work for pair in works.values() for work in pair], options.rounds, options.seconds))
    return {name: Passes(few=next(found), many=next(found), batches=batches) for name in works}


def observing(device: Device, model: Any, length: int, options: argparse.Namespace) -> list[list[float]]:
    """Seconds of a few forward and backward passes without observing, and with it."""
    rows = max(1, options.step_tokens // length)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length))
    dataset = ScoredDataset([{"input_ids": row, "labels": row} for row in ids.tolist()])
    inputs = dict.fromkeys(("input_ids", "labels"), torch.from_numpy(ids).to(device.at))
    plan = EpochPlan(indices=np.arange(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in the newest transformers
        model.gradient_checkpointing_enable()
    model.train()

    def steps(number: int, observer: Observer | None) -> None:
        for _ in range(number):
            if observer is not None:
                observer.expect(batch_of(inputs, plan, dataset, place=0, epoch=0, step=0))
            model(**inputs, use_cache=False).loss.backward()
            if observer is not None:
                observer.take()
            model.zero_grad(set_to_none=False)

    with Observer(model, dataset, METRICS) as observer:
        seconds = min(device.seconds(partial(steps, 1, observer)) for _ in range(2))
        number = min(max(round(0.15 / seconds), 1), 32)
        works = [partial(steps, number, None), partial(steps, number, observer)]
        return device.in_turns(works, 3 * options.rounds, options.seconds)


@dataclass(frozen=True, kw_only=True)
class Line:
    """What was measured for one shape and length."""

    shape: str
    length: int
    rows: int
    """Samples in a batch."""
    body: Part
    head: Part
    passes: dict[str, Passes]
    """Bare and scoring, also with compiled layers; empty where the memory does not suffice."""
    steps: list[list[float]]
    """Seconds of training steps without and with observing; empty where the memory does not suffice."""
    peak_gigabytes: float
    """Of the passes."""


MEASURED = (
    "shape", "tokens a sample", "batches", "rounds: passes, steps", "bare, tokens/s", "scoring, tokens/s",
    "scoring / bare", "floor", "once a pass, ms", "observing / stock step", "peak GB, passes",
)  # fmt: skip
ROOFLINE = (
    "shape", "tokens a sample", "TFLOP: body, head", "GB: body, head", "least ms: body, head", "bare at most, tokens/s",
    "reached", "scoring at most, tokens/s", "reached",
)  # fmt: skip


def measure(device: Device, model: Any, name: str, length: int, options: argparse.Namespace) -> Line:
    rows = max(1, options.batch_tokens // length)
    device.forget_peak()
    body, head = parts_of(model, rows, length, device)  # before memory is taken, which decides on the chunk
    found: dict[str, Passes] = {}
    steps: list[list[float]] = []
    with suppress(torch.OutOfMemoryError):
        found = passes(device, model, rows, length, options)
    peak = device.peak_gigabytes()
    with suppress(torch.OutOfMemoryError):
        steps = observing(device, model, length, options)
    model.zero_grad(set_to_none=True)
    model.eval()
    return Line(
        shape=name, length=length, rows=rows, body=body, head=head, passes=found, steps=steps, peak_gigabytes=peak
    )


def tables() -> tuple[Table, Table]:
    measured, roofline = Table(title="Measured"), Table(title="Roofline, a batch")
    for table, headings in ((measured, MEASURED), (roofline, ROOFLINE)):
        for place, heading in enumerate(headings):
            table.add_column(heading, justify="right" if place else "left", no_wrap=not place)
    return measured, roofline


def add_rows(measured: Table, roofline: Table, line: Line, device: Device) -> None:
    if not line.passes:
        measured.add_row(line.shape, f"{line.length:,}", "no memory")
    for compiled in ("", ", compiled"):
        if f"bare{compiled}" in line.passes:
            add_row(measured, roofline, line, device, compiled)


def add_row(measured: Table, roofline: Table, line: Line, device: Device, compiled: str) -> None:
    bare, scoring = (line.passes[f"{name}{compiled}"] for name in ("bare", "scoring"))
    first = line.shape + compiled, f"{line.length:,}"
    tokens = line.rows * line.length
    ratio = statistics.median(b / a for a, b in zip(bare.each_batch, scoring.each_batch, strict=True))
    pairs = [b / a for a, b in zip(*line.steps, strict=True)] if line.steps and not compiled else []
    measured.add_row(
        *first,
        f"{scoring.batches[0]}, {scoring.batches[1]}",
        f"{len(scoring.few)}, {len(pairs)}",
        f"{tokens / bare.batch:,.0f}",
        f"{tokens / scoring.batch:,.0f}",
        f"{ratio:.2f}",
        f"{1 + line.head.flop / line.body.flop:.2f}",
        f"{1e3 * scoring.once:.1f}",
        "" if compiled else f"{statistics.median(pairs):.3f}" if pairs else "no memory",
        f"{line.peak_gigabytes:.1f}",
    )
    parts = line.body, line.head
    body, head = (part.least(device) for part in parts)
    roofline.add_row(
        *first,
        ", ".join(f"{part.flop / 1e12:.3g}" for part in parts),
        ", ".join(f"{part.bytes / 1e9:.3g}" for part in parts),
        f"{1e3 * body:.2f}, {1e3 * head:.2f}",
        f"{tokens / body:,.0f}",
        f"{body / bare.batch:.0%}",
        f"{tokens / (body + head):,.0f}",
        f"{(body + head) / scoring.batch:.0%}",
    )


def main() -> None:
    at = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes, lengths = (["tiny"], [256]) if at.type == "cpu" else (list(SHAPES)[1:], [512, 2048, 8192, 32_768])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes)
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7, help="of passes, at most; of steps three times as many")
    parser.add_argument("--seconds", type=float, default=3, help="for a line's passes, and for its steps")
    tokens = usual_batch_tokens(at)
    parser.add_argument("--batch-tokens", type=int, default=tokens, help="default: the library's")
    parser.add_argument("--step-tokens", type=int, default=8192, help="tokens in a training step")
    parser.add_argument("--compiled", action="store_true", help="a second line each: the same with compiled layers")
    parser.add_argument("--json", type=Path, help="a file for the seconds of every round")
    options = parser.parse_args()
    device = Device(str(at), options.dtype)
    about = {
        "device": torch.cuda.get_device_name() if at.type == "cuda" else str(at),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": options.dtype,
        "product, FLOP/s": device.product,
        "copy, bytes/s": device.copy,
    }
    console.print(f"{about['device']}, torch {torch.__version__}, transformers {transformers.__version__}")
    console.print(f"a large {options.dtype} product: {device.product / 1e12:.1f} TFLOP/s", end="; ")
    console.print(f"a large copy: {device.copy / 1e12:.2f} TB/s")
    measured, roofline = tables()
    lines = []
    for name in options.shapes:
        if options.compiled:
            torch.compiler.reset()  # or a few shapes of the same layer would be too many
        model = SHAPES[name].make(device.at, device.dtype)
        for length in options.lengths:
            started = time.perf_counter()
            line = measure(device, model, name, length, options)
            lines.append(line)
            add_rows(measured, roofline, line, device)
            if options.json is not None:  # after each line, for a machine whose time may run out
                whole = {**about, "lines": [asdict(each) for each in lines]}
                options.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            console.print(f"measured {name} at {length:,} tokens in {time.perf_counter() - started:.0f} s")
        del model
    console.print(measured, roofline)
    console.print(reductions.check(device.at))


if __name__ == "__main__":
    main()
