"""The options of `distill-sampler trace`; the work is in `tracing.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill_sampler.cli.options import Config, CorrectColumn, Json, OnError, TrustRemoteCode, refusals


def trace(
    data: Annotated[
        list[str],
        typer.Argument(help="Responses: files (JSONL, JSON, Parquet), folders of them, or a data set on the hub."),
    ],
    teacher: Annotated[
        str, typer.Option(help="The teacher: a folder, the name of a model on the hub, or a store (.arrow).")
    ],
    student: Annotated[str, typer.Option(help="The student before distillation.")],
    distilled: Annotated[str, typer.Option(help="The student after distillation.")],
    output: Annotated[Path, typer.Option(help="HTML file; it needs no network and runs no script.")] = Path(
        "trace.html"
    ),
    table: Annotated[Path, typer.Option(help="Parquet file with one row for each sentence.")] = Path("trace.parquet"),
    alpha: Annotated[float, typer.Option(help="Largest difference at which probabilities count as equal.")] = 0.1,
    beta: Annotated[
        float, typer.Option(help="Difference beyond which a sentence counts as the teacher's or the student's.")
    ] = 0.1,
    bytes_per_token: Annotated[
        float | None, typer.Option(help="Normalise probabilities by this many bytes, not by each model's own tokens.")
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column with the prompt, as text or messages.")] = None,
    response_column: Annotated[str | None, typer.Option(help="Column with the response, as text or messages.")] = None,
    messages_column: Annotated[
        str | None, typer.Option(help="Column with whole conversations. The last answer is traced.")
    ] = None,
    candidates_column: Annotated[
        str | None, typer.Option(help="Column with several responses to the row's prompt.")
    ] = None,
    correct_column: CorrectColumn = None,
    split: Annotated[str, typer.Option(help="Split of a saved data set, or of one on the hub.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Subset of a data set on the hub that has several.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Read prompts without a chat template.")] = False,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a batch, padding included.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    shown: Annotated[int, typer.Option(min=0, help="Number of responses on the page; the table has all.")] = 30,
    on_error: Annotated[OnError, typer.Option(help="What to do with a row that cannot be used.")] = OnError.stop,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Find out which sentences of responses come from the teacher, from the student, or from neither.

    The three models read the responses one after the other, each in its own tokens and chat template. What they have
    read is kept beside the table, so the command can be repeated with other thresholds without reading again.
    """
    with refusals(as_json) as result:
        from distill_sampler.cli.tracing import Options, run
        from distill_sampler.metrics.provenance import CLASSES
        from distill_sampler.sources.candidates import Layout

        found = run(
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
        result.update(
            output=output,
            table=table,
            responses=len(found.traced),
            left_out=len(found.left_out),
            sentences=found.num_sentences,
            shares=dict(zip(CLASSES, found.shares.tolist(), strict=True)),
            flips=found.flips,
        )
