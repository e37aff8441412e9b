"""The options of `distill-sampler teacher-logprobs`; the work is in `teacher_logprobs.py`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from distill_sampler.cli.options import Config, Json, OnError, TrustRemoteCode, refusals


class Form(StrEnum):
    """How a server is asked."""

    prompt_logprobs = "prompt_logprobs"
    echo = "echo"


def teacher_logprobs(
    data: Annotated[list[str], typer.Argument(help="Responses: JSONL, JSON, Parquet, folders, or a hub name.")],
    output: Annotated[Path, typer.Option(help="Store to write: an Arrow file (.arrow).")] = Path("teacher.arrow"),
    model: Annotated[
        str | None, typer.Option(help="Teacher that reads them: a folder, a name on the hub or a server's.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Server that runs --model: its OpenAI-compatible address, http://host:8000/v1.")
    ] = None,
    form: Annotated[
        Form, typer.Option(help="How the server is asked: prompt_logprobs (vLLM), or echo where it has that instead.")
    ] = Form.prompt_logprobs,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to the server at once.")] = 16,
    timeout: Annotated[float, typer.Option(help="Seconds that a request to the server may take.")] = 300.0,
    retries: Annotated[int, typer.Option(min=0, help="How often a failed request is sent again.")] = 6,
    key_variable: Annotated[str | None, typer.Option(help="Environment variable that holds the server's key.")] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Keep so many of the likeliest tokens in each place.")] = 0,
    logprobs_column: Annotated[
        str | None, typer.Option(help="Instead of --model: column with log-probabilities from generation.")
    ] = None,
    tokens_column: Annotated[str | None, typer.Option(help="Column with their token ids or texts.")] = None,
    logprobs_file: Annotated[
        list[str] | None, typer.Option(help="Files with these columns, joined with the data by --key-column.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The teacher's tokenizer, for token ids and for --endpoint.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Name of the teacher that wrote the columns.")] = None,
    temperature: Annotated[float, typer.Option(help="At which the columns' log-probabilities were taken.")] = 1.0,
    processed: Annotated[
        bool, typer.Option("--processed", help="They were taken after temperature, top-k and top-p.")
    ] = False,
    key_column: Annotated[str | None, typer.Option(help="Column that tells samples apart, such as an id.")] = None,
    min_coverage: Annotated[
        float, typer.Option(help="Share of a response's text that the teacher's tokens must cover.")
    ] = 0.9,
    system_prompt: Annotated[
        str | None, typer.Option(help="Put before conversations without one; for columns: what was put there.")
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column with the prompt, as text or messages.")] = None,
    response_column: Annotated[str | None, typer.Option(help="Column with the response, as text or messages.")] = None,
    messages_column: Annotated[str | None, typer.Option(help="Column with whole conversations.")] = None,
    candidates_column: Annotated[
        str | None, typer.Option(help="Column with several responses to the row's prompt.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a saved data set, or of one on the hub.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Subset of a data set on the hub that has several.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Read prompt and response as plain text, without a chat template.")
    ] = False,
    whole_text: Annotated[
        bool, typer.Option("--whole-text", help="Read all of a text, prompt included, if no response is found in it.")
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a chat template to use instead of the model's.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Truncate rows to this many tokens.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens in a batch, padding included.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a model on the hub.")] = None,
    lora: Annotated[Path | None, typer.Option(help="Adapter to load on top of the model.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    on_error: Annotated[OnError, typer.Option(help="What to do with a response that cannot be used.")] = OnError.stop,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard what the output holds already.")] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Keep a teacher's log-probabilities of every response, computed once.

    A teacher reads the responses (--model; in an engine with --endpoint), or its numbers are taken from a column that
    was written when it generated them (--logprobs-column). If the command is killed or stopped, run it again: it
    continues where it stopped.
    """
    with refusals(as_json) as result:
        from distill_sampler.cli.teacher_logprobs import Options, run
        from distill_sampler.sources.candidates import Layout

        rows = run(
            Options(
                data=data,
                output=output,
                model=model,
                endpoint=endpoint,
                form=form.value,
                concurrency=concurrency,
                timeout=timeout,
                retries=retries,
                key_variable=key_variable,
                top_k=top_k,
                logprobs_column=logprobs_column,
                tokens_column=tokens_column,
                logprobs_file=logprobs_file or [],
                tokenizer=tokenizer,
                teacher=teacher,
                temperature=temperature,
                processed=processed,
                key_column=key_column,
                min_coverage=min_coverage,
                system_prompt=system_prompt,
                layout=Layout(
                    prompt=prompt_column,
                    response=response_column,
                    messages=messages_column,
                    candidates=candidates_column,
                ),
                split=split,
                subset=subset,
                plain=plain,
                whole_text=whole_text,
                chat_template=chat_template,
                max_length=max_length,
                batch_tokens=batch_tokens,
                dtype=dtype,
                device=device,
                revision=revision,
                lora=lora,
                trust_remote_code=trust_remote_code,
                skip_bad=on_error is OnError.skip,
                overwrite=overwrite,
            )
        )
        result.update(output=output, responses=rows)
