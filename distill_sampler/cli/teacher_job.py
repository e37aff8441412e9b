"""The work of `distill-sampler teacher-logprobs`: chunk after chunk from a source into the parts of a store."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from distill_sampler.artifacts.score_output import ScoreOutput
from distill_sampler.cli.teacher_columns import LogprobFiles
from distill_sampler.cli.teacher_sources import Outage, TeacherSource, key_of, without_numbers
from distill_sampler.engines.writing import StoredRow, key_hash, schema, store_facts, table_of
from distill_sampler.progress import Lines
from distill_sampler.rows.chunks import SHOWN_BAD, Intake
from distill_sampler.sources.candidates import Candidate
from distill_sampler.types import HashArray

CHUNK_CHARACTERS = 1 << 19
"""Text of a chunk: what a kill costs at most."""
CHUNK_ROWS = 1024
_SAME_TEACHER = 0.1
"""How far the numbers of two runs may lie apart on average, in nats: more than the rounding of bfloat16."""


class TeacherJob:
    """One run of the command: its settings and its counts.

    Args:
        source: gives the rows.
        intake: the data.
        output: where they are kept.
        top_k: likeliest tokens in each place.
        key: the column that tells samples apart; None: none does.
        min_coverage: share of a response's text that the teacher's tokens must cover.
        skip_bad: leave a response that cannot be used without numbers, instead of stopping there.
        say: the console for messages.
    """

    def __init__(
        self,
        *,
        source: TeacherSource,
        intake: Intake,
        output: ScoreOutput,
        top_k: int,
        key: str | None,
        min_coverage: float,
        skip_bad: bool,
        say: Console,
    ) -> None:
        self._source = source
        self._intake = intake
        self._output = output
        self._top_k = top_k
        self._key = key
        self._min_coverage = min_coverage
        self._skip_bad = skip_bad
        self._say = say
        self._bad = 0
        self._tokens = self._absent = 0
        self._coverage: list[float] = []

    def run(self, facts: dict[str, Any]) -> None:
        """Make the rows that are not there yet, and join all of them into the store.

        Args:
            facts: what the numbers belong to.

        Raises:
            ValueError: a response cannot be used, memory runs out, the data changes meanwhile, or the user stops the
                run. What is done is kept.
        """
        output, say = self._output, self._say
        if output.rows:
            say.print(f"Continuing after {output.rows:,} responses of an earlier run.")
            if not self._source.known_by_content:
                self._require_same_teacher()
        elif output.earlier:
            output.require_some(self._intake.content_hashes())
            say.print(
                f"An earlier run had done {output.earlier:,} responses before the data changed. Those that are still "
                "in the data are taken over."
            )
        kept = "What is done is kept: run the same command again to continue."
        started = time.perf_counter()
        try:
            with self._progress() as progress:
                for candidates in self._chunks(output.rows):
                    self._add(candidates, progress)
        except KeyboardInterrupt:
            raise ValueError(f"Stopped. {kept}") from None
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ValueError(f"Out of memory. {kept} A smaller --batch-tokens needs less.") from error
        if not output.rows:
            raise ValueError("None of the rows could be used; see the reasons above.")
        if output.is_first and self._intake.sources.contents() != list(output.origin.data):
            raise ValueError(
                "The data changed while it was read, so it is not known what the numbers belong to. Run the command "
                "again: what is done is kept, and taken over by content."
            )
        if output.is_first:
            output.join(store_facts(output.tables(), top_k=self._top_k, **facts))
        self._notes(time.perf_counter() - started)

    def _require_same_teacher(self) -> None:
        """Have the first response read again and compare, because a server's model may be another under the same name.

        Raises:
            ValueError: it gives other numbers than before.
        """
        kept = next(self._output.tables())["logprobs"].to_pylist()
        candidates = (each for each in self._intake.readable() if self._source.misfit(each) is None)
        for candidate, before in zip(candidates, kept, strict=False):
            if not before:
                continue
            (now,) = self._source.rows([candidate], lambda share: None)
            if isinstance(now, str):
                raise ValueError(f"{candidate.where}: {now} What is done is kept.")
            same = len(now.surprisal) == len(before)
            off = float(np.abs(np.array(before) + now.surprisal).mean()) if same else np.inf
            if off > _SAME_TEACHER:
                raise ValueError(
                    f"The server's log-probabilities of {candidate.where} differ from those of the earlier run by "
                    f"{off:.2g} nats a token, so it runs other weights under the same name. Continue with the earlier "
                    "ones, give another --output and --revision, or start over with --overwrite."
                )
            return

    def _chunks(self, skip: int) -> Iterator[list[Candidate]]:
        """The candidates that are not done, in pieces that depend on the data alone."""
        waiting: list[Candidate] = []
        size = 0
        for candidate in itertools.islice(self._intake.candidates(self._source.misfit), skip, None):
            waiting.append(candidate)
            size += len(candidate.text or "") + sum(len(str(message["content"])) for message in candidate.messages)
            if size >= CHUNK_CHARACTERS or len(waiting) >= CHUNK_ROWS:
                yield waiting
                waiting, size = [], 0
        if waiting:
            yield waiting

    def _add(self, candidates: list[Candidate], progress: Callable[[float], None]) -> None:
        """Keep the rows of a chunk; up to the first that cannot be used, if that ends the run."""
        hashes = np.array([candidate.content_hash for candidate in candidates], np.uint64)
        there, known = self._output.known(hashes, np.zeros(len(hashes), bool), schema(self._top_k).names)
        fresh = [candidate for candidate, is_there in zip(candidates, there.tolist(), strict=True) if not is_there]
        made = self._source.rows(fresh, progress) if fresh else []
        rows: list[StoredRow] = []
        refusal: str | None = None
        for candidate, found in zip(fresh, made, strict=True):
            problem = found if isinstance(found, str) else self._too_little(found)
            if isinstance(found, Outage):
                refusal = f"{found} What is done is kept: run the same command again to continue."
                break
            if problem and not self._skip_bad:
                refusal = (
                    f"{candidate.where}: {problem}. Correct it, or go on past such responses with --on-error skip. "
                    "What is done is kept."
                )
                break
            if problem:
                self._bad += 1
                if self._bad <= SHOWN_BAD:
                    self._say.print(f"  passed over: {candidate.where}: {problem}", markup=False, highlight=False)
            row = without_numbers(candidate, self._key) if isinstance(found, str) else found
            rows.append(row)
            self._coverage.append(row.coverage)
            self._tokens += len(row.surprisal)
            self._absent += row.absent
        if refusal:  # the candidates before the refused one, known and fresh, in order
            end = next(place for place, candidate in enumerate(candidates) if candidate is fresh[len(rows)])
            there = there[:end]
            known = known if known is None else known.slice(0, int(there.sum()))
        table = table_of(rows, top_k=self._top_k)
        if known is not None:
            order = np.argsort(np.r_[np.flatnonzero(there), np.flatnonzero(~there)], kind="stable")
            table = pa.concat_tables([known.cast(table.schema), table]).take(pa.array(order))
        if len(there):
            self._output.add(table)
        if refusal:
            raise ValueError(refusal)

    def _too_little(self, row: StoredRow) -> str | None:
        if row.text and row.coverage < self._min_coverage:
            return (
                f"the teacher's tokens cover {row.coverage:.1%} of the response's text, less than --min-coverage "
                f"{self._min_coverage}; if the tokens are of this text, check --tokenizer or lower --min-coverage, "
                "else check the columns and --key-column"
            )
        return None

    # ---- Messages ----

    def _progress(self) -> Any:
        """A context that gives what tells how far the work is: how much of the current piece is done."""
        if not self._output.is_first:
            return nullcontext(lambda share: None)
        return _Bar(self._say, self._intake, self._output)

    def _notes(self, seconds: float) -> None:
        say = self._say
        if self._coverage:
            covered = np.array(self._coverage)
            say.print(
                f"{self._tokens:,} tokens of {len(covered):,} responses in {seconds:,.0f} s. They cover "
                f"{covered.mean():.2%} of a response's text on average; the least: {covered.min():.2%}."
            )
        for number, what in (
            (self._output.taken, "responses that an earlier run had done"),
            (self._intake.bad, "bad rows, left out"),
            (self._bad, "responses without usable numbers; see the reasons above"),
            (self._absent, "of the teacher's tokens are not in the texts, such as special tokens"),
            *self._source.notes(),
        ):
            if number:
                say.print(f"[yellow]note:[/] {what}: {number:,}.")
        say.print(f"{self._output.output}: {self._output.rows:,} responses.")


class _Bar:
    """Progress in bytes of the data, as a context that gives what moves it: a bar, or lines off a terminal."""

    def __init__(self, say: Console, intake: Intake, output: ScoreOutput) -> None:
        columns = TextColumn("Log-probabilities"), BarColumn(), TextColumn("{task.fields[rows]:,} responses")
        self._bar = Progress(*columns, TimeElapsedColumn(), console=say, transient=True)
        self._task = self._bar.add_task("", total=intake.size or None, rows=output.rows)
        self._lines = Lines("Log-probabilities", total=intake.size, say=lambda line: say.print(line, markup=False))
        self._draws = say.is_terminal
        self._intake, self._output = intake, output
        self._before = 0

    def __enter__(self) -> Callable[[float], None]:
        if self._draws:
            self._bar.start()
        return self._move

    def __exit__(self, *error: object) -> None:
        if self._draws:
            self._bar.stop()

    def _move(self, share: float) -> None:
        position = self._intake.position
        done = self._before + share * (position - self._before)
        if self._draws:
            self._bar.update(self._task, completed=done, rows=self._output.rows)
        else:
            self._lines.at(done, f"{self._output.rows:,} responses")
        if share >= 1:
            self._before = position


def check_keys(intake: Intake, key: str, beside: LogprobFiles | None) -> None:
    """Refuse keys that do not tell samples apart, or join nothing, before any work. Reads the data once.

    Raises:
        ValueError: two samples have the same key, or none is in the other files.
    """
    keys: list[int] = []
    contents: list[int] = []
    for candidate in intake.readable():
        keys.append(key_hash(key_of(candidate, key)))
        contents.append(candidate.content_hash)
    hashes: HashArray = np.array(keys, np.uint64)
    pairs = np.unique(np.stack([hashes, np.array(contents, np.uint64)]), axis=1)[0]
    twice = pairs[1:][pairs[1:] == pairs[:-1]]
    if len(twice):
        first = keys.index(int(twice[0]))
        name = next(key_of(candidate, key) for candidate in itertools.islice(intake.readable(), first, None))
        raise ValueError(
            f"--key-column {key}: {len(np.unique(twice)):,} keys (such as {name!r}) stand at samples with different "
            "content. Name a column that tells samples apart."
        )
    if beside is not None and not beside.has(hashes).any():
        name = next(key_of(candidate, key) for candidate in intake.readable())
        raise ValueError(
            f"--key-column {key}: none of the data's keys (such as {name!r}) is in --logprobs-file. Check that both "
            "name samples in the same way."
        )
