"""The command line, `distill-sampler`. Heavy imports wait until a command runs, so that `--help` is fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill_sampler.cli.compare_command import compare
from distill_sampler.cli.options import (
    Config,
    GroupColumn,
    Json,
    OnError,
    TeacherColumn,
    TrustRemoteCode,
    complete_metrics,
    complete_policies,
    parse_shard,
    refusals,
)
from distill_sampler.cli.report_commands import report, teachers
from distill_sampler.cli.teacher_command import teacher_logprobs
from distill_sampler.cli.trace_command import trace

app = typer.Typer(
    no_args_is_help=True,
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
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Train a student on the traces that it can learn from."""


@app.command()
def demo(
    prompts: Annotated[
        int, typer.Option(min=1, help="Number of competition problems to train on, with a trace of each teacher.")
    ] = 5,
    max_length: Annotated[
        int, typer.Option(min=64, help="Longest prompt with its trace, in tokens; longer problems are left out.")
    ] = 768,
    epochs: Annotated[
        int, typer.Option(min=1, help="Number of epochs. The student scores all traces before each.")
    ] = 2,
    output: Annotated[Path, typer.Option(help="Folder for the model, the scores, the plans and the report.")] = Path(
        "distill-sampler-demo"
    ),
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of a LoRA.")] = False,
    control: Annotated[
        bool,
        typer.Option(
            "--control", help="Also train a student on random traces with the same mixture of teachers, to compare."
        ),
    ] = False,
    show: Annotated[bool, typer.Option("--open", help="Open the report in the browser at the end.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the plans and of training.")] = 0,
    as_json: Json = False,
) -> None:
    """Fine-tune a small student on real traces of four teachers, and choose the traces anew before each epoch.

    The data is real, and small enough for two CPU cores: SmolLM2-135M-Instruct learns competition mathematics from
    GPT-3.5, GPT-4, GPT-4 Turbo and PaLM 2. For each problem it trains on the trace with the best Rank-Surprisal Ratio.
    At the end it says whether what was chosen is correct, what KeepCorrect and chance would have chosen, and what the
    student learnt.
    """
    with refusals(as_json) as result:
        try:
            from distill_sampler.cli.demo import run
        except ImportError as error:
            raise ValueError(f"{error}. The demo needs pip install 'distill_sampler[demo]'.") from error
        run(
            prompts=prompts,
            max_length=max_length,
            epochs=epochs,
            output=output,
            full=full,
            control=control,
            show=show,
            seed=seed,
        )
        result.update(output=output, files=sorted(path.name for path in output.iterdir()))


@app.command()
def verify(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Checkpoint folders of a run, at least one for each epoch to compare.")
    ],
    log: Annotated[
        Path | None,
        typer.Option(help="Folder of the sample log. By default distill_sampler/ beside the checkpoint."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that a run trained on the samples that its checkpoints' plans list, in that order.

    The run must have recorded a sample log: attach(trainer, curriculum, sample_log=True). The exit code is 0 if log and
    plans agree, 1 if they do not, and 2 if a checkpoint or the log cannot be read.
    """
    with refusals(as_json, code=2) as result:
        from distill_sampler.cli.verify import run

        found = run(checkpoints, log, to_stderr=as_json)
        result.update(found)
    if not found["agree"]:
        raise typer.Exit(1)


@app.command()
def score(
    data: Annotated[
        list[str],
        typer.Argument(
            help="Files (JSONL plain, gz or zst; JSON; Parquet), folders of them, or a data set on the hub."
        ),
    ],
    model: Annotated[str, typer.Option(help="The student: a folder, or the name of a model on the hub.")],
    output: Annotated[Path, typer.Option(help="Parquet file for the scores.")] = Path("scores.parquet"),
    metrics: Annotated[
        str,
        typer.Option(
            help="Metrics, separated by commas: names, short ones (rsr, ln, gn, ifd), or calls such as "
            "'RankSurprisalRatio(rank_clip=50, name=rsr50)'.",
            autocompletion=complete_metrics,
        ),
    ] = "rank_surprisal_ratio,global_naturalness",
    prompt_column: Annotated[str | None, typer.Option(help="Column with the prompt, as text or messages.")] = None,
    response_column: Annotated[str | None, typer.Option(help="Column with the response, as text or messages.")] = None,
    messages_column: Annotated[str | None, typer.Option(help="Column with whole conversations.")] = None,
    candidates_column: Annotated[
        str | None, typer.Option(help="Column with several responses to the row's prompt.")
    ] = None,
    group_column: GroupColumn = None,
    teacher_column: TeacherColumn = None,
    split: Annotated[str, typer.Option(help="Split of a saved data set, or of one on the hub.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Subset of a data set on the hub that has several.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Read prompt and response as plain text, without a chat template.")
    ] = False,
    whole_text: Annotated[
        bool,
        typer.Option("--whole-text", help="Score all of a text, with its prompt, if no response can be found in it."),
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a chat template to use instead of the model's.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Truncate rows to this many tokens.")] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens in a batch, padding included. By default 1024 on a CPU and 16384 elsewhere."),
    ] = None,
    share_prompts: Annotated[
        bool,
        typer.Option("--share-prompts/--no-share-prompts", help="Read a prompt only once for all responses to it."),
    ] = True,
    compile_layers: Annotated[
        bool,
        typer.Option(
            "--compile-layers", help="Compile the model's layers: for small models on a GPU and millions of tokens."
        ),
    ] = False,
    rank_clip: Annotated[
        int | None, typer.Option(help="Largest rank that Rank-Surprisal Ratio counts (100 in the paper).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    autocast: Annotated[
        str | None,
        typer.Option(
            help="bfloat16 or float16: compute as trainers with bf16=True or fp16=True do, from float32 weights."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a model on the hub.")] = None,
    lora: Annotated[Path | None, typer.Option(help="Adapter to load on top of the model.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Score only the candidates of the first so many prompts.")
    ] = None,
    traces: Annotated[
        int, typer.Option(min=0, help="For this many prompts, the first ones, keep the scores of every token.")
    ] = 30,
    on_error: Annotated[OnError, typer.Option(help="What to do with a row that cannot be used.")] = OnError.stop,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Score only a share of the data, such as 3/64, on one of many machines. `merge` joins the files."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard scores that the output holds already.")
    ] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Score every response of a data set with a student.

    If the command is killed, or stopped by a row that cannot be used, run it again with the same model and settings: it
    continues where it stopped. Under `accelerate launch`, the processes share the work. With --shard, the file has the
    shard's number in its name: scores-03-of-64.parquet.
    """
    with refusals(as_json) as result:
        from distill_sampler.cli.score import run
        from distill_sampler.integrations.student import RowOptions

        found = run(
            data,
            model=model,
            output=output,
            metrics=metrics,
            split=split,
            subset=subset,
            rank_clip=rank_clip,
            overwrite=overwrite,
            options=RowOptions(
                prompt_column=prompt_column,
                response_column=response_column,
                messages_column=messages_column,
                candidates_column=candidates_column,
                group_column=group_column,
                teacher_column=teacher_column,
                plain=plain,
                whole_text=whole_text,
                chat_template=chat_template,
                max_length=max_length,
                batch_tokens=batch_tokens,
                share_prompts=share_prompts,
                compile_layers=compile_layers,
                dtype=dtype,
                autocast=autocast,  # type: ignore[arg-type]  # load_model refuses others
                device=device,
                revision=revision,
                lora=lora,
                trust_remote_code=trust_remote_code,
                prompts=prompts,
                traces=traces,
                on_error=on_error.value,
                shard=parse_shard(shard),
            ),
        )
        result.update(found)


@app.command()
def merge(
    files: Annotated[
        list[Path], typer.Argument(help="Files of all shards of one data set, or of several data sets; or a folder.")
    ],
    output: Annotated[Path, typer.Option(help="Parquet file for all scores.")] = Path("scores.parquet"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Join files of scores that the same student gave with the same settings.

    Files of `score --shard` are joined in the order of the data, as if one process had scored it, and none may be
    missing. Other files are joined one after the other.
    """
    with refusals(as_json) as result:
        from distill_sampler.cli.merge import run

        result.update(output=output, rows=run(files, output, overwrite=overwrite))


@app.command()
def select(
    scores: Annotated[Path, typer.Argument(help="File that `score` wrote, or the output folder of a run.")],
    policy: Annotated[
        list[str],
        typer.Option(
            help="Policy, such as 'BestOf(rsr, per=prompt_id)'. Repeat it to apply several in order.",
            autocompletion=complete_policies,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Training set to write: .jsonl or .parquet.")] = Path("selected.jsonl"),
    data: Annotated[list[str] | None, typer.Option(help="Where the scored data is now, if it has been moved.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the policies. By default the run's, or 0.")] = None,
    epoch: Annotated[int | None, typer.Option(help="Epoch of a run to plan. By default the last one.")] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Choose from scored data with the library's policies, and write a training set with the reason for each row.

    The output folder of a run holds no text. From it, the rows of the plan are listed by number and by your columns.
    """
    with refusals(as_json) as result:
        from distill_sampler.cli.select import run

        result.update(run(scores, policies=policy, output=output, data=data or [], seed=seed, epoch=epoch))


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Option(help="Student to measure. By default a random one of 135 million weights.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seconds: Annotated[float, typer.Option(min=0, help="How long to measure, in seconds.")] = 20.0,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show what is installed, and how fast scoring is on this machine compared with the limit."""
    with refusals(as_json) as result:
        from rich.console import Console

        from distill_sampler.cli.doctor import run

        say = Console(stderr=as_json)
        result.update(
            run(model=model, device=device, dtype=dtype, seconds=seconds, trust_remote_code=trust_remote_code, say=say)
        )


@app.command()
def recipes(
    copy: Annotated[
        Path | None, typer.Option(help="Folder to copy them into: scripts, their configurations, accelerate's.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")] = False,
    as_json: Json = False,
) -> None:
    """List the recipes that come with the library, or copy them."""
    with refusals(as_json) as result:
        from rich.console import Console

        from distill_sampler.cli.recipes import run

        result.update(run(copy, overwrite=overwrite, say=Console(stderr=as_json)))


app.command()(teachers)
app.command()(report)
app.command()(trace)
app.command()(teacher_logprobs)
app.command()(compare)
