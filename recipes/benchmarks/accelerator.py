"""Scoring and observing on an accelerator, in one command: `python recipes/benchmarks/accelerator.py [options]`.

Random weights of published shapes, random tokens: throughput depends on neither. For each shape and length of the
samples, bare forward passes of the body and scoring passes (RSR and global naturalness) take turns on the same
batches, and so do training steps with and without observing where their memory suffices. A line has medians:

- *scoring / bare*: time of scoring over time of the body alone, beside the least it can be, *floor*: body and head at
  the same speed, all tokens scored;
- *of the product*: the share of the speed of a large matrix product on this device that the bare forward reaches, and
  that scoring reaches, by their arithmetic;
- *observing*: time of a training step that observes over one that does not.

Before that, the reductions that the device can run are compared with float64 on it. Without an accelerator, the
command runs the smallest shape on the CPU, which shows that it works.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

from distill_sampler import GlobalNaturalness, RankSurprisalRatio, ScoredDataset, Scorer
from distill_sampler.integrations.batches import batch_of
from distill_sampler.reading.head import LogitTransform, linear
from distill_sampler.reading.observer import Observer
from distill_sampler.reading.token_stats import Impl, token_stats, usual_batch_tokens
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

    def in_turns(self, works: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
        """Seconds of each, in rounds, after one that does not count."""
        found: list[list[float]] = [[] for _ in works]
        for number in range(rounds + 1):
            for place, work in enumerate(works):
                seconds = self.seconds(work)
                if number:
                    found[place].append(seconds)
        return found

    def product_speed(self) -> float:
        """FLOP a second of a large product."""
        size = 8192 if self.is_accelerator else 1024
        left, right = torch.randn(2, size, size, device=self.at).to(self.dtype)
        (seconds,) = self.in_turns([lambda: left @ right], 5)
        return 2 * size**3 / statistics.median(seconds)

    def peak_gigabytes(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e9 if self.at.type == "cuda" else float("nan")


def check_kernels(device: Device) -> None:
    """Every reduction that the device can run, against float64 formulas on the same logits."""
    vocab = 50_257
    torch.manual_seed(0)
    weight = torch.randn(vocab, 256, device=device.at).to(torch.bfloat16)
    states = torch.randn(600, 256, device=device.at).to(torch.bfloat16)
    targets = torch.randint(vocab, (len(states),), device=device.at)
    logits = (states.float() @ weight.float().T).double()
    own = logits.gather(1, targets[:, None])
    surprisal = (logits.logsumexp(1) - own[:, 0]).float()
    rank = 1 + (logits > own).sum(1)
    table = Table("reduction", "largest error of surprisal, nats", "ranks that differ", title="Against float64")
    impls: list[Impl] = ["chunked", "compiled"] + (["triton"] if device.at.type == "cuda" else [])
    for impl in impls:
        found = token_stats(states, targets, linear(weight, None, LogitTransform()), chunk=256, impl=impl)
        error = (found["surprisal"] - surprisal).abs().max().item()
        # a product of bfloat16 factors in another order may swap two columns that are all but equal
        table.add_row(impl, f"{error:.1e}", f"{(found['rank'] != rank).float().mean().item():.2%}")
        assert error < 1e-3, (impl, error)
    console.print(table)


def flop(model: Any, lengths: Any) -> tuple[float, float]:
    """FLOP of the body for samples of these lengths, and of the head for all of their tokens."""
    config = model.config
    inner = sum(weight.numel() for name, weight in model.base_model.named_parameters() if "embed" not in name)
    tokens, squares = float(lengths.sum()), float((lengths.astype(float) ** 2).sum())
    attention = 2 * config.num_hidden_layers * config.hidden_size * squares
    return 2.0 * inner * tokens + attention, 2.0 * model.get_output_embeddings().weight.numel() * tokens


def measure(device: Device, name: str, length: int, options: argparse.Namespace, product: float) -> list[str]:
    model = SHAPES[name].make(device.at, device.dtype)
    budget = max(options.batch_tokens or usual_batch_tokens(device.at), length)
    rows = max(1, budget // length) * options.batches
    ids = np.random.default_rng(0).integers(0, SHAPES[name].vocab, (rows, length))
    dataset = ScoredDataset([{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids])
    scorer = Scorer(batch_tokens=budget, progress=False)
    batches = torch.from_numpy(ids).to(device.at).split(max(1, budget // length))

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                model.base_model(input_ids=batch, use_cache=False)

    def score() -> None:
        for _ in scorer.score(model, dataset, METRICS, np.arange(len(dataset))):
            pass

    bare_seconds, seconds = device.in_turns([bare, score], options.rounds)
    body, head = flop(model, dataset.lengths)
    ratio = statistics.median(b / a for a, b in zip(bare_seconds, seconds, strict=True))
    least = [statistics.median(each) for each in (bare_seconds, seconds)]
    found = [
        name,
        f"{length:,}",
        f"{ids.size / least[0]:,.0f}",
        f"{ids.size / least[1]:,.0f}",
        f"{ratio:.2f}",
        f"{1 + head / body:.2f}",
        f"{body / least[0] / product:.0%}, {(body + head) / least[1] / product:.0%}",
    ]
    try:
        found.append(f"{observing(device, model, dataset, options.rounds):.3f}")
    except torch.OutOfMemoryError:
        found.append("no memory to train")
    return [*found, f"{device.peak_gigabytes():.1f}"]


def observing(device: Device, model: Any, dataset: ScoredDataset, rounds: int) -> float:
    """Time of forward and backward pass with observing over without; one sample a step."""
    ids = torch.from_numpy(dataset.sample(0).input_ids)[None].to(device.at)
    inputs = {"input_ids": ids, "labels": ids}
    plan = EpochPlan(indices=np.array([0]))
    model.gradient_checkpointing_enable()
    model.train()

    def step(observer: Observer | None) -> None:
        if observer is not None:
            observer.expect(batch_of(inputs, plan, dataset, place=0, epoch=0, step=0))
        model(**inputs, use_cache=False).loss.backward()
        if observer is not None:
            observer.take()
        model.zero_grad(set_to_none=False)

    with Observer(model, dataset, METRICS) as observer:
        plain, watched = device.in_turns([partial(step, None), partial(step, observer)], rounds)
    return statistics.median(b / a for a, b in zip(plain, watched, strict=True))


def main() -> None:
    at = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes, lengths = (["tiny"], [256]) if at.type == "cpu" else (list(SHAPES)[1:], [512, 2048, 8192, 32_768])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes)
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=2, help="batches in a pass")
    parser.add_argument("--batch-tokens", type=int, help="tokens in a batch; default: the library's")
    options = parser.parse_args()
    device = Device(str(at), options.dtype)
    what = torch.cuda.get_device_name() if at.type == "cuda" else str(at)
    product = device.product_speed()
    speed = f"a large {options.dtype} product runs at {product / 1e12:.1f} TFLOP/s"
    console.print(f"{what}, torch {torch.__version__}: {speed}")
    check_kernels(device)
    table = Table(
        "shape", "tokens a sample", "bare, tokens/s", "scoring, tokens/s", "scoring / bare", "floor",
        "of the product: bare, scoring", "observing", "peak GB",
    )  # fmt: skip
    for name in options.shapes:
        for length in options.lengths:
            try:
                table.add_row(*measure(device, name, length, options, product))
            except torch.OutOfMemoryError:
                table.add_row(name, f"{length:,}", "no memory")
            console.print(f"measured {name} at {length:,} tokens")
    console.print(table)


if __name__ == "__main__":
    main()
