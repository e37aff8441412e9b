"""Rows to a table of scores, with a student that is loaded by its name or given: one way for `score_rows`, the command
line, datatrove and Ray.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from torch import nn

from distill_sampler import __version__
from distill_sampler.artifacts.schema import VERSION
from distill_sampler.artifacts.score_output import Origin
from distill_sampler.contract import checked_metrics
from distill_sampler.integrations.student import RowOptions, Student
from distill_sampler.protocols import Metric
from distill_sampler.reading.reduce import data_columns_of, extras_of
from distill_sampler.reading.scorer import Scorer
from distill_sampler.reading.token_stats import fastest, usual_batch_tokens
from distill_sampler.rows.chunks import Intake
from distill_sampler.rows.job import Job, Output
from distill_sampler.rows.memory import TablesInMemory
from distill_sampler.serialize import described
from distill_sampler.sources.encoding import Encoder, choose_template
from distill_sampler.sources.files import GivenRows, Sources
from distill_sampler.sources.templates import end_token_ids
from distill_sampler.specs import parse_metrics

METRICS = "rank_surprisal_ratio,global_naturalness"
"""What is scored by default."""


class RowScorer:
    """Scores rows with one student, any number of times.

    Args:
        student: the student.
        metrics: what to score.
        options: how rows are read.
        say: the console for messages; None: there are no messages.

    Raises:
        ValueError: the metrics cannot be scored together.
    """

    def __init__(
        self, student: Student, metrics: Sequence[Metric], options: RowOptions, *, say: Console | None = None
    ) -> None:
        self.student = student
        self.metrics = list(checked_metrics(metrics).values())
        self.options = options
        self.say = say or Console(quiet=True)
        extras_of(self.metrics)

    def table(self, rows: Any) -> pa.Table:
        """The scores of some rows, one row for each response.

        Args:
            rows: rows of any kind that `score_rows` takes.

        Raises:
            ValueError: a row cannot be used.
        """
        sources = given(rows)
        intake = intake_of(sources, self.metrics, self.options, say=self.say, kept="")
        output = TablesInMemory(sources.contents())
        self.job(intake, lambda origin: output).run()
        return output.table

    def job(
        self,
        intake: Intake,
        output: Callable[[Callable[[], Origin]], Output],
        **more: Any,
    ) -> Job:
        """The work on some rows.

        Args:
            intake: the rows, from `intake_of`.
            output: makes the output for scores of an origin.
            more: what the table says about the run, beside what is known here.

        Raises:
            ValueError: the rows do not fit the student, or the output holds other scores.
        """
        student, options = self.student, self.options
        template, how = choose_template(intake.first, student.tokenizer, plain=options.plain)
        self.say.print(f"Template: {how}", markup=False)
        encoder = Encoder(
            student.tokenizer, template=template, max_length=options.max_length, whole_text=options.whole_text
        )
        batch_tokens = options.batch_tokens or usual_batch_tokens(student.device)
        # chosen once for all chunks, because compilation must pay over all of them together
        vocabulary = student.model.config.get_text_config().vocab_size
        impl = fastest(student.device, intake.sources.about_tokens * vocabulary)
        scorer = Scorer(
            batch_tokens=batch_tokens,
            share_prompts=options.share_prompts,
            compile_layers=options.compile_layers,
            progress=False,
            impl=impl,
        )
        reader = scorer.reader(student.model)
        settings = {
            "schema": VERSION,
            "dtype": student.dtype,
            "numerics": reader.numerics,
            "metrics": [described(metric) for metric in self.metrics],
            "template": _digest(student.tokenizer.chat_template) if template else "plain",
            "whole_text": options.whole_text,
            "max_length": options.max_length,
            "share_prompts": reader.shares_prompts,
        }
        rows = {
            "columns": {name: value for name, value in vars(options.layout).items() if value is not None},
            "batch_tokens": batch_tokens,
            "prompts": options.prompts,
            "traces": options.traces,
            **({"shard": list(options.shard)} if options.shard else {}),
        }
        lora = str(options.lora) if options.lora else None
        kept = output(
            lambda: Origin(
                model=student.name,
                lora=lora,
                commit=student.commit,
                files=student.files(),
                settings=settings,
                data=intake.sources.contents(),
                rows=rows,
            )
        )
        return Job(
            reader=reader,
            scorer=scorer,
            metrics=[metric.with_tokenizer(student.tokenizer) for metric in self.metrics],
            intake=intake,
            encoder=encoder,
            end_token_ids=end_token_ids(student.tokenizer, student.model),
            output=kept,
            batch_tokens=batch_tokens,
            say=self.say,
            facts=lambda: {
                "model": student.name,
                "revision": student.revision,
                "lora": lora,
                "identity": {"weights": student.weights, "read": data_columns_of(self.metrics), **settings},
                **{name: value for name, value in (settings | rows).items() if name not in _NOT_ALONE},
                "template": "chat" if template else "plain",
                "version": __version__,
                "layout": {name: value for name, value in vars(intake.layout).items() if value is not None},
                "on_error": options.on_error,
                **more,
            },
        )


_NOT_ALONE = ("schema", "metrics", "columns")
"""Settings that are among the facts of every file of scores, in another form."""


def intake_of(
    sources: Sources | GivenRows, metrics: Sequence[Metric], options: RowOptions, *, say: Console, kept: str
) -> Intake:
    """The rows, of which the first ones are read.

    Args:
        sources: the data.
        metrics: what is scored.
        options: how rows are read.
        say: the console for messages.
        kept: the sentence that says what becomes of the scores so far when a row ends the run.

    Raises:
        ValueError: the columns cannot be told, or no row can be used.
    """
    return Intake(
        sources,
        options.layout,
        read=data_columns_of(metrics),
        prompts=options.prompts,
        traces=options.traces,
        on_error=options.on_error,
        say=say,
        shard=options.shard,
        kept=kept,
    )


def score_rows(
    model: nn.Module | str | Path,
    rows: Any,
    *,
    metrics: Sequence[Metric] | str = METRICS,
    tokenizer: Any = None,
    progress: bool = True,
    **options: Any,
) -> pa.Table:
    """Score responses with a student: rows in, a table of scores out.

    Rows are what `distill-sampler score` reads from files: a prompt with a response or completion (text or messages), a
    conversation in `messages`, a `text` in the chat template, or tokens in `input_ids`, with `labels` if there are any.
    Which column holds what is found by the usual names, and printed. The scores are the same as the command's.

    `table.to_pandas()` is a DataFrame. `pyarrow.parquet.write_table(table, "scores.parquet")` makes a file that
    `Curriculum(scores=)` and all commands take. All rows of the table are in memory; for millions of them, use the
    command.

    Args:
        model: a causal language model of transformers, its folder, or its name on the hub.
        rows: a list or any other iterable of dictionaries, a `datasets.Dataset`, an Arrow table, or a DataFrame.
        metrics: what to score: objects, or text as for `--metrics`.
        tokenizer: the model's tokenizer; needed if the model is an object.
        progress: show a progress bar and what was found out about the rows.
        options: the fields of `distill_sampler.integrations.student.RowOptions`: `teacher_column=`, `max_length=`,
            `on_error="skip"`, and so on.

    Returns:
        One row for each response: its number, its prompt, its teacher, the other columns with single values, counts,
        the scores, and for each metric why there is none.

    Raises:
        ValueError: a row, an option or the model cannot be used; the message names it and the cure.
    """
    with in_python():
        found = RowOptions(**options)
        say = _Said(stderr=True, quiet=not progress, soft_wrap=True)
        return RowScorer(Student(model, tokenizer, found), metrics_of(metrics), found, say=say).table(rows)


def metrics_of(metrics: Sequence[Metric] | str) -> Sequence[Metric]:
    """Metrics as objects, from text if they are given so."""
    return parse_metrics(metrics) if isinstance(metrics, str) else metrics


def given(rows: Any) -> GivenRows:
    """Rows of any kind, to be read once."""
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")
    if pandas is not None and isinstance(rows, pandas.DataFrame):
        rows = pa.Table.from_pandas(rows, preserve_index=False)
    if datasets is not None and isinstance(rows, datasets.Dataset):
        rows = rows.with_format(None)
    if isinstance(rows, pa.Table):
        batches = rows.to_batches(max_chunksize=256)
        return GivenRows((row for batch in batches for row in batch.to_pylist()), size=rows.num_rows)
    if isinstance(rows, (str, Mapping)):
        raise ValueError(f"rows= takes a list of dictionaries, a data set or a table, but was given {rows!r:.80}.")
    return GivenRows(rows)


@contextmanager
def in_python() -> Iterator[None]:
    """Spell the options of the command line in errors as arguments: `--max-length` as `max_length=`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(_as_arguments(str(error))) from error


def _as_arguments(text: str) -> str:
    return re.sub(r"--([a-z][a-z-]*)", lambda found: found[1].replace("-", "_") + "=", text)


class _Said(Console):
    """A console that spells the options of the command line as arguments."""

    def print(self, *objects: Any, **how: Any) -> None:
        super().print(*(_as_arguments(each) if isinstance(each, str) else each for each in objects), **how)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
