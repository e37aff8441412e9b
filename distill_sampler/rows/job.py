"""The scoring of rows: chunk by chunk, with a progress bar and notes at the end.

Memory holds one chunk at a time, however long the data is, if the output is a file. Under `accelerate launch`, every
process goes through the same chunks and reads its share of each (`Ranks`); the first process writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distill_sampler.artifacts.schema import run_facts
from distill_sampler.artifacts.score_output import ScoreOutput
from distill_sampler.dataset import ScoredDataset
from distill_sampler.progress import Lines
from distill_sampler.protocols import Metric
from distill_sampler.reading.model_reader import ModelReader
from distill_sampler.reading.reduce import columns_of
from distill_sampler.reading.scorer import Scorer
from distill_sampler.rows.chunks import Chunk, Intake, chunk_of
from distill_sampler.rows.memory import TablesInMemory
from distill_sampler.rows.tables import ChunkScores, RowTables
from distill_sampler.sources.encoding import Encoder
from distill_sampler.sources.files import Sources
from distill_sampler.types import FloatArray, IntArray, Missing, TokenStats

BATCHES_PER_CHUNK = 8
"""How many batches of tokens a chunk holds, for each process. A kill loses at most one chunk."""


Output = ScoreOutput | TablesInMemory
"""Where tables are kept."""


class Job:
    """One run over the rows: its settings and its counts.

    Args:
        reader: the student.
        scorer: how it reads.
        metrics: what to score.
        intake: the rows.
        encoder: turns them into tokens.
        end_token_ids: end-of-turn markers, which are not scored.
        output: where the tables are kept.
        batch_tokens: tokens in a batch.
        say: the console for messages.
        facts: what the table says about the run, beside what this job adds. Only the first process calls it, at the
            end.
    """

    def __init__(
        self,
        *,
        reader: ModelReader,
        scorer: Scorer,
        metrics: list[Metric],
        intake: Intake,
        encoder: Encoder,
        end_token_ids: Sequence[int],
        output: Output,
        batch_tokens: int,
        say: Console,
        facts: Callable[[], dict[str, Any]],
    ) -> None:
        self.reader = reader
        self.scorer = scorer
        self.metrics = metrics
        self.intake = intake
        self.encoder = encoder
        self.end_token_ids = end_token_ids
        self.output = output
        self.batch_tokens = batch_tokens
        self.say = say
        self.facts = facts
        self.ranks = reader.ranks
        self.rows = RowTables(intake.layout, metrics, intake.kinds, output.schema)
        self.tokens = 0
        self.seconds = 0.0
        self.non_finite = 0
        self.too_long = 0
        self.emptied = 0
        """How many candidates have no token to score, because truncation left none of their response."""

    def run(self) -> None:
        """Score all candidates; see `tables`."""
        for _ in self.tables():
            pass

    def tables(self) -> Iterator[pa.Table]:
        """Score the candidates that have no scores yet, and at the end make all scores one table. Yields each new chunk
        when it is kept.

        Raises:
            ValueError: a row cannot be used, memory runs out, the data changes meanwhile, or the user stops the run.
        """
        output = self.output
        if output.rows:
            self.say.print(f"Continuing after {output.rows:,} candidates that an earlier run has scored.")
        elif output.earlier:
            if isinstance(self.intake.sources, Sources):
                output.require_some(self.intake.content_hashes())
            self.say.print(
                f"An earlier run scored {output.earlier:,} candidates before the data or an option changed. Those that "
                "are still in the data are not scored again."
            )
        started = time.perf_counter()
        with self._progress() as tell:
            chunks = self.intake.chunks(
                self.encoder,
                self.end_token_ids,
                tokens=BATCHES_PER_CHUNK * self.batch_tokens * self.ranks.world_size,
                skip=output.rows,
                misfit=lambda candidate: self.rows.misfit(candidate) or self.encoder.misfit(candidate),
            )
            while (table := self._next(chunks, tell)) is not None:
                yield table
        if not output.rows and self.intake.shard is None:
            raise ValueError(f"None of the rows could be used ({self.intake.bad} bad). The reasons are above.")
        if not output.rows:  # more shards than there is data for
            output.add(self._table(chunk_of([], self.end_token_ids), lambda share: None))
        self._print_renamed()
        if self.ranks.rank == 0:
            if self.intake.sources.contents() != list(output.data):
                raise ValueError(
                    "The data changed while it was read, so it is not known which version the scores belong to. Run "
                    f"the same command again. The scores of {output.rows:,} candidates are kept, and matched with the "
                    "data by content."
                )
            group, teacher = self.rows.group, self.rows.teacher
            output.join(run_facts(run=None, metrics=self.metrics, group=group, teacher=teacher, **self.facts()))
        self._notes(time.perf_counter() - started)

    def _next(self, chunks: Iterator[Chunk], tell: Callable[[float, str], None]) -> pa.Table | None:
        """The next chunk, scored and kept; None after the last one."""
        output = self.output
        try:
            chunk = next(chunks, None)
            if chunk is None:
                return None
            table = self._table(chunk, lambda share: self._advance(tell, share))
            output.add(table)
            return table
        except KeyboardInterrupt:
            if not output.kept:
                raise
            raise ValueError(f"Stopped. {output.kept} Run the same command again to continue.") from None
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ValueError(
                f"Out of memory with batches of {self.batch_tokens} tokens. Try a smaller --batch-tokens, or "
                f"--max-length. {output.kept}"
            ) from error

    def _table(self, chunk: Chunk, advance: Callable[[float], None]) -> pa.Table:
        """One row for each candidate of a chunk. Processes that write nothing may leave out the columns of scores."""
        names = self.rows.score_columns
        there, known = self.output.known(chunk.hashes, chunk.traced, names)
        fresh = np.flatnonzero(~there)
        unread = chunk.take(fresh) if known is not None or there.any() else chunk
        self.emptied += int((unread.counts == 0).sum())
        numbers = self.rows.numbers(unread, self._read(unread, advance))
        if known is not None:
            order = np.argsort(np.r_[np.flatnonzero(there), fresh], kind="stable")
            numbers = pa.concat_tables([known.cast(numbers.schema), numbers]).take(pa.array(order))
        table = self.rows.identity(
            chunk.candidates,
            chunk.places if self.intake.shard else np.arange(self.output.rows, self.output.rows + len(chunk)),
        )
        for name in names if len(numbers) == len(table) else ():
            table = table.append_column(numbers.schema.field(name), numbers[name])
        return table

    def _read(self, chunk: Chunk, advance: Callable[[float], None]) -> ChunkScores:
        """Score a chunk with the student."""
        columns: dict[str, FloatArray] = {
            name: np.full(len(chunk), np.nan, np.float32) for name in columns_of(self.metrics)
        }
        missing: dict[str, IntArray] = {
            metric.name: np.full(len(chunk), int(Missing.NO_RESPONSE)) for metric in self.metrics
        }
        usable = np.flatnonzero(chunk.counts)
        traces: dict[int, TokenStats] = {}
        if not len(usable):
            return ChunkScores(columns=columns, missing=missing, traces=traces)
        some = chunk.take(usable)
        rows = [
            {**candidate.read, "input_ids": encoded.input_ids, "labels": encoded.labels}
            for candidate, encoded in zip(some.candidates, some.encoded, strict=True)
        ]
        dataset = ScoredDataset(rows, end_token_ids=self.end_token_ids)
        started, read = time.perf_counter(), 0
        blocks = self.scorer.score(
            self.reader, dataset, self.metrics, np.arange(len(some)), traces=np.flatnonzero(some.traced).tolist()
        )
        for block in blocks:
            at = usable[block.indices]
            for name, values in block.columns.items():
                columns[name][at] = values
            for name, codes in block.missing.items():
                missing[name][at] = codes
            traces |= {int(usable[row]): stats for row, stats in block.traces.items()}
            self.tokens += block.tokens
            self.non_finite += len(block.non_finite)
            self.too_long += len(block.too_long)
            self.seconds += time.perf_counter() - started
            read += block.tokens
            advance(read / int(some.offsets[-1]))
            started = time.perf_counter()
        advance(1.0)  # shared prompts are read once, so the sum above stays below the chunk's tokens
        return ChunkScores(columns=columns, missing=missing, traces=traces)

    # ---- Messages ----

    def _progress(self) -> Any:
        """A context that gives what tells how far the work is: `(position, note)`."""
        if self.ranks.rank:
            return nullcontext(lambda position, note: None)
        size = self.intake.size or None
        if self.say.is_terminal or self.say.is_jupyter:
            return _Bar(self.say, size)
        lines = Lines("Scoring", total=size, say=lambda line: self.say.print(line, markup=False))
        return nullcontext(lines.at)

    def _advance(self, tell: Callable[[float, str], None], share: float) -> None:
        """Tell how far the work is when this share of the current chunk is scored."""
        before = self.intake.before
        position = before + share * (self.intake.position - before)
        tell(position, f"{self.output.rows:,} rows, {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s")

    def counts(self) -> dict[str, float]:
        """What this run has done, and what it could not do."""
        return {
            "rows": self.output.rows,
            "tokens": self.tokens,
            "seconds_in_student": round(self.seconds, 3),
            "taken_from_earlier_run": self.output.taken,
            "bad_rows": self.intake.bad,
            "emptied": self.emptied,
            "non_finite": self.non_finite,
            "too_long": self.too_long,
        }

    def _print_renamed(self) -> None:
        if renamed := self.rows.renamed:
            names = ", ".join(f"'{name}' as '{ours}'" for name, ours in renamed.items())
            self.say.print(
                f"These columns of the data have the names of columns of scores, and are kept as: {names}.",
                markup=False,
            )

    def _notes(self, seconds: float) -> None:
        if self.tokens:
            self.say.print(
                f"Scored {self.tokens:,} tokens in {seconds:,.0f} s ({self.tokens / max(self.seconds, 1e-9):,.0f} "
                f"tokens/s in the student)."
            )
        for number, what in (
            (self.output.taken, "candidates that an earlier run had scored, not scored again"),
            (self.intake.bad, "bad rows, left out"),
            (self.emptied, "candidates without a score, because --max-length cut off all of their response"),
            (self.non_finite, "candidates without a score, because the student's logits for them are NaN or infinite"),
            (self.too_long, "candidates without some score, because the student has too few positions for them"),
            (self.encoder.lost_turns, "earlier turns not scored, because the template rewrites them"),
            (self.encoder.whole_texts, "texts scored whole, prompt included, because of --whole-text"),
            (
                self.encoder.wrapped_twice,
                "prompts that were already written in the chat template and were wrapped again, unlike the first",
            ),
            (
                self.output.duplicates() if self.ranks.rank == 0 else 0,
                "candidates that repeat another word for word; each counts",
            ),
        ):
            if number:
                self.say.print(f"[yellow]note:[/] {what}: {number:,}.")


class _Bar:
    """A progress bar, as a context that gives what moves it."""

    def __init__(self, say: Console, total: int | None) -> None:
        self._progress = Progress(
            TextColumn("Scoring"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=say,
            transient=True,
        )
        self._task = self._progress.add_task("", total=total, note="")

    def __enter__(self) -> Callable[[float, str], None]:
        self._progress.start()
        return lambda position, note: self._progress.update(self._task, completed=position, note=note)

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
