"""`distill-sampler score`: scores a data set with a student, and writes one row of numbers for each candidate.

The data is split into chunks (`chunks.py`). Each chunk is scored (`score_job.py`), becomes a table (`tables.py`) and is
saved; at the end the tables are joined into one file (`artifacts/score_output.py`). What can be refused without the
model is refused before it is loaded.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from distill_sampler import Scorer, __version__
from distill_sampler.artifacts.schema import VERSION
from distill_sampler.artifacts.score_output import Origin, ScoreOutput
from distill_sampler.cli.score_job import Job
from distill_sampler.contract import checked_metrics
from distill_sampler.distributed import Ranks
from distill_sampler.integrations.loading import (
    load_model,
    load_tokenizer,
    locate,
    model_files,
    pick_device,
    pick_dtype,
)
from distill_sampler.reading.reduce import data_columns_of, extras_of
from distill_sampler.reading.token_stats import fastest
from distill_sampler.rows.chunks import Intake
from distill_sampler.serialize import described, require_writable
from distill_sampler.sources.candidates import Layout
from distill_sampler.sources.encoding import Encoder, choose_template
from distill_sampler.sources.files import Sources
from distill_sampler.sources.templates import end_token_ids
from distill_sampler.specs import parse_metrics

SUMMARY_ROWS = 200_000
"""How many rows the final summary ranks at most. Ranking keeps all scores in memory; `teachers` ranks longer files."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's options."""

    data: Sequence[str]
    """Paths, and names of data sets on the hub."""
    model: str
    """The student: a folder, or the name of a model on the hub."""
    output: Path
    """Parquet file for the scores."""
    metrics: str = "rank_surprisal_ratio,global_naturalness"
    """Metrics as users type them."""
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
    """Read prompt and response as plain text, one after the other, without a chat template."""
    whole_text: bool = False
    """Score all of a text in which no response can be found."""
    dtype: str = "auto"
    """The dtype of the model's weights, or `"auto"`."""
    device: str = "auto"
    """The device, or `"auto"`."""
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; None: the device's default."""
    share_prompts: bool = True
    """Read a prompt that several candidates share only once."""
    max_length: int | None = None
    """Truncate rows to this many tokens; None: never."""
    rank_clip: int | None = None
    """The largest rank that Rank-Surprisal Ratio counts; None: its default."""
    traces: int = 30
    """For this many prompts, the first ones, the scores of every token are kept for the report."""
    on_error: Literal["skip", "stop"] = "stop"
    """What to do with a row that cannot be used."""
    overwrite: bool = False
    """Discard scores that the output holds already."""
    prompts: int | None = None
    """Score only the candidates of this many prompts, the first ones; None: of all."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"--max-length {self.max_length}: a prompt and a response have at least 2 tokens.")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(f"--batch-tokens {self.batch_tokens}: give a positive number, such as 8192.")


def run(options: Options) -> None:
    """Score the data, and write the scores to `options.output`.

    Raises:
        ValueError: an option, the data or the model cannot be used; the message names it and the cure.
    """
    quiet()
    device = pick_device(options.device)
    ranks = join(device)
    say = Console(stderr=True, quiet=ranks.rank > 0, soft_wrap=True)
    # first, everything that can be refused without the model
    sources = Sources(options.data, split=options.split, subset=options.subset)
    metrics = list(checked_metrics(parse_metrics(options.metrics, rank_clip=options.rank_clip)).values())
    extras_of(metrics)
    require_writable(options.output, ".parquet")
    dtype = pick_dtype(options.dtype, device)
    intake = Intake(
        sources,
        options.layout,
        read=data_columns_of(metrics),
        prompts=options.prompts,
        traces=options.traces,
        on_error=options.on_error,
        say=say,
    )
    folder, commit = locate(options.model, revision=options.revision)
    revision = commit or options.revision
    tokenizer = load_tokenizer(
        options.model,
        revision=revision,
        chat_template=options.chat_template,
        trust_remote_code=options.trust_remote_code,
    )
    template, how = choose_template(intake.first, tokenizer, plain=options.plain)
    say.print(f"Template: {how}", markup=False)
    encoder = Encoder(tokenizer, template=template, max_length=options.max_length, whole_text=options.whole_text)
    # now the model, and the scores that an earlier run has left
    model = load_model(
        options.model,
        revision=revision,
        dtype=dtype,
        device=device,
        lora=options.lora,
        trust_remote_code=options.trust_remote_code,
    )
    batch_tokens = options.batch_tokens or (2048 if device.type == "cpu" else 16384)
    # chosen once for the whole run (about 4 bytes a token), because compilation must pay over all chunks together
    impl = fastest(device, sources.size // 4 * model.config.get_text_config().vocab_size)
    scorer = Scorer(batch_tokens=batch_tokens, share_prompts=options.share_prompts, progress=False, impl=impl)
    reader = scorer.reader(model)
    settings = {
        "schema": VERSION,
        "dtype": dtype,
        "numerics": reader.numerics,
        "metrics": [described(metric) for metric in metrics],
        "template": _digest(tokenizer.chat_template) if encoder.template else "plain",
        "whole_text": options.whole_text,
        "max_length": options.max_length,
        "share_prompts": options.share_prompts,
    }
    rows = {
        "columns": {name: value for name, value in vars(options.layout).items() if value is not None},
        "batch_tokens": batch_tokens,
        "prompts": options.prompts,
        "traces": options.traces,
    }

    def origin() -> Origin:
        return Origin(
            model=options.model,
            lora=str(options.lora) if options.lora else None,
            commit=commit,
            files=model_files(folder, options.lora),
            settings=settings,
            data=sources.contents(),
            rows=rows,
        )

    output = ScoreOutput(options.output, origin, overwrite=options.overwrite, ranks=ranks)
    if output.complete:
        say.print(f"{options.output} already holds this model's scores of this data; nothing to do.")
        if ranks.rank == 0 and not output.origin.sure_of_data:
            say.print("  The hub did not say whether the data has changed since. To score it again, use --overwrite.")
        _show(options.output, say)
        return
    facts = {
        "model": options.model,
        "revision": revision,
        "lora": str(options.lora) if options.lora else None,
        "split": options.split,
        "subset": options.subset,
        **{name: value for name, value in (settings | rows).items() if name not in ("schema", "metrics", "columns")},
        "template": "chat" if encoder.template else "plain",
        "version": __version__,
        "layout": {name: value for name, value in vars(intake.layout).items() if value is not None},
        "on_error": options.on_error,
        "paths": [str(Path(name).resolve()) if Path(name).exists() else name for name in options.data],
    }
    job = Job(
        reader=reader,
        scorer=scorer,
        metrics=[metric.with_tokenizer(tokenizer) for metric in metrics],
        intake=intake,
        encoder=encoder,
        end_token_ids=end_token_ids(tokenizer, model),
        output=output,
        batch_tokens=batch_tokens,
        say=say,
    )
    job.run(facts)
    if ranks.rank == 0:
        _show(options.output, say)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def quiet() -> None:
    """Silence what libraries say about one another and about loading a model."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def join(device: torch.device) -> Ranks:
    """Join the processes of `accelerate launch`, if there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState  # type: ignore[import-untyped]

        PartialState(cpu=device.type == "cpu")
    return Ranks.current(device)


def _show(output: Path, say: Console) -> None:
    from distill_sampler.cli.teachers import summary

    summary(output, say, ranked=pq.read_metadata(output).num_rows <= SUMMARY_ROWS)
