"""What Local Naturalness costs on real traces, as ratios within one run:
`python recipes/benchmarks/local_naturalness.py [options]`.

| column | what it is |
|---|---|
| tokens / response token | tokens that the student reads, with shared prompts counted once |
| tokens / global | the same, divided by the tokens of the whole samples: the time ratio that the tokens predict |
| time / global | time, divided by that of `GlobalNaturalness` for the same samples with the same scorer |
| time / predicted | time / global, divided by tokens / global |
| loop / time | how much longer a loop takes that runs one forward pass for each step's window |
| loop / tokens | how many times more tokens that loop reads |

The loop is the obvious first version: one row at a time, with the prompt in each, and all logits. With `--lean-loop`
the model computes only the logits of the step. Student, traces, options and measuring are those of `scoring.py`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scoring import DTYPES, load, ratio, take_turns
from transformers import AutoTokenizer

from distill_sampler import GlobalNaturalness, LocalNaturalness, ScoredDataset, Scorer
from distill_sampler.protocols import Metric

SCORER = Scorer(progress=False)


def score(model: Any, dataset: ScoredDataset, metric: Metric) -> tuple[np.ndarray[Any, Any], int]:
    """The samples' scores, and how many tokens the student read."""
    column, tokens = np.full(len(dataset), np.nan), 0
    for scored in SCORER.score(model, dataset, [metric], np.arange(len(dataset))):
        column[scored.indices] = scored.columns[metric.name]
        tokens += scored.tokens
    return column, tokens


def windows(dataset: ScoredDataset, index: int, metric: LocalNaturalness) -> Iterator[tuple[Any, int]]:
    """For each step of a sample: the tokens to read, and how many of the last ones are the step."""
    sample = dataset.sample(index)
    steps = metric.steps(sample)
    prompt = sample.input_ids[: steps[0][0]]
    for number, (start, stop) in enumerate(steps):
        width = metric.window if isinstance(metric.window, int) else math.ceil(metric.window * number)
        yield np.concatenate([prompt, sample.input_ids[steps[max(0, number - width)][0] : stop]]), stop - start


@torch.no_grad()
def one_window_at_a_time(
    model: Any, dataset: ScoredDataset, metric: LocalNaturalness, *, lean: bool = False
) -> np.ndarray[Any, Any]:
    means = []
    for index in range(len(dataset)):
        of_steps = []
        for tokens, length in windows(dataset, index, metric):
            row = torch.from_numpy(tokens)
            kept = length + 1 if lean else 0  # 0: all of them
            logits = model(input_ids=row[None], use_cache=False, logits_to_keep=kept).logits[0, -length - 1 : -1]
            log_probs = logits.float().log_softmax(-1)
            of_steps.append(log_probs.gather(1, row[-length:, None]).mean().item())
        means.append(np.mean(of_steps))
    return np.array(means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", dest="model", type=Path, help="a folder with a student (default: the demo's)")
    parser.add_argument("--data", type=Path, help="traces, .jsonl or .jsonl.gz (default: the demo's)")
    parser.add_argument("--prompts", type=int, default=4, help="groups to use")
    parser.add_argument("--samples", type=int, default=16, help="traces of them to use, drawn")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a trace that are read")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repeats")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1: processor time is taken")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--no-loop", dest="loop", action="store_false", help="leave the slow loop out")
    parser.add_argument("--lean-loop", action="store_true", help="the loop computes the step's logits alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, everything, _ = load(options)
    chosen = np.random.default_rng(0).permutation(len(everything))[: options.samples]
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    dataset = ScoredDataset(everything.rows.select(chosen), end_token_ids=[tokenizer.eos_token_id])
    metrics = [LocalNaturalness(window=window, tokenizer=tokenizer) for window in options.windows]

    print(f"{len(dataset)} of them, {dataset.num_scored.sum():,} response tokens", flush=True)

    variants: dict[str, Callable[[], Any]] = {"global": partial(score, model, dataset, GlobalNaturalness())}
    for metric in metrics:
        variants[f"{metric.window}"] = partial(score, model, dataset, metric)
        if options.loop:
            variants[f"{metric.window} in a loop"] = partial(
                one_window_at_a_time, model, dataset, metric, lean=options.lean_loop
            )
    seconds = take_turns(variants, options.rounds)

    _, global_tokens = score(model, dataset, GlobalNaturalness())
    head = ["window", "tokens / response token", "tokens / global", "time / global", "time / predicted", "loop / time"]
    print(f"| {' | '.join([*head, 'loop / tokens'])} |\n|{'---:|' * 7}")
    for metric in metrics:
        tokens = score(model, dataset, metric)[1]
        predicted, took = tokens / global_tokens, ratio(seconds, f"{metric.window}", "global")
        loop = ratio(seconds, f"{metric.window} in a loop", f"{metric.window}") if options.loop else math.nan
        of_loop = sum(len(row) for index in range(len(dataset)) for row, _ in windows(dataset, index, metric))
        print(
            f"| {metric.window} | {tokens / dataset.num_scored.sum():.2f} | {predicted:.2f} | {took:.2f} "
            f"| {took / predicted:.2f} | {loop:.2f} | {of_loop / tokens:.2f} |"
        )


if __name__ == "__main__":
    main()
