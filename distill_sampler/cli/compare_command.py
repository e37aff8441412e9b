"""The options of `distill-sampler compare`; the work is in `cli/compare.py`."""

from __future__ import annotations

import io
from contextlib import nullcontext, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from distill_sampler.cli.options import (
    Config,
    CorrectColumn,
    GroupColumn,
    Json,
    TeacherColumn,
    TrustRemoteCode,
    refusals,
)


class Unit(StrEnum):
    """What a budget counts."""

    tokens = "tokens"
    samples = "samples"


def compare(
    data: Annotated[
        list[str] | None,
        typer.Argument(help="Candidates: files (JSONL, JSON, Parquet), folders of them, or a data set on the hub."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The student: a folder, or the name of a model on the hub.")] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for the runs and the tables. A comparison that was killed goes on here.")
    ] = Path("comparison"),
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="An arm by name, or your own as 'mine=KeepTop(rank_surprisal_ratio, fraction=0.3)'. Repeat it. By "
            "default the untrained student and the six core arms."
        ),
    ] = None,
    subject: Annotated[str, typer.Option(help="The arm in question, compared with the controls.")] = "rsr",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 5,
    budget: Annotated[int, typer.Option(min=1, help="What each arm trains on: so many response tokens.")] = 50_000,
    unit: Annotated[Unit, typer.Option(help="What the budget counts.")] = Unit.tokens,
    held_out: Annotated[int, typer.Option(min=1, help="Prompts of each seed to measure on.")] = 40,
    train_prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each seed to train on. By default all others.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(min=2, help="Use only so many prompts of the data.")] = None,
    margin: Annotated[
        float, typer.Option(help="Differences below this, in nats per token, count as none. State it before looking.")
    ] = 0.01,
    rounds: Annotated[int, typer.Option(min=2, help="How often rsr_rescored chooses.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="Constant after a warm-up.")] = 5e-5,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps of the warm-up.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a batch on each process.")] = 4,
    accumulation: Annotated[int, typer.Option(min=1, help="Batches in an optimizer step.")] = 1,
    bf16: Annotated[bool, typer.Option("--bf16/--no-bf16", help="Multiply in bfloat16.")] = True,
    metrics: Annotated[
        str, typer.Option(help="Metrics that your own arms read, if the bare name is not enough; see `score`.")
    ] = "",
    max_length: Annotated[
        int | None, typer.Option(help="Leave out prompts with a response that ends behind this many tokens.")
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column with the prompt, as text or messages.")] = None,
    response_column: Annotated[str | None, typer.Option(help="Column with the response, as text or messages.")] = None,
    human_column: Annotated[
        str | None, typer.Option(help="Column with a human solution to the prompt, for the guard.")
    ] = None,
    group_column: GroupColumn = None,
    teacher_column: TeacherColumn = None,
    correct_column: CorrectColumn = None,
    verifier: Annotated[
        str | None,
        typer.Option(
            help="Let each student answer the held-out prompts, and judge the answers: last_number (the last number is "
            "that of the human solution), or a function of yours as package.module:function."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of such an answer at most.")] = 512,
    plain: Annotated[bool, typer.Option("--plain", help="Read prompt and response without a chat template.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    pilot: Annotated[
        bool,
        typer.Option("--pilot", help="Say in minutes whether selection is worth it here, and what it takes to see."),
    ] = False,
    show: Annotated[
        Path | None, typer.Option(help="Only print the tables of this folder, or of a runs.jsonl; trains nothing.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Train the student with several ways to choose, on equal budgets, and say which differences are real.

    Arms with a name: none, random, matched_random (the subject's teachers), longest, lowest_surprisal, rsr, anti_rsr,
    local_naturalness, lark, best_single_teacher, all, rsr_rescored. Every run writes one small file; if the command is
    killed, run it again. Several may work on one folder at the same time. Under `accelerate launch`, the processes
    train together.
    """
    printed = io.StringIO()
    with refusals(as_json) as result, redirect_stdout(printed) if as_json else nullcontext():
        from distill_sampler.cli.compare import Options, run, show_runs

        if show is not None:
            show_runs(show)
            result.update(output=show, report=printed.getvalue())
            return
        if not data or model is None:
            raise ValueError("compare needs data and --model, or --show with a folder of results.")
        run(
            Options(
                data=data,
                model=model,
                output=output,
                arms=arm or (),
                subject=subject,
                seeds=seeds,
                budget=budget,
                unit=unit.value,
                held_out=held_out,
                train_prompts=train_prompts,
                prompts=prompts,
                margin=margin,
                rounds=rounds,
                learning_rate=learning_rate,
                warmup_steps=warmup_steps,
                batch_size=batch_size,
                accumulation=accumulation,
                bf16=bf16,
                metrics=metrics,
                max_length=max_length,
                prompt=prompt_column,
                response=response_column,
                human=human_column,
                group=group_column,
                teacher=teacher_column,
                correct=correct_column,
                verifier=verifier,
                max_new_tokens=max_new_tokens,
                plain=plain,
                device=device,
                pilot=pilot,
                trust_remote_code=trust_remote_code,
            )
        )
        result.update(output=output, report=printed.getvalue())
