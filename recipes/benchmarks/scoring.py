"""What scoring costs, as ratios within one run: `python recipes/benchmarks/scoring.py WHAT [options]`.

| WHAT | question |
|---|---|
| `forward` | a pass against the bare backbone, its distance from the floor, and batches of 4 with full logits |
| `kernel` | from hidden states to statistics: time against the matrix product alone, and peak memory |
| `profile` | where the time of a scoring pass goes, in seconds and in operations, and what follows for its limit |
| `scaling` | cost per sample at 10², 10³, 10⁴ samples of a tiny model |
| `padding` | tokens that are read for one of a sample: what laying samples end to end could save |

The student is the demo's, the traces too (`pip install "distill_sampler[demo]"` and the two wheels that the demo
names); `--model` and `--data` take others. Traces are lines of JSON with `prompt` and `response`, gzipped or not;
responses to the same prompt form a group. Variants take turns, and medians of per-round ratios are printed.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distill_sampler import GlobalNaturalness, RankSurprisalRatio, ScoredDataset, Scorer
from distill_sampler.cli import demo_parts
from distill_sampler.reading import forward as student
from distill_sampler.reading import model_reader
from distill_sampler.reading.batching import token_batches
from distill_sampler.reading.blocks import blocks_of
from distill_sampler.reading.head import LogitTransform, Project, linear, operand_copy
from distill_sampler.reading.token_stats import chunk_for, token_stats

HIDDEN = {49_152: 576, 151_936: 896}
"""Columns of the head and width of the body: SmolLM2-135M, Qwen2.5-0.5B."""

METRICS = [RankSurprisalRatio(), GlobalNaturalness()]
BATCHES = (512, 1024, 2048)
"""Sizes of batches, in tokens, in which the bare backbone is tried."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Scores = dict[str, np.ndarray[Any, Any]]


# ---- Student and traces ----


def load(options: argparse.Namespace) -> tuple[Any, ScoredDataset, list[str]]:
    """Student, prepared traces of whole groups, and the prompt of each."""
    disable_progress_bars()
    folder = options.model or demo_parts.student_folder()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[options.dtype]).eval()
    rows: list[dict[str, Any]]
    if options.data:
        rows = traces(options.data, options.prompts, options.max_length)
    else:
        rows = demo_parts.candidates(tokenizer, prompts=options.prompts, max_length=options.max_length).to_list()
    prepared, prompts = [], []
    for row in rows:
        begin = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        whole = whole[: options.max_length]
        if len(whole) > len(begin):
            prepared.append({"input_ids": whole, "labels": [-100] * len(begin) + whole[len(begin) :]})
            prompts.append(json.dumps(row["prompt"]))
    dataset = ScoredDataset(Dataset.from_list(prepared), end_token_ids=[tokenizer.eos_token_id])
    response = dataset.num_scored.sum() / dataset.lengths.sum()
    print(
        f"{len(dataset)} traces of {len(set(prompts))} prompts, {dataset.lengths.sum():,} tokens "
        f"({dataset.lengths.min()} to {dataset.lengths.max()}), {response:.0%} of them response; "
        f"{options.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    return model, dataset, prompts


def traces(path: Path, prompts: int, max_length: int) -> list[dict[str, Any]]:
    """The first groups of a file, in the order of the file. Responses far longer than can be used are cut early."""
    groups: dict[str, list[dict[str, Any]]] = {}
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            row = json.loads(line)
            if row["prompt"] in groups or len(groups) < prompts:
                groups.setdefault(row["prompt"], []).append(
                    {
                        "prompt": [{"role": "user", "content": row["prompt"]}],
                        "completion": [{"role": "assistant", "content": row["response"][: 8 * max_length]}],
                    }
                )
    return [row for group in groups.values() for row in group]


def first(dataset: ScoredDataset, size: int) -> ScoredDataset:
    """To run everything once before it is measured."""
    return ScoredDataset(dataset.rows.select(range(min(size, len(dataset)))))  # type: ignore[attr-defined]


def score(model: Any, dataset: ScoredDataset, **scorer: Any) -> Scores:
    columns = {name: np.full(len(dataset), np.nan) for metric in METRICS for name in metric.columns}
    for scored in Scorer(progress=False, **scorer).score(model, dataset, METRICS, np.arange(len(dataset))):
        for name, values in scored.columns.items():
            columns[name][scored.indices] = values
    return columns


def bare_backbone(model: Any, dataset: ScoredDataset) -> None:
    """Every token once through the body: row by row, so without padding; no head."""
    with torch.no_grad():
        for index in range(len(dataset)):
            model.base_model(input_ids=torch.from_numpy(dataset.sample(index).input_ids)[None], use_cache=False)


def batched_backbone(model: Any, dataset: ScoredDataset, batch_tokens: int) -> None:
    """The same in batches of rows of like length, padded on the right."""
    for batch in token_batches(dataset.lengths, batch_tokens):
        samples = dataset.samples(np.array(batch))
        tokens, mask = padded([sample.input_ids for sample in samples])
        with torch.no_grad():
            model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)


def padded(rows: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """`[rows, longest]` tokens, and 1 where they are real."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.from_numpy(row)
        mask[place, : len(row)] = 1
    return tokens, mask


def plain_reference(model: Any, dataset: ScoredDataset, batch: int = 4) -> Scores:
    """As in the paper's script: data order, right-padded, all logits, log-sum-exp in float32, top-100 for the ranks."""
    mean_rank, mean_surprisal = [], []
    for start in range(0, len(dataset), batch):
        samples = [dataset.sample(index) for index in range(start, min(start + batch, len(dataset)))]
        tokens, mask = padded([sample.input_ids for sample in samples])
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        for row, sample in enumerate(samples):
            places = torch.from_numpy(np.flatnonzero(sample.scored))
            predictions = logits[row, places - 1]
            target = predictions.gather(1, tokens[row, places, None])
            surprisal = predictions.float().logsumexp(1) - target[:, 0].float()
            rank = 1 + (predictions.topk(100).values > target).sum(1)
            mean_rank.append(rank.clamp(max=100).double().mean().item())
            mean_surprisal.append(surprisal.double().mean().item())
    ranks, surprisals = np.array(mean_rank), np.array(mean_surprisal)
    return {"mean_rank": ranks, "mean_surprisal": surprisals, "rank_surprisal_ratio": ranks / surprisals}


# ---- Measuring ----


def take_turns(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round; whoever measures has run each of them before.

    With one thread it is processor time, which neighbours on the machine disturb least.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            gc.collect()
            started = clock()
            run()
            seconds[name].append(clock() - started)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], of: str, to: str) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[of], seconds[to], strict=True))


def peak_megabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


# ---- The commands ----


def forward(options: argparse.Namespace) -> None:
    model, dataset, _ = load(options)
    variants = {
        "bare backbone, row by row, no head": bare_backbone,
        **{f"bare backbone, {size} tokens a batch": partial(batched_backbone, batch_tokens=size) for size in BATCHES},
        "scoring pass": score,
        "scoring pass, prompts not shared": partial(score, share_prompts=False),
        "batches of 4, all logits, top-100": plain_reference,
    }
    for run in variants.values():
        run(model, first(dataset, 4))
    seconds = take_turns({name: partial(run, model, dataset) for name, run in variants.items()}, options.rounds)
    bare, *batched = [name for name in variants if name.startswith("bare")]
    reference = list(variants)[-1]
    print("| | tokens/s | time / bare backbone | throughput / batches of 4 |\n|---|---:|---:|---:|")
    for name in variants:
        speed = dataset.lengths.sum() / statistics.median(seconds[name])
        print(f"| {name} | {speed:,.0f} | {ratio(seconds, name, bare):.2f} | {ratio(seconds, reference, name):.2f} |")
    moved = sum(4 * max(dataset.lengths[start : start + 4]) for start in range(0, len(dataset), 4))
    print(f"\nBatches of 4 in data order move {moved / dataset.lengths.sum():.2f} tokens for each real one.")
    body, _, head = operations(model, dataset)
    best = min((bare, *batched), key=lambda name: statistics.median(seconds[name]))
    floor = 1 + head / body
    print(
        f"Floor, body and head at the same speed without sharing prompts: {floor:.2f} x the bare backbone. The pass is "
        f"at {ratio(seconds, 'scoring pass', bare) / floor:.2f} x the floor of the bare backbone row by row, and at "
        f"{ratio(seconds, 'scoring pass', best) / floor:.2f} x that of the fastest one ({best})."
    )


def profile(options: argparse.Namespace) -> None:
    model, dataset, _ = load(options)
    score(model, first(dataset, 4))
    clocks = {name: Clock() for name in ("bare", "body", "kernel", "product", "trial")}
    whole = {}
    plain_linear = student.linear

    def linear_in_clock(*arguments: Any, **more: Any) -> Project:
        return clocks["product"].around(plain_linear(*arguments, **more))

    for name, share in (("scoring pass", True), ("scoring pass, prompts not shared", False)):
        for clock in clocks.values():
            clock.seconds = 0.0
        with (
            patch.object(model.base_model, "forward", clocks["body"].around(model.base_model.forward)),
            patch.object(student, "token_stats", clocks["kernel"].around(student.token_stats)),
            patch.object(student, "linear", linear_in_clock),
            patch.object(model_reader, "can_share", clocks["trial"].around(model_reader.can_share)),
        ):
            started = time.perf_counter()
            score(model, dataset, share_prompts=share)
            whole[name] = time.perf_counter() - started
        clocks["bare"].around(bare_backbone)(model, dataset)
        bare, body, kernel, product, trial = (clock.seconds for clock in clocks.values())
        parts = {
            "body": body,
            "head: product": product,
            "head: reduction": kernel - product,
            "everything else (batches, copies, Python)": whole[name] - body - kernel,
        }
        print(f"\n| {name} | seconds | share | of the bare backbone's {bare:.1f} s |\n|---|---:|---:|---:|")
        together = {"together": whole[name], "thereof trying whether prompts can be shared, once": trial}
        for part, seconds in {**parts, **together}.items():
            print(f"| {part} | {seconds:.2f} | {seconds / whole[name]:.1%} | {seconds / bare:.2f} |")
    report_operations(model, dataset, bare, product)


def operations(model: Any, dataset: ScoredDataset) -> tuple[float, float, float]:
    """FLOP of the body for all tokens, of its attention among them, and of the head for the scored positions."""
    inner = sum(weight.numel() for name, weight in model.base_model.named_parameters() if "embed" not in name)
    config = model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    # causal: a position attends to half of the others, once for the weights and once for the values
    attention = 2 * config.num_hidden_layers * width * float((dataset.lengths.astype(float) ** 2).sum())
    body = 2.0 * inner * float(dataset.lengths.sum()) + attention
    return body, attention, 2.0 * model.get_output_embeddings().weight.numel() * float(dataset.num_scored.sum())


def report_operations(model: Any, dataset: ScoredDataset, bare: float, product: float) -> None:
    """What head and body would take at one speed: the least that scoring all prompts can cost beside the bare body."""
    body, attention, scored = operations(model, dataset)
    print("\n| operations | body | of it attention | head, scored positions |\n|---|---:|---:|---:|")
    print(f"| TFLOP | {body / 1e12:.2f} | {attention / 1e12:.2f} | {scored / 1e12:.2f} |")
    print(f"| TFLOP/s | {body / bare / 1e12:.2f} | | {scored / product / 1e12:.2f} |")
    print(
        f"\nWith prompts not shared, scoring takes at least {1 + scored / body:.2f} x the bare backbone if head and "
        f"body run at the same speed, and {1 + product / bare:.2f} x with the product at the speed it has here."
    )


@dataclass
class Clock:
    """Seconds spent inside of some functions."""

    seconds: float = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **more: Any) -> Any:
            started = time.perf_counter()
            output = function(*arguments, **more)
            self.seconds += time.perf_counter() - started
            return output

        return timed


def kernel(options: argparse.Namespace) -> None:
    print("| columns × hidden | dtype | impl | kernel / product | MB above weight and states, 16k positions |")
    print("|---|---|---|---:|---:|")
    for vocab in options.columns:
        hidden = HIDDEN[vocab]
        for dtype in DTYPES:
            for impl in ("chunked", "compiled"):
                command = [sys.executable, __file__, "kernel", "--one", f"{vocab},{hidden},{dtype},{impl}"]
                command += ["--threads", str(options.threads), "--rounds", str(options.rounds)]
                row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(f"| {vocab:,} × {hidden} | {dtype} | {impl} | {row['ratio']:.2f} | {row['MB']:.0f} |", flush=True)


def kernel_once(vocab: int, hidden: int, dtype: torch.dtype, impl: Any, rounds: int) -> dict[str, float]:
    """In a process of its own: memory is a high-water mark, so what comes first must be the small thing."""
    torch.manual_seed(0)
    chunk = chunk_for(vocab)

    def head(columns: int) -> tuple[torch.Tensor, Project]:
        weight = torch.empty(columns, hidden, dtype=dtype).normal_(std=hidden**-0.5)  # no copies: they would count
        return weight, linear(weight, None, LogitTransform(), kept=operand_copy(weight))

    def run(positions: int, project: Project, columns: int) -> None:
        targets = torch.randint(columns, (positions,))
        token_stats(states[:positions], targets, project, chunk=chunk, impl=impl)

    states = torch.empty(16_384, hidden, dtype=dtype).normal_()
    run(2 * chunk, head(64)[1], 64)  # libraries and compilation take memory too, but not more for more columns
    before = peak_megabytes()
    weight, project = head(vocab)
    run(len(states), project, vocab)
    result = {"MB": peak_megabytes() - before - weight.nbytes / 1e6}

    def multiply() -> None:
        for start in range(0, 4 * chunk, chunk):
            project(states[start : start + chunk])

    multiply()
    seconds = take_turns({"kernel": lambda: run(4 * chunk, project, vocab), "product": multiply}, rounds)
    return {**result, "ratio": ratio(seconds, "kernel", "product")}


def scaling(options: argparse.Namespace) -> None:
    disable_progress_bars()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rng = np.random.default_rng(0)
    print("| samples (tiny model, about 200 tokens each) | µs a sample | thereof in the model |\n|---:|---:|---:|")
    for size in options.sizes:
        prompts = [rng.integers(512, size=80).tolist() for _ in range(max(1, size // 4))]
        rows = []
        for number in range(size):
            begin = prompts[number % len(prompts)]
            response = rng.integers(512, size=int(rng.integers(60, 180))).tolist()
            rows.append({"input_ids": begin + response, "labels": [-100] * len(begin) + response})
        dataset = ScoredDataset(Dataset.from_list(rows))
        inside = Clock()
        with patch.object(model, "forward", inside.around(model.forward)):
            started = time.perf_counter()
            score(model, dataset)
            seconds = time.perf_counter() - started
        print(f"| {size:,} | {1e6 * seconds / size:.0f} | {1e6 * inside.seconds / size:.0f} |", flush=True)


def padding(options: argparse.Namespace) -> None:
    _, dataset, _ = load(options)
    lengths = np.sort(dataset.lengths)[::-1]
    for tokens in (1024, 16_384, 65_536):
        moved = 0
        for block in blocks_of(lengths, np.arange(len(lengths)), 4 * tokens):
            some = lengths[block]
            moved += sum(len(batch) * int(some[batch].max()) for batch in token_batches(some, tokens))
        print(f"{tokens:,} tokens a batch: {moved / lengths.sum():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name in ("forward", "kernel", "profile", "scaling", "padding"):
        command = commands.add_parser(name)
        if name in ("forward", "profile", "padding"):
            add_student_and_traces(command)
            command.add_argument("--dtype", choices=DTYPES, default="float32")
        else:
            command.add_argument("--threads", type=int, default=torch.get_num_threads())
        if name in ("forward", "kernel"):
            command.add_argument("--rounds", type=int, default=3, help="interleaved repeats")
        if name == "kernel":
            command.add_argument("--columns", type=int, nargs="+", choices=HIDDEN, default=list(HIDDEN))
            command.add_argument("--one", help=argparse.SUPPRESS)  # what the subprocess is asked for
        if name == "scaling":
            command.add_argument("--sizes", type=int, nargs="+", default=[10**2, 10**3, 10**4])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "kernel" and options.one:
        vocab, hidden, dtype, impl = options.one.split(",")
        print(json.dumps(kernel_once(int(vocab), int(hidden), DTYPES[dtype], impl, options.rounds)))
        return
    what = {"forward": forward, "kernel": kernel, "profile": profile, "scaling": scaling, "padding": padding}
    what[options.what](options)


def add_student_and_traces(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", type=Path, help="a folder with a student (default: the demo's)")
    command.add_argument("--data", type=Path, help="traces, .jsonl or .jsonl.gz (default: the demo's)")
    command.add_argument("--prompts", type=int, default=12, help="groups to use")
    command.add_argument("--max-length", type=int, default=1024, help="tokens of a trace that are read")
    command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1: processor time is taken")


if __name__ == "__main__":
    main()
