"""The options of `distill-sampler trace`; the work is in `tracing.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill_sampler.cli.options import Config, CorrectColumn, OnError, TrustRemoteCode, refusals


def trace(
    data: Annotated[list[str], typer.Argument(help="Responses: JSONL, JSON, Parquet, folders, or a hub name.")],
    teacher: Annotated[str, typer.Option(help="The teacher: a folder, or a name on the hub.")],
    student: Annotated[str, typer.Option(help="The student before distillation.")],
    distilled: Annotated[str, typer.Option(help="The student after it.")],
    output: Annotated[Path, typer.Option(help="HTML file; it needs no network and runs no script.")] = Path(
        "trace.html"
    ),
    table: Annotated[Path, typer.Option(help="Parquet file with one row for each sentence.")] = Path("trace.parquet"),
    alpha: Annotated[float, typer.Option(help="Probabilities that differ by no more count as equal.")] = 0.1,
    beta: Annotated[float, typer.Option(help="A larger difference makes a sentence the teacher's or student's.")] = 0.1,
    bytes_per_token: Annotated[
        float | None, typer.Option(help="Probability of a sentence per so many bytes, not per token of each model.")
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Text or messages of the prompt.")] = None,
    response_column: Annotated[str | None, typer.Option(help="Text or messages of the response.")] = None,
    messages_column: Annotated[str | None, typer.Option(help="Whole conversations; the last answer is traced.")] = None,
    candidates_column: Annotated[str | None, typer.Option(help="Several responses to the row's prompt.")] = None,
    correct_column: CorrectColumn = None,
    split: Annotated[str, typer.Option(help="Of a saved data set, or one on the hub.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Of a data set on the hub that has several.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="No chat template: prompts as they are.")] = False,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a batch, padding included.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    shown: Annotated[int, typer.Option(min=0, help="Responses on the page; the table has all.")] = 30,
    on_error: Annotated[OnError, typer.Option(help="What to do about a row that cannot be used.")] = OnError.stop,
    trust_remote_code: TrustRemoteCode = False,
    config: Config = None,
) -> None:
    """Say which sentences of responses come from the teacher, from the student, or from neither.

    The three models read the responses one after the other, each in its own tokens and chat template. What they have
    read is kept beside the table, so other thresholds read nothing again.
    """
    with refusals():
        from distill_sampler.cli.tracing import Options, run
        from distill_sampler.sources.candidates import Layout

        run(
            Options(
                data=data,
                teacher=teacher,
                student=student,
                distilled=distilled,
                output=output,
                table=table,
                layout=Layout(
                    prompt=prompt_column,
                    response=response_column,
                    messages=messages_column,
                    candidates=candidates_column,
                ),
                correct=correct_column,
                split=split,
                subset=subset,
                alpha=alpha,
                beta=beta,
                bytes_per_token=bytes_per_token,
                plain=plain,
                dtype=dtype,
                device=device,
                batch_tokens=batch_tokens,
                shown=shown,
                skip_bad=on_error is OnError.skip,
                trust_remote_code=trust_remote_code,
            )
        )
