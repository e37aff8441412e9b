"""`distill-sampler teacher-logprobs`: keeps a teacher's log-probabilities of all responses, computed once.

Either a teacher reads the responses, in this process or in an engine (`teacher_sources.py`), or the numbers are taken
from columns that were written at generation time (`teacher_columns.py`). All go through one job (`teacher_job.py`) into
one store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from distill_sampler import Scorer, __version__
from distill_sampler.artifacts.score_output import Origin, ScoreOutput
from distill_sampler.cli.score import join, quiet
from distill_sampler.cli.teacher_columns import Columns, FromColumns, LogprobFiles
from distill_sampler.cli.teacher_job import TeacherJob, check_keys
from distill_sampler.cli.teacher_sources import Ask, FromReader, TeacherSource, engine_reads, model_reads
from distill_sampler.engines.completions import Form
from distill_sampler.engines.endpoint import EndpointReader
from distill_sampler.engines.writing import VERSION
from distill_sampler.integrations.loading import (
    load_model,
    load_tokenizer,
    locate,
    model_files,
    pick_device,
    pick_dtype,
)
from distill_sampler.reading.model_reader import ModelReader
from distill_sampler.reading.token_stats import fastest, usual_batch_tokens
from distill_sampler.rows.chunks import Intake
from distill_sampler.serialize import digest, hash_of, require_writable
from distill_sampler.sources.candidates import Layout
from distill_sampler.sources.encoding import Encoder, choose_template
from distill_sampler.sources.files import Sources
from distill_sampler.sources.templates import end_token_ids


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's options."""

    data: Sequence[str]
    """Paths, and names of data sets on the hub."""
    output: Path
    """Arrow file for the store."""
    model: str | None = None
    """The teacher that reads: a folder, or the name of a model on the hub. With an endpoint, its name there."""
    endpoint: str | None = None
    """The address of the engine that runs the teacher; None: it is loaded into this process."""
    form: Form = "prompt_logprobs"
    """How the engine is asked."""
    concurrency: int = 16
    """Requests to the engine that are under way at once."""
    timeout: float = 300.0
    """Seconds that a request may take."""
    retries: int = 6
    """How often a failed request is sent again."""
    key_variable: str | None = None
    """The environment variable with the engine's key."""
    top_k: int = 0
    """Likeliest tokens to keep for each place."""
    logprobs_column: str | None = None
    """Column with the log-probabilities that were written at generation time."""
    tokens_column: str | None = None
    """Column with their token ids or texts."""
    logprobs_file: Sequence[str] = ()
    """Files that hold these columns, if the data does not."""
    tokenizer: str | None = None
    """The teacher's tokenizer, for columns of token ids, and for an endpoint; None: there, the model's name is its."""
    teacher: str | None = None
    """Who wrote the columns: the name that is recorded."""
    temperature: float = 1.0
    """At which the columns' log-probabilities were taken."""
    processed: bool = False
    """Whether they were taken after temperature, top-k and top-p."""
    key_column: str | None = None
    """Column that tells samples apart."""
    min_coverage: float = 0.9
    """Share of a response's text that the teacher's tokens must cover."""
    system_prompt: str | None = None
    """Put before conversations that have none; for columns: what was put there."""
    layout: Layout = field(default_factory=Layout)
    """The columns that the user has named."""
    split: str = "train"
    """Split of a saved data set, or of one on the hub."""
    subset: str | None = None
    """Subset of a data set on the hub."""
    revision: str | None = None
    """Revision of a model on the hub."""
    lora: Path | None = None
    """Adapter to load on top of the model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    chat_template: Path | None = None
    """File with a chat template to use instead of the model's."""
    plain: bool = False
    """Read prompt and response as plain text, without a chat template."""
    whole_text: bool = False
    """Read all of a text in which no response can be found."""
    dtype: str = "auto"
    """The dtype of the model's weights, or `"auto"`."""
    device: str = "auto"
    """The device, or `"auto"`."""
    batch_tokens: int | None = None
    """Tokens in a batch, padding included."""
    max_length: int | None = None
    """Truncate rows to this many tokens; None: never."""
    skip_bad: bool = False
    """Leave a response that cannot be used without numbers, instead of stopping there."""
    overwrite: bool = False
    """Discard what the output holds already."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.logprobs_column is None):
            raise ValueError(
                "Give either --model, a teacher that reads the responses, or --logprobs-column, the column with the "
                "log-probabilities that it wrote when it generated them."
            )
        if not 0 <= self.min_coverage <= 1:
            raise ValueError(f"--min-coverage {self.min_coverage}: give a share from 0 to 1, such as 0.9.")
        if self.logprobs_file and self.key_column is None:
            raise ValueError(
                "--logprobs-file is joined with the data by a key: name the column that both have with --key-column."
            )
        if self.model is not None and (self.logprobs_file or self.tokens_column):
            raise ValueError("--logprobs-file and --tokens-column are for columns; leave them or --model out.")
        if self.model is None and self.top_k:
            raise ValueError("--top-k needs a teacher that reads (--model); columns are taken as they are.")
        if self.endpoint is not None:
            if self.model is None:
                raise ValueError("--endpoint asks a server for a model: give its name there with --model.")
            for option, given in {
                "--lora": self.lora is not None,
                "--dtype": self.dtype != "auto",
                "--device": self.device != "auto",
                "--batch-tokens": self.batch_tokens is not None,
            }.items():
                if given:
                    raise ValueError(f"{option} is the server's business with --endpoint. Leave it out.")
        elif self.model is not None and self.tokenizer is not None:
            raise ValueError("--tokenizer is for columns and for --endpoint; a model is loaded with its own.")


def run(options: Options) -> int:
    """Make the store. Returns how many responses it has.

    Raises:
        ValueError: an option, the data or the model cannot be used; the message names it and the cure.
    """
    quiet()
    device = pick_device(options.device)
    ranks = join(device)
    say = Console(stderr=True, quiet=ranks.rank > 0, soft_wrap=True)
    sources = Sources(options.data, split=options.split, subset=options.subset)
    require_writable(options.output, ".arrow")
    columns = beside = None
    if ranks.world_size > 1 and (options.logprobs_column is not None or options.endpoint is not None):
        raise ValueError(
            "Columns are read, and a server is asked, by one process: run the command without accelerate launch. "
            "(--concurrency is the number of requests to a server at once.)"
        )
    if options.logprobs_column is not None:
        columns = Columns(logprobs=options.logprobs_column, tokens=options.tokens_column, key=options.key_column)
        if options.logprobs_file:
            copy = options.output.with_name(options.output.name + ".logprobs")
            found = Sources(options.logprobs_file, split=options.split)
            beside = LogprobFiles(sources=found, columns=columns, copy=copy, say=say.print)
    read = [options.key_column] if options.key_column else []
    intake = Intake(
        sources,
        options.layout,
        read=columns.names if columns and not beside else read,
        prompts=None,
        traces=0,
        on_error="skip" if options.skip_bad else "stop",
        say=say,
    )
    if options.key_column is not None:
        check_keys(intake, options.key_column, beside)
    if columns is not None:
        origin, source, facts = _from_columns(options, columns, beside)
    elif options.endpoint is not None:
        origin, source, facts = _from_endpoint(options, intake, say)
    else:
        origin, source, facts = _from_model(options, intake, say)

    def origin_of_data() -> Origin:
        return Origin(**origin(), data=sources.contents(), rows={"layout": _told(options.layout)})

    output = ScoreOutput(options.output, origin_of_data, overwrite=options.overwrite, ranks=ranks)
    if output.complete:
        say.print(f"{options.output} already holds this teacher's log-probabilities of this data; nothing to do.")
    else:
        job = TeacherJob(
            source=source,
            intake=intake,
            output=output,
            top_k=options.top_k,
            key=options.key_column,
            min_coverage=options.min_coverage,
            skip_bad=options.skip_bad,
            say=say,
        )
        paths = [str(Path(name).resolve()) if Path(name).exists() else name for name in options.data]
        more = {"key_column": options.key_column, "min_coverage": options.min_coverage, "version": __version__}
        job.run({**facts, **more, "system_prompt": options.system_prompt, "paths": paths})
    if beside is not None:
        beside.copy.unlink(missing_ok=True)
    return output.rows


Made = tuple[Any, TeacherSource, dict[str, Any]]
"""What gives the origin's fields, the source, and what the numbers belong to."""


def _from_columns(options: Options, columns: Columns, beside: LogprobFiles | None) -> Made:
    tokenizer = None
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(
            options.tokenizer,
            revision=options.revision,
            chat_template=None,
            trust_remote_code=options.trust_remote_code,
        )
    elif options.tokens_column is None:
        raise ValueError(
            "Without --tokens-column the responses are tokenised again to find the tokens: name the teacher's "
            "tokenizer with --tokenizer."
        )
    teacher = options.teacher or options.tokenizer or "teacher"
    facts: dict[str, Any] = {
        "model": teacher,
        "revision": options.revision,
        "temperature": options.temperature,
        "processed": options.processed,
        "numerics": {},
        "template": None,
        "tokenizer": None if tokenizer is None else _tokenizer_hash(tokenizer),
        "source": "columns",
    }
    settings = {
        "schema": VERSION,
        "teacher": teacher,
        **{name: facts[name] for name in ("temperature", "processed", "tokenizer")},
        "columns": columns.names,
        "system_prompt": options.system_prompt,
        "logprobs_file": [content for _, content in beside.sources.contents()] if beside else None,
    }

    def origin() -> dict[str, Any]:
        return {"model": teacher, "files": {}, "settings": settings}

    return origin, FromColumns(columns, tokenizer, beside), facts


def _from_model(options: Options, intake: Intake, say: Console) -> Made:
    assert options.model is not None
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    folder, commit = locate(options.model, revision=options.revision)
    revision = commit or options.revision
    tokenizer, template = _tokenizer_and_template(options, options.model, revision, intake, say)
    model = load_model(
        options.model,
        revision=revision,
        dtype=dtype,
        device=device,
        lora=options.lora,
        trust_remote_code=options.trust_remote_code,
    )
    vocabulary = model.config.get_text_config().vocab_size
    if options.top_k > vocabulary:
        raise ValueError(f"--top-k {options.top_k}: the teacher's vocabulary has {vocabulary} tokens.")
    batch_tokens = options.batch_tokens or usual_batch_tokens(device)
    impl = fastest(device, intake.sources.size // 4 * vocabulary)
    reader = ModelReader(model, frozen=False, batch_tokens=batch_tokens, impl=impl, top_k=options.top_k)
    settings = {"dtype": dtype, **_settings_of_reading(options, reader.numerics, tokenizer, template)}
    files = model_files(folder, options.lora)

    def origin() -> dict[str, Any]:
        lora = str(options.lora) if options.lora else None
        return {"model": options.model, "lora": lora, "commit": commit, "files": files, "settings": settings}

    ask = model_reads(reader, Scorer(batch_tokens=batch_tokens, progress=False, impl=impl))
    source = _reading(options, ask, reader.positions, tokenizer, template, end_token_ids(tokenizer, model), known=True)
    told = {"revision": revision, "weights": digest(files), "source": "model"}
    return origin, source, {**_facts_of_reading(options, settings, tokenizer), **told}


def _from_endpoint(options: Options, intake: Intake, say: Console) -> Made:
    assert options.model is not None
    assert options.endpoint is not None
    try:
        tokenizer, template = _tokenizer_and_template(
            options, options.tokenizer or options.model, options.revision, intake, say
        )
    except ValueError as error:
        if options.tokenizer is None:
            raise ValueError(f"{error} Or name the tokenizer of the server's model with --tokenizer.") from None
        raise
    reader = EndpointReader(
        options.endpoint,
        model=options.model,
        tokenizer=tokenizer,
        revision=options.revision,
        form=options.form,
        top_k=options.top_k,
        concurrency=options.concurrency,
        timeout=options.timeout,
        retries=options.retries,
        key_variable=options.key_variable,
    )
    reader.check()
    numerics = dict(reader.numerics)
    settings = {
        "model": options.model,
        "revision": options.revision,
        "tokenizer": _tokenizer_hash(tokenizer),
        **_settings_of_reading(options, numerics, tokenizer, template),
    }

    def origin() -> dict[str, Any]:
        return {"model": options.model, "files": {}, "settings": settings}

    ask, ends = engine_reads(reader), end_token_ids(tokenizer, None)
    source = _reading(options, ask, reader.positions, tokenizer, template, ends, known=False)
    told = {"revision": options.revision, "source": "endpoint"}
    return origin, source, {**_facts_of_reading(options, settings, tokenizer), **told}


def _tokenizer_and_template(
    options: Options, name: str, revision: str | None, intake: Intake, say: Console
) -> tuple[Any, bool]:
    """The tokenizer of a teacher that reads, and whether its chat template is applied to the data."""
    tokenizer = load_tokenizer(
        name, revision=revision, chat_template=options.chat_template, trust_remote_code=options.trust_remote_code
    )
    template, how = choose_template(intake.first, tokenizer, plain=options.plain)
    say.print(f"Template: {how}", markup=False)
    if options.system_prompt is not None and not template:
        raise ValueError("--system-prompt is written by a chat template, and none is applied here. Leave it out.")
    return tokenizer, template


def _reading(
    options: Options,
    ask: Ask,
    positions: float,
    tokenizer: Any,
    template: bool,
    ends: Sequence[int],
    *,
    known: bool,
) -> FromReader:
    return FromReader(
        ask,
        positions=positions,
        encoder=Encoder(tokenizer, template=template, max_length=options.max_length, whole_text=options.whole_text),
        end_token_ids=ends,
        tokenizer=tokenizer,
        system_prompt=options.system_prompt,
        key=options.key_column,
        known_by_content=known,
    )


def _settings_of_reading(
    options: Options, numerics: Mapping[str, str], tokenizer: Any, template: bool
) -> dict[str, Any]:
    return {
        "schema": VERSION,
        "numerics": numerics,
        "template": hash_of(tokenizer.chat_template.encode()) if template else "plain",
        "system_prompt": options.system_prompt,
        "max_length": options.max_length,
        "whole_text": options.whole_text,
        "top_k": options.top_k,
        "key_column": options.key_column,
    }


def _facts_of_reading(options: Options, settings: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    return {
        "model": options.model,
        "temperature": 1.0,
        "processed": False,
        "numerics": settings["numerics"],
        "template": settings["template"],
        "tokenizer": _tokenizer_hash(tokenizer),
    }


def _tokenizer_hash(tokenizer: Any) -> str:
    """16 hex digits of the tokenizer: vocabulary, merges, special tokens."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} cannot tell where its tokens lie; use a fast tokenizer.")
    return hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=8).hexdigest()


def _told(layout: Layout) -> dict[str, str]:
    return {name: value for name, value in vars(layout).items() if value is not None}
