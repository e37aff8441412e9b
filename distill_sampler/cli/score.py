"""`distill-sampler score`: a data set and a student in, one row of numbers for each candidate out.

The data streams through in chunks of so many tokens. Each chunk is read by the student and written to a file of its
own in `OUTPUT.parts/`, renamed into place when it is whole; a run that was killed skips the candidates that the parts
hold and goes on. Chunks depend on the data and the settings alone, so the parts of an interrupted run are those of an
uninterrupted one, and so is the file that they are joined into. Memory holds one chunk, however long the data is.

Under `accelerate launch` every process walks through the same chunks, reads its share of each (`Ranks`), and the first
one writes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from distill_sampler import Scorer, __version__
from distill_sampler.artifacts.parts import Parts, read_part
from distill_sampler.artifacts.passes import missing_column
from distill_sampler.artifacts.schema import OWN_COLUMNS, decode_facts, encode_facts, run_facts
from distill_sampler.cli.loading import Student, load_student, pick_device
from distill_sampler.dataset import ScoredDataset, response_mask
from distill_sampler.distributed import Ranks
from distill_sampler.integrations.transformers import end_token_ids
from distill_sampler.reading.reduce import columns_of
from distill_sampler.reading.token_stats import fastest
from distill_sampler.serialize import hash_of, require_writable
from distill_sampler.sources.candidates import Candidate, Layout, read_candidates
from distill_sampler.sources.encoding import Encoded, Encoder, choose_template
from distill_sampler.sources.files import Bad, Sources
from distill_sampler.specs import parse_metrics
from distill_sampler.types import FloatArray, Metric, Missing, TokenStats

BATCHES_PER_CHUNK = 8
"""A chunk holds this many batches' tokens, the scorer's own measure: what a kill costs, at most."""
ROWS_PER_READ = 64
"""Candidates that are tokenised together; a chunk is a whole number of these."""
MAX_ROWS = 4096
ROW_GROUP = 1 << 14
"""Rows of the output that are held together, and their numbers compressed together, when the parts are joined."""
SUMMARY_ROWS = 200_000
"""A longer file's leaderboard is left to `teachers`: ranking holds every sample's numbers."""
Read = tuple[Candidate, Encoded, bool]
"""A candidate, its tokens, and whether what the student makes of each is kept."""
SHOWN_BAD = 5
"""Bad rows that are shown one by one; all are counted."""


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
    chat_template: Path | None = None
    plain: bool = False
    """No chat template: prompt and response one after the other."""
    whole_text: bool = False
    """Score all of a text in which no response can be found."""
    dtype: str = "auto"
    device: str = "auto"
    batch_tokens: int | None = None
    share_prompts: bool = True
    max_length: int | None = None
    rank_clip: int | None = None
    traces: int = 30
    """Prompts whose candidates are kept token by token, for the report."""
    on_error: Literal["skip", "stop"] = "stop"
    overwrite: bool = False
    prompts: int | None = None
    """Prompts, the first ones, whose candidates are scored; None: all."""


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
    sources = Sources(options.data, split=options.split, subset=options.subset)
    metrics = parse_metrics(options.metrics, rank_clip=options.rank_clip)
    require_writable(options.output, ".parquet")
    _require_lengths(options)
    student = load_student(
        options.model,
        revision=options.revision,
        dtype=options.dtype,
        device=device,
        lora=options.lora,
        chat_template=options.chat_template,
    )
    batch_tokens = options.batch_tokens or (2048 if device.type == "cpu" else 16384)
    settings = {
        "model": options.model,
        "revision": student.revision,
        "lora": str(options.lora) if options.lora else None,
        "dtype": student.dtype,
        "metrics": [repr(metric) for metric in metrics],
        "data": sources.describe(),
        "split": options.split,
        "subset": options.subset,
        "columns": _said(options.layout),
        "template": ("plain" if options.plain else _digest(student.tokenizer.chat_template or ""))
        + " whole text" * options.whole_text,
        "max_length": options.max_length,
        "batch_tokens": batch_tokens,
        "share_prompts": options.share_prompts,
        "traces": options.traces,
        "prompts": options.prompts,
    }
    parts = ScoreOutput(options.output, settings, overwrite=options.overwrite, ranks=ranks)
    if parts.complete:
        say.print(f"{options.output} already holds the scores of this data by this model; nothing to do.")
        _show(options.output, say)
        return
    job = Job(options, student, metrics, sources, parts, ranks, batch_tokens, say)
    job.run()
    if ranks.rank == 0:
        _show(options.output, say)


class Job:
    """One run of the command: the state that its steps share."""

    def __init__(
        self,
        options: Options,
        student: Student,
        metrics: list[Metric],
        sources: Sources,
        parts: ScoreOutput,
        ranks: Ranks,
        batch_tokens: int,
        say: Console,
    ) -> None:
        self.options = options
        self.student = student
        self.metrics = [metric.with_tokenizer(student.tokenizer) for metric in metrics]
        self.sources = sources
        self.parts = parts
        self.ranks = ranks
        self.batch_tokens = batch_tokens
        self.say = say
        self.layout = Layout()
        self.encoder: Encoder | None = None
        # chosen for the whole run (4 bytes a token, roughly), not for each chunk: compilation pays off over all of them
        vocabulary = student.model.config.get_text_config().vocab_size
        impl = fastest(next(student.model.parameters()).device, sources.size // 4 * vocabulary)
        self.scorer = Scorer(batch_tokens=batch_tokens, share_prompts=options.share_prompts, progress=False, impl=impl)
        self.reader = self.scorer.reader(student.model)
        self.ends = end_token_ids(student.tokenizer, student.model)
        self.of_scored_prompts = _OfTheFirst(options.prompts)
        self.of_kept_prompts = _OfTheFirst(options.traces)
        self.kinds: dict[str, pa.DataType] | None = None
        """Of the columns that are carried along; settled by the first chunk."""
        if parts.schema is not None:
            own = {*OWN_COLUMNS, *columns_of(metrics), *(missing_column(m.name) for m in metrics)}
            fields = [field for field in parts.schema if field.name not in own]
            self.kinds = {field.name: field.type for field in fields[2:]}  # behind group and teacher
        self.read_before = 0
        """Bytes of the data that were read before this chunk's."""
        self.bad = 0
        self.tokens = 0
        self.seconds = 0.0
        self.non_finite = 0
        self.too_long = 0
        self.cut = 0
        """Candidates without a token to score, because max_length left none."""

    def run(self) -> None:
        if self.parts.rows:
            self.say.print(f"Going on after {self.parts.rows:,} candidates that an earlier run has scored.")
        started = time.perf_counter()
        try:
            with self._progress() as (progress, task):
                for chunk in self._chunks():
                    begin = self.parts.rows
                    table = self._score(chunk, begin, lambda share: self._advance(progress, task, share))
                    self.parts.add(table)
        except KeyboardInterrupt:
            raise ValueError(
                f"Stopped. {self.parts.rows:,} scored candidates are kept; run the same command again to go on."
            ) from None
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ValueError(
                f"Out of memory with batches of {self.batch_tokens} tokens; give a smaller --batch-tokens and "
                "--overwrite, or a --max-length."
            ) from error
        if not self.parts.rows:
            raise ValueError(f"None of the rows could be used ({self.bad} bad); see the reasons above.")
        if self.ranks.rank == 0:
            self.parts.join(self._facts())
        self._notes(time.perf_counter() - started)

    # ---- Reading ----

    def _candidates(self) -> Iterator[Candidate]:
        for item in read_candidates(self.sources, self.options.layout, self._announce):
            if isinstance(item, Bad):
                self._refuse(item)
            elif not self.of_scored_prompts(item):
                continue
            elif reason := _misfit(item, self.kinds):
                self._refuse(Bad(where=item.where, reason=reason))
            else:
                yield item

    def _announce(self, layout: Layout) -> None:
        self.layout = layout
        self.say.print(f"Columns: {layout.describe()}", markup=False)
        if layout.teacher is None and layout.candidates is None:
            self.say.print("  No column says who wrote a response; name it with --teacher-column to compare teachers.")
        if layout.group is None and layout.text:
            self.say.print(
                "  Each text is a group of its own; name the column that says which answer the same prompt with "
                "--group-column."
            )
        elif layout.group is None:
            self.say.print("  Rows with the same prompt are one group ('prompt_id' is a hash of the prompt).")

    def _refuse(self, bad: Bad) -> None:
        if self.options.on_error == "stop":
            raise ValueError(
                f"{bad.where}: {bad.reason}. Repair it, or leave such rows out with --on-error skip; what is scored so "
                "far is kept."
            )
        self.bad += 1
        if self.bad <= SHOWN_BAD:
            self.say.print(f"  left out: {bad.where}: {bad.reason}", markup=False, highlight=False)

    def _chunks(self) -> Iterator[list[Read]]:
        """Candidates in pieces of about so many tokens."""
        limit = BATCHES_PER_CHUNK * self.batch_tokens * self.ranks.world_size
        chunk: list[Read] = []
        tokens, done, position = 0, self.parts.rows, 0
        stream = self._candidates()
        while several := list(itertools.islice(stream, ROWS_PER_READ)):
            keep = [self.of_kept_prompts(candidate) for candidate in several]
            skip = min(max(done - position, 0), len(several))
            position += len(several)
            if skip == len(several):
                continue
            fresh = several[skip:]
            encoded = self._encode(fresh)
            chunk += zip(fresh, encoded, keep[skip:], strict=True)
            tokens += sum(len(each.input_ids) for each in encoded)
            if tokens >= limit or len(chunk) >= MAX_ROWS:
                yield chunk
                chunk, tokens, self.read_before = [], 0, self.sources.position
        if chunk:
            yield chunk

    def _encode(self, candidates: Sequence[Candidate]) -> list[Encoded]:
        if self.encoder is None:
            tokenizer, options = self.student.tokenizer, self.options
            template, said = choose_template(candidates[0], tokenizer, plain=options.plain)
            self.say.print(f"Template: {said}", markup=False)
            self.encoder = Encoder(
                tokenizer, template=template, max_length=options.max_length, whole_text=options.whole_text
            )
        return self.encoder(candidates)

    # ---- Scoring ----

    def _score(self, chunk: list[Read], begin: int, advance: Callable[[float], None]) -> pa.Table:
        """One row for each candidate of a chunk."""
        size = len(chunk)
        input_ids = np.concatenate([np.asarray(encoded.input_ids, np.int64) for _, encoded, _ in chunk])
        labels = np.concatenate([np.asarray(encoded.labels, np.int64) for _, encoded, _ in chunk])
        offsets = np.r_[0, np.cumsum([len(encoded.input_ids) for _, encoded, _ in chunk])]
        scored = response_mask(input_ids, labels, offsets, self.ends)
        counts = np.diff(np.r_[0, np.cumsum(scored)][offsets])
        usable = np.flatnonzero(counts)
        self.cut += size - len(usable)
        columns: dict[str, FloatArray] = {name: np.full(size, np.nan, np.float32) for name in columns_of(self.metrics)}
        wanted = [place for place, row in enumerate(usable.tolist()) if chunk[row][2]]
        missing = {metric.name: np.full(size, Missing.NO_RESPONSE, np.int8) for metric in self.metrics}
        traces: dict[int, TokenStats] = {}
        if len(usable):
            rows = [
                {**chunk[row][0].extra, "input_ids": chunk[row][1].input_ids, "labels": chunk[row][1].labels}
                for row in usable.tolist()
            ]
            dataset = ScoredDataset(rows, end_token_ids=self.ends)
            started, read = time.perf_counter(), 0
            for block in self.scorer.score(self.reader, dataset, self.metrics, np.arange(len(usable)), traces=wanted):
                traces |= block.traces
                for name, codes in block.missing.items():
                    missing[name][usable[block.indices]] = codes
                for name, values in block.columns.items():
                    columns[name][usable[block.indices]] = values
                self.tokens += block.tokens
                self.non_finite += len(block.non_finite)
                self.too_long += len(block.too_long)
                self.seconds += time.perf_counter() - started
                read += block.tokens
                advance(read / len(input_ids))
                started = time.perf_counter()
        places = {int(row): place for place, row in enumerate(usable.tolist())}
        table = self._identity([candidate for candidate, _, _ in chunk], begin)
        numbers = {
            "num_tokens": pa.array(counts, pa.int32()),
            "length": pa.array(np.diff(offsets), pa.int32()),
            "content_hash": pa.array([candidate.content_hash for candidate, _, _ in chunk], pa.uint64()),
            "prompt_hash": pa.array([candidate.prompt_hash for candidate, _, _ in chunk], pa.uint64()),
            **{name: pa.array(values, pa.float32()) for name, values in columns.items()},
            **{missing_column(name): pa.array(codes, pa.int8()) for name, codes in missing.items()},
        }
        for name, values in numbers.items():
            table = table.append_column(name, values)
        kept = [traces.get(places.get(row, -1)) for row in range(size)]
        masks = np.split(scored, offsets[1:-1])
        texts = [
            None if trace is None else [encoded.token_text(token) for token in np.flatnonzero(mask).tolist()]
            for (_, encoded, _), trace, mask in zip(chunk, kept, masks, strict=True)
        ]
        prompts = [c.prompt_text if trace else None for (c, _, _), trace in zip(chunk, kept, strict=True)]
        return (
            table.append_column("prompt_text", pa.array(prompts, pa.large_string()))
            .append_column("tokens", pa.array(texts, pa.list_(pa.large_string())))
            .append_column("token_ranks", pa.array([_ranks_of(t) for t in kept], pa.list_(pa.int32())))
            .append_column(
                "token_surprisals", pa.array([None if t is None else t.surprisal for t in kept], pa.list_(pa.float32()))
            )
        )

    def _identity(self, candidates: list[Candidate], begin: int) -> pa.Table:
        """The identifying columns, then whatever else the rows carry."""
        group, teacher = self.layout.group or "prompt_id", self.layout.teacher or "teacher"
        columns = {
            "sample": pa.array(range(begin, begin + len(candidates)), pa.int64()),
            group: pa.array([candidate.group for candidate in candidates], pa.string()),
            teacher: pa.array([candidate.teacher for candidate in candidates], pa.string()),
        }
        if self.kinds is None:
            taken = {*columns, *OWN_COLUMNS, *columns_of(self.metrics)}
            names = dict.fromkeys(name for candidate in candidates for name in candidate.extra)
            if clash := [name for name in names if name in taken]:
                self.say.print(
                    f"Not carried along, the scores have columns of that name: {', '.join(clash)}", markup=False
                )
            self.kinds = {
                name: _kind(candidate.extra.get(name) for candidate in candidates)
                for name in names
                if name not in taken
            }
        for name, kind in self.kinds.items():
            values = [candidate.extra.get(name) for candidate in candidates]
            if pa.types.is_string(kind):
                values = [None if value is None else str(value) for value in values]
            columns[name] = pa.array(values, kind)
        return pa.table(columns)

    # ---- Telling ----

    def _progress(self) -> Any:
        if self.ranks.rank or not self.say.is_terminal:
            return nullcontext((None, None))
        progress = Progress(
            TextColumn("Scoring"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.say,
            transient=True,
        )
        return _Entered(progress, progress.add_task("", total=self.sources.size or None, rate=""))

    def _advance(self, progress: Progress | None, task: Any, share: float) -> None:
        """Move the bar to the bytes that are scored, this share of what was read for the chunk among them."""
        if progress is not None:
            position = self.read_before + share * (self.sources.position - self.read_before)
            rate = f"{self.parts.rows:,} rows  {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
            progress.update(task, completed=position, rate=rate)

    def _facts(self) -> dict[str, Any]:
        return run_facts(
            run=None,
            metrics=self.metrics,
            group=self.layout.group or "prompt_id",
            teacher=self.layout.teacher or "teacher",
            **{name: value for name, value in self.parts.settings.items() if name not in ("metrics", "columns")},
            version=__version__,
            layout=_said(self.layout),
            on_error=self.options.on_error,
            paths=[str(Path(name).resolve()) if Path(name).exists() else name for name in self.options.data],
        ) | {"template": "chat" if self.encoder is None or self.encoder.template else "plain"}

    def _notes(self, seconds: float) -> None:
        if self.tokens:
            self.say.print(
                f"Scored {self.tokens:,} tokens in {seconds:,.0f} s ({self.tokens / max(self.seconds, 1e-9):,.0f} "
                f"tokens/s in the student)."
            )
        encoder = self.encoder
        for number, what in (
            (self.bad, "bad rows, left out"),
            (self.cut, "candidates without a score because --max-length cut off all of their response"),
            (self.non_finite, "candidates without a score because the student's logits for them are NaN or infinite"),
            (self.too_long, "candidates without some score because the student has no positions for so many tokens"),
            (encoder.lost_turns if encoder else 0, "earlier turns not scored because the template rewrites them"),
            (encoder.whole_texts if encoder else 0, "texts scored whole, prompt included, because of --whole-text"),
            (
                encoder.wrapped_twice if encoder else 0,
                "prompts that were written in the chat template already and were wrapped once more, unlike the first",
            ),
            (
                _duplicates(self.options.output) if self.ranks.rank == 0 else 0,
                "candidates that repeat another word for word, and count as often as they stand in the data",
            ),
        ):
            if number:
                self.say.print(f"[yellow]note:[/] {what}: {number:,}.")


class _OfTheFirst:
    """Whether a candidate is of one of the first `number` prompts; of any for None."""

    def __init__(self, number: int | None) -> None:
        self._number = number
        self._groups: set[str] = set()

    def __call__(self, candidate: Candidate) -> bool:
        if self._number is None:
            return True
        if len(self._groups) < self._number:
            self._groups.add(candidate.group)
        return candidate.group in self._groups


def _ranks_of(trace: TokenStats | None) -> Any:
    return None if trace is None or trace.rank is None else trace.rank.astype(np.int32)


class _Entered:
    """A progress bar as a context that gives the bar and its task."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress, self.task = progress, task

    def __enter__(self) -> tuple[Progress, Any]:
        self.progress.start()
        return self.progress, self.task

    def __exit__(self, *error: object) -> None:
        self.progress.stop()


class ScoreOutput:
    """The chunks that are done, as parts beside the output, and the settings they were made with.

    Args:
        output: the file that they are joined into.
        settings: what decides the numbers.
        overwrite: throw away what is there.
        ranks: the first process reads the disk and tells the others.

    Raises:
        ValueError: what is there was made with other settings.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], *, overwrite: bool, ranks: Ranks) -> None:
        self.output = output
        self.settings = dict(settings)
        self.rows = 0
        """Candidates that are scored and written."""
        self.schema: pa.Schema | None = None
        self.complete = False
        self._parts = Parts(output.with_name(output.name + ".parts"))
        self._ranks = ranks
        failure: str | None = None
        if ranks.rank == 0:
            try:
                self._open(overwrite)
            except ValueError as error:
                failure = str(error)
        failure, self.rows, self.schema, self.complete = ranks.gather((failure, self.rows, self.schema, self.complete))[
            0
        ]
        if failure:
            raise ValueError(failure)

    def _open(self, overwrite: bool) -> None:
        if overwrite:
            self._parts.remove()
            self.output.unlink(missing_ok=True)
        if self.output.exists():
            self._compare(_settings_of(self.output), str(self.output))
            self.complete = True
            return
        if (before := self._parts.identity) is not None:
            self._compare(before, f"The unfinished {self.output}")
            self._parts.drop_damaged()
        else:
            self._parts.begin(self.settings)
        for part in self._parts.paths():
            self.schema = self.schema or pq.read_schema(part)
            self.rows += pq.read_metadata(part).num_rows

    def _compare(self, before: Mapping[str, Any], what: str) -> None:
        for name, now in self.settings.items():
            if before.get(name) != json.loads(json.dumps(now)):
                raise ValueError(
                    f"{what} was made with {name} = {before.get(name)!r}, now it is {now!r}. Run it with the "
                    "settings it was made with, give another --output, or start over with --overwrite."
                )

    def add(self, table: pa.Table) -> None:
        """Keep a chunk for good."""
        if self._ranks.rank == 0:
            self._parts.add(table)
        self.rows += table.num_rows

    def join(self, facts: Mapping[str, Any]) -> None:
        """Write the one file, in row groups of a useful size, and clear away the parts."""
        paths = self._parts.paths()
        contents = (read_part(path, ["content_hash"])["content_hash"].to_numpy().tobytes() for path in paths)
        entries = encode_facts({**facts, "dataset": hash_of(*contents), "settings": self.settings})
        unfinished = self.output.with_name(self.output.name + ".unfinished")
        schema = pq.read_schema(paths[0]).with_metadata(entries)
        with pq.ParquetWriter(unfinished, schema, compression="zstd") as writer:
            waiting: list[pa.Table] = []
            for path in paths:
                waiting.append(read_part(path))
                if sum(table.num_rows for table in waiting) >= ROW_GROUP or path == paths[-1]:
                    writer.write_table(pa.concat_tables(waiting).replace_schema_metadata(entries))
                    waiting = []
        unfinished.rename(self.output)
        self._parts.remove()


def _settings_of(output: Path) -> dict[str, Any]:
    try:
        found = decode_facts(pq.read_schema(output).metadata).get("settings")
    except (pa.ArrowException, OSError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{output} exists and holds no scores of this command; give another --output, or --overwrite.")
    return found


def _require_lengths(options: Options) -> None:
    if options.max_length is not None and options.max_length < 2:
        raise ValueError(f"--max-length {options.max_length}: a prompt and a response take 2 tokens at least.")
    if options.batch_tokens is not None and options.batch_tokens < 1:
        raise ValueError(f"--batch-tokens {options.batch_tokens}: give a positive number, such as 8192.")


def _said(layout: Layout) -> dict[str, str]:
    return {name: value for name, value in vars(layout).items() if value is not None}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _kind(values: Iterator[Any]) -> pa.DataType:
    """What holds all of these: the kind of a carried column is settled by the first chunk."""
    found = {type(value) for value in values if value is not None}
    for kinds, arrow in (({bool}, pa.bool_()), ({int}, pa.int64()), ({int, float}, pa.float64())):
        if found and found <= kinds:
            return arrow
    return pa.string()


def _misfit(candidate: Candidate, kinds: Mapping[str, pa.DataType] | None) -> str | None:
    """Why a candidate does not fit the columns that the first chunk settled; None if it does."""
    for name, kind in (kinds or {}).items():
        value = candidate.extra.get(name)
        if value is None or pa.types.is_string(kind):
            continue
        fits: Any = {"bool": bool, "int64": int, "double": (int, float)}[str(kind)]
        if not isinstance(value, fits) or isinstance(value, bool) != (str(kind) == "bool"):
            return f"'{name}' is {value!r}, while the first rows hold a {kind} there"
    return None


def _duplicates(output: Path) -> int:
    """Candidates whose content another one before them has. A share of the hashes at a time, so that memory stays."""
    count = 0
    with pq.ParquetFile(output) as file:
        shares = 1 + file.metadata.num_rows // (1 << 18)
        for share in range(shares):
            batches = (batch["content_hash"].to_numpy() for batch in file.iter_batches(columns=["content_hash"]))
            hashes = np.concatenate([values[values % shares == share] for values in batches])
            count += len(hashes) - len(np.unique(hashes))
    return count


def _join(device: torch.device) -> Ranks:
    """The processes of `accelerate launch`; alone without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState  # type: ignore[import-untyped]

        PartialState(cpu=device.type == "cpu")
    return Ranks.current(device)


def _show(output: Path, say: Console) -> None:
    from distill_sampler.cli.teachers import summary

    summary(output, say, ranked=pq.read_metadata(output).num_rows <= SUMMARY_ROWS)
