"""`distill-sampler score`: a data set and a student in, one row of numbers for each candidate out.

This file composes: the data becomes chunks (`chunks.py`), a chunk is scored (`score_job.py`) and becomes a table
(`tables.py`), and tables are kept until they are one file (`artifacts/score_output.py`). Everything that can be refused
without the model is refused before it is loaded.
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
from distill_sampler.cli.chunks import Intake
from distill_sampler.cli.loading import load_model, load_tokenizer, locate, model_files, pick_device, pick_dtype
from distill_sampler.cli.score_job import Job
from distill_sampler.contract import checked_metrics
from distill_sampler.distributed import Ranks
from distill_sampler.integrations.transformers import end_token_ids
from distill_sampler.reading.reduce import data_columns_of, extras_of
from distill_sampler.reading.token_stats import fastest
from distill_sampler.serialize import described, require_writable
from distill_sampler.sources.candidates import Layout
from distill_sampler.sources.encoding import Encoder, choose_template
from distill_sampler.sources.files import Sources
from distill_sampler.specs import parse_metrics

SUMMARY_ROWS = 200_000
"""A longer file's leaderboard is left to `teachers`: ranking holds every sample's numbers."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command was told."""

    data: Sequence[str]
    model: str
    output: Path
    metrics: str = "rank_surprisal_ratio,global_naturalness"
    layout: Layout = field(default_factory=Layout)
    split: str = "train"
    subset: str | None = None
    """Of a data set on the hub."""
    revision: str | None = None
    lora: Path | None = None
    trust_remote_code: bool = False
    """Run the Python code that a model brings."""
    chat_template: Path | None = None
    plain: bool = False
    """No chat template: prompt and response one after the other."""
    whole_text: bool = False
    """Score all of a text in which no response can be found."""
    dtype: str = "auto"
    device: str = "auto"
    batch_tokens: int | None = None
    share_prompts: bool = True
    """Read a prompt that several candidates have in common once."""
    max_length: int | None = None
    rank_clip: int | None = None
    traces: int = 30
    """Prompts whose candidates are kept token by token, for the report."""
    on_error: Literal["skip", "stop"] = "stop"
    overwrite: bool = False
    prompts: int | None = None
    """Prompts, the first ones, whose candidates are scored; None: all."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"--max-length {self.max_length}: a prompt and a response take 2 tokens at least.")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(f"--batch-tokens {self.batch_tokens}: give a positive number, such as 8192.")


def run(options: Options) -> None:
    """Score, and leave the numbers in `options.output`.

    Raises:
        ValueError: one sentence about what is wrong, and the cure.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries to each other
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = pick_device(options.device)
    ranks = _join(device)
    say = Console(stderr=True, quiet=ranks.rank > 0, soft_wrap=True)
    # all that can be refused without the model
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
    # the model, and whose scores there are already
    model = load_model(
        options.model,
        revision=revision,
        dtype=dtype,
        device=device,
        lora=options.lora,
        trust_remote_code=options.trust_remote_code,
    )
    batch_tokens = options.batch_tokens or (2048 if device.type == "cpu" else 16384)
    # chosen for the whole run (4 bytes a token, roughly), not for each chunk: compilation pays off over all of them
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
        say.print(f"{options.output} already holds the scores of this data by this model; nothing to do.")
        if ranks.rank == 0 and not output.origin.sure_of_data:
            say.print("  The hub did not say whether the data has changed since; --overwrite scores it anew.")
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


def _join(device: torch.device) -> Ranks:
    """The processes of `accelerate launch`; alone without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState  # type: ignore[import-untyped]

        PartialState(cpu=device.type == "cpu")
    return Ranks.current(device)


def _show(output: Path, say: Console) -> None:
    from distill_sampler.cli.teachers import summary

    summary(output, say, ranked=pq.read_metadata(output).num_rows <= SUMMARY_ROWS)
