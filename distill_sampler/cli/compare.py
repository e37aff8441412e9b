"""`distill-sampler compare`: loads the student and the data, runs the comparison, writes tables and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from distill_sampler.cli.score import join, quiet
from distill_sampler.compare.arms import CONTROLS, CORE, parse_arms
from distill_sampler.compare.budget import Budget
from distill_sampler.compare.candidates import gather, prepare
from distill_sampler.compare.generated import verifier
from distill_sampler.compare.pilot import pilot_arms, pilot_report
from distill_sampler.compare.runner import Comparison, metrics_for, runs_in, scoring_cost
from distill_sampler.compare.student import Training
from distill_sampler.compare.table import costs, picture, tables
from distill_sampler.contract import checked_metrics
from distill_sampler.integrations.loading import load_model, load_tokenizer, locate, model_files, pick_device
from distill_sampler.integrations.transformers import end_token_ids
from distill_sampler.protocols import Metric
from distill_sampler.serialize import hash_of, write_atomically
from distill_sampler.sources.candidates import Layout
from distill_sampler.sources.files import Sources
from distill_sampler.specs import parse_metrics


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command was asked for; see `compare_command.compare` for each."""

    data: Sequence[str]
    model: str
    output: Path
    arms: Sequence[str] = ()
    subject: str = "rsr"
    seeds: int = 5
    budget: int = 50_000
    unit: Literal["tokens", "samples"] = "tokens"
    held_out: int = 40
    train_prompts: int | None = None
    prompts: int | None = None
    margin: float = 0.01
    rounds: int = 2
    learning_rate: float = 5e-5
    warmup_steps: int = 3
    batch_size: int = 4
    accumulation: int = 1
    bf16: bool = True
    metrics: str = ""
    max_length: int | None = None
    prompt: str | None = None
    response: str | None = None
    human: str | None = None
    group: str | None = None
    teacher: str | None = None
    correct: str | None = None
    verifier: str | None = None
    max_new_tokens: int = 512
    plain: bool = False
    device: str = "auto"
    pilot: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.margin > 0:
            raise ValueError(f"--margin {self.margin}: give a positive number of nats per token.")


def run(options: Options) -> None:
    """Make the runs that are missing, and write what they say.

    Raises:
        ValueError: an option, the data or the model cannot be used; the message names it and the cure.
    """
    verify = None if options.verifier is None else verifier(options.verifier, human=options.human)
    quiet()
    device = pick_device(options.device)
    ranks = join(device)
    say = Console(stderr=True, quiet=ranks.rank > 0, soft_wrap=True)
    arms = parse_arms(options.arms or (pilot_arms(options.subject) if options.pilot else CORE), rounds=options.rounds)
    subject = arms.get(options.subject) or parse_arms([options.subject], rounds=options.rounds)[options.subject]
    planned = [*arms.values(), *([subject] if any(arm.kind == "matched" for arm in arms.values()) else [])]
    metrics = metrics_for(planned, _metrics(options.metrics))
    found = gather(
        Sources(list(options.data)),
        Layout(prompt=options.prompt, response=options.response, group=options.group, teacher=options.teacher),
        arms=planned,
        correct=options.correct,
        human=options.human,
    )
    folder, commit = locate(options.model)
    tokenizer = load_tokenizer(
        options.model, revision=commit, chat_template=None, trust_remote_code=options.trust_remote_code
    )
    if tokenizer.pad_token_id is None:  # any will do: padding is neither read nor trained on
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)

    def load() -> Any:
        return load_model(
            options.model,
            revision=commit,
            dtype="float32",
            device=device,
            trust_remote_code=options.trust_remote_code,
        )

    end_tokens = end_token_ids(tokenizer, load())
    candidates = prepare(
        found,
        tokenizer,
        end_token_ids=end_tokens,
        plain=options.plain,
        max_length=options.max_length,
        correct=options.correct,
        human=options.human,
        prompts=options.prompts,
    )
    for note in candidates.notes:
        say.print(note, markup=False, highlight=False)
    training = Training(
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        warmup_steps=options.warmup_steps,
        bf16=options.bf16,
    )
    files = model_files(folder, None)
    comparison = Comparison(
        folder=options.output,
        candidates=candidates,
        tokenizer=tokenizer,
        load=load,
        arms=arms,
        subject=subject,
        metrics={name: metric.with_tokenizer(tokenizer) for name, metric in metrics.items()},
        seeds=options.seeds,
        budget=Budget(amount=options.budget, unit=options.unit, step=training.step(ranks.world_size)),
        training=training,
        held_out=options.held_out,
        train_prompts=options.train_prompts,
        margin=options.margin,
        identity={"student": hash_of(*(f"{name} {files[name]}".encode() for name in sorted(files)))},
        ranks=ranks,
        verify=verify,
        end_token_ids=end_tokens,
        verified_by=options.verifier or "",
        max_new_tokens=options.max_new_tokens,
        say=lambda line: say.print(line, markup=False, highlight=False),
    )
    complete = comparison.run()
    if ranks.rank > 0:
        return
    if not complete:
        say.print("Other processes are making the remaining runs. Run this again for the tables.")
        if not any((options.output / "runs").glob("*.json")):
            return
    write_results(options.output)
    if options.pilot:
        print(pilot_report(comparison, runs_in(options.output)))
    else:
        print(tables_of(options.output))


def tables_of(results: Path) -> str:
    """The tables of a folder of runs, or of its `runs.jsonl`."""
    return tables(runs_in(results), **_question(results))


def show_runs(results: Path) -> None:
    """Print the tables of a folder of runs, or of its `runs.jsonl`; of a folder, also write them.

    Raises:
        ValueError: it holds no run.
    """
    if results.is_dir():
        write_results(results)
    print(tables_of(results))


def write_results(folder: Path) -> None:
    """Write `table.md`, `costs.md`, `runs.jsonl`, and with two seeds `comparison.svg`."""
    runs, question = runs_in(folder), _question(folder)
    head = {"comparison": json.loads((folder / "comparison.json").read_text(encoding="utf-8"))}
    lines = [json.dumps(head, sort_keys=True), *(run.as_json() for run in runs)]
    texts = {
        "table.md": tables(runs, **question),
        "costs.md": costs(runs, scoring_cost(folder)),
        "runs.jsonl": "\n".join(lines) + "\n",
    }
    if len({run.seed for run in runs if run.arm == question["subject"]}) > 1:
        texts["comparison.svg"] = picture(runs, **question)
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())


def _question(results: Path) -> dict[str, Any]:
    """The subject, its controls and the margin, as they were fixed when the comparison began."""
    if results.is_dir():
        kept = json.loads((results / "comparison.json").read_text(encoding="utf-8"))
    else:
        kept = json.loads(results.read_text(encoding="utf-8").splitlines()[0])["comparison"]
    facts = kept["facts"]
    controls = [name for name in CONTROLS if name != facts["subject name"]]
    return {"subject": facts["subject name"], "controls": controls, "margin": facts["margin"]}


def _metrics(own: str) -> dict[str, Metric]:
    """All metrics that need no argument, by name, and the user's."""
    from distill_sampler import metrics as every

    known: dict[str, Metric] = {}
    for name in every.METRICS:
        try:
            metric = getattr(every, name)()
        except (TypeError, ValueError, ImportError):  # it needs a second model, or a package
            continue
        known[metric.name] = metric
    return known | (checked_metrics(parse_metrics(own)) if own else {})
