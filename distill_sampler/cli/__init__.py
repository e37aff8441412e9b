"""The command line, `distill-sampler`. Heavy imports wait until a command runs, so that `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill_sampler.cli.options import (
    Config,
    CorrectColumn,
    DomainColumn,
    GroupColumn,
    OnError,
    TeacherColumn,
    TrustRemoteCode,
    refusals,
)
from distill_sampler.cli.trace_command import trace

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Train a student on the traces that it can learn from.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from distill_sampler import __version__

        typer.echo(f"distill-sampler {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Say which version this is.")
    ] = False,
) -> None:
    """Train a student on the traces that it can learn from."""


@app.command()
def demo(
    prompts: Annotated[int, typer.Option(min=1, help="Competition problems, four teachers' traces each.")] = 12,
    max_length: Annotated[
        int, typer.Option(min=64, help="Tokens of prompt and trace; problems with longer traces are left out.")
    ] = 640,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs; the student scores all traces before each.")] = 2,
    output: Annotated[Path, typer.Option(help="Folder for the model, scores, plans and picture.")] = Path(
        "distill-sampler-demo"
    ),
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of a LoRA.")] = False,
    seed: Annotated[int, typer.Option(help="Of the plans and the training.")] = 0,
) -> None:
    """Fine-tune a small student on real traces of four teachers, choosing anew before each epoch.

    Real input, small enough for two CPU cores: SmolLM2-135M-Instruct learns competition mathematics from GPT-3.5,
    GPT-4, GPT-4 Turbo and PaLM 2. For each problem it trains on the trace with the best Rank-Surprisal Ratio.
    """
    from distill_sampler.cli.demo import run

    try:
        run(prompts=prompts, max_length=max_length, epochs=epochs, output=output, full=full, seed=seed)
    except ValueError as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


@app.command()
def verify(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoint folders of a run, one or more of each epoch.")],
    log: Annotated[
        Path | None, typer.Option(help="Folder of the sample log; left out: distill_sampler/ beside the checkpoint.")
    ] = None,
) -> None:
    """Say whether the samples that a run recorded are those that its checkpoints hold the order of.

    The run records them with attach(trainer, curriculum, sample_log=True). Ends with 0 if they agree, with 1 if not,
    and with 2 if a checkpoint or the log cannot be read.
    """
    from distill_sampler.cli.verify import run

    try:
        agree = run(checkpoints, log)
    except ValueError as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(2) from error
    if not agree:
        raise typer.Exit(1)


@app.command()
def score(
    data: Annotated[list[str], typer.Argument(help="JSONL (plain, gz, zst), JSON, Parquet, folders, or a hub name.")],
    model: Annotated[str, typer.Option(help="The student: a folder, or a name on the hub.")],
    output: Annotated[Path, typer.Option(help="Parquet file for the scores.")] = Path("scores.parquet"),
    metrics: Annotated[
        str, typer.Option(help="Names, or calls such as 'RankSurprisalRatio(rank_clip=50, name=rsr50)'.")
    ] = "rank_surprisal_ratio,global_naturalness",
    prompt_column: Annotated[str | None, typer.Option(help="Text or messages of the prompt.")] = None,
    response_column: Annotated[str | None, typer.Option(help="Text or messages of the response.")] = None,
    messages_column: Annotated[str | None, typer.Option(help="Whole conversations.")] = None,
    candidates_column: Annotated[str | None, typer.Option(help="Several responses to the row's prompt.")] = None,
    group_column: GroupColumn = None,
    teacher_column: TeacherColumn = None,
    split: Annotated[str, typer.Option(help="Of a saved data set, or one on the hub.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Of a data set on the hub that has several.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="No chat template: prompt and response as they are.")] = False,
    whole_text: Annotated[
        bool, typer.Option("--whole-text", help="Score all of a text in which no response is found, the prompt too.")
    ] = False,
    chat_template: Annotated[Path | None, typer.Option(help="File with a chat template to use instead.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens after which a row is cut off.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a batch, padding included: 2048 on a CPU, else 16384.")
    ] = None,
    share_prompts: Annotated[
        bool,
        typer.Option("--share-prompts/--no-share-prompts", help="Read a prompt once for all responses to it, or not."),
    ] = True,
    rank_clip: Annotated[int | None, typer.Option(help="Ranks above it count as this (RSR; 100 in the paper).")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Of a model on the hub.")] = None,
    lora: Annotated[Path | None, typer.Option(help="Adapter to put on the model.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Score the candidates of so many prompts only, the first ones.")
    ] = None,
    traces: Annotated[
        int, typer.Option(min=0, help="Prompts (the first ones) whose candidates are kept token by token.")
    ] = 30,
    on_error: Annotated[OnError, typer.Option(help="What to do about a row that cannot be used.")] = OnError.stop,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over, whatever is there.")] = False,
    config: Config = None,
) -> None:
    """Let a student score every response of a data set.

    Killed at any point, or stopped by a row that cannot be used, it goes on when run again with the same model and
    settings. Under `accelerate launch` the processes share the work.
    """
    with refusals():
        from distill_sampler.cli.score import Options, run
        from distill_sampler.sources.candidates import Layout

        run(
            Options(
                data=data,
                model=model,
                output=output,
                metrics=metrics,
                layout=Layout(
                    prompt=prompt_column,
                    response=response_column,
                    messages=messages_column,
                    candidates=candidates_column,
                    group=group_column,
                    teacher=teacher_column,
                ),
                split=split,
                subset=subset,
                plain=plain,
                whole_text=whole_text,
                chat_template=chat_template,
                max_length=max_length,
                batch_tokens=batch_tokens,
                share_prompts=share_prompts,
                rank_clip=rank_clip,
                dtype=dtype,
                device=device,
                revision=revision,
                lora=lora,
                trust_remote_code=trust_remote_code,
                traces=traces,
                prompts=prompts,
                on_error=on_error.value,
                overwrite=overwrite,
            )
        )


@app.command()
def teachers(
    scores: Annotated[Path, typer.Argument(help="What `score` wrote, or a run's folder.")],
    metric: Annotated[str | None, typer.Option(help="The metric that ranks.")] = None,
    teacher_column: TeacherColumn = None,
    group_column: GroupColumn = None,
    domain_column: DomainColumn = None,
    correct_column: CorrectColumn = None,
    epoch: Annotated[int | None, typer.Option(help="Which pass of a run; the last if left out.")] = None,
    shared_prompts: Annotated[
        bool, typer.Option("--shared-prompts", help="Compare on the prompts that all teachers answered.")
    ] = False,
    config: Config = None,
) -> None:
    """Rank teachers by what the student makes of their responses."""
    with refusals():
        from distill_sampler.cli.teachers import run

        run(
            scores,
            metric=metric,
            epoch=epoch,
            shared=shared_prompts,
            teacher=teacher_column,
            group=group_column,
            domain=domain_column,
            correct=correct_column,
        )


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="What `score` wrote, or a run's folder.")],
    output: Annotated[Path, typer.Option(help="HTML file; it needs no network.")] = Path("report.html"),
    policy: Annotated[
        list[str] | None, typer.Option(help="Whose choice is shown; the run's, or the best of each prompt if left out.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="The metric that ranks.")] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    teacher_column: TeacherColumn = None,
    group_column: GroupColumn = None,
    domain_column: DomainColumn = None,
    correct_column: CorrectColumn = None,
    seed: Annotated[int, typer.Option(help="Of the policies.")] = 0,
    config: Config = None,
) -> None:
    """Draw the scores as one HTML page: teachers, distributions, the choice, traces token by token."""
    with refusals():
        from distill_sampler.report.page import write_report
        from distill_sampler.specs import parse_policies

        write_report(
            source,
            output,
            title=title,
            policies=parse_policies(policy or []),
            seed=seed,
            metric=metric,
            teacher=teacher_column,
            group=group_column,
            domain=domain_column,
            correct=correct_column,
        )
        typer.echo(f"{output} ({output.stat().st_size / 1e6:.1f} MB): open it in a browser.")


@app.command()
def select(
    scores: Annotated[Path, typer.Argument(help="What `score` wrote, or a run's folder.")],
    policy: Annotated[
        list[str], typer.Option(help="Such as 'BestOf(rank_surprisal_ratio, per=prompt_id)'; several apply in order.")
    ],
    output: Annotated[Path, typer.Option(help="Training set to write: .jsonl or .parquet.")] = Path("selected.jsonl"),
    data: Annotated[list[str] | None, typer.Option(help="Where the data lies, if not where it was scored.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the policies; the run's, or 0, if left out.")] = None,
    epoch: Annotated[int | None, typer.Option(help="Which epoch of a run; the last if left out.")] = None,
    config: Config = None,
) -> None:
    """Choose from scored data with the library's policies, and write a training set with the reason for each row.

    A run's folder holds no text: the rows of its plan are listed by number and by your columns.
    """
    with refusals():
        from distill_sampler.cli.select import run

        run(scores, policies=policy, output=output, data=data or [], seed=seed, epoch=epoch)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="Test with this student; a random one of 135M if left out.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seconds: Annotated[float, typer.Option(min=0, help="How long to measure.")] = 20.0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say what is installed and how fast scoring is here, with the limit beside it."""
    with refusals():
        from distill_sampler.cli.doctor import run

        run(model=model, device=device, dtype=dtype, seconds=seconds, trust_remote_code=trust_remote_code)


app.command()(trace)
