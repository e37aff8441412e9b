"""`distill-sampler select`: applies policies to scores on disk, and writes a training set in TRL's formats.

The scores hold no text, so the data is read again and matched with them, candidate by candidate, by content hashes.
Data that has changed since is refused. The chosen candidates go into a temporary file, one line each, and are written
in the order of the plan, so memory does not grow with the text.

A training run scores the tokens that its trainer prepared, and does not know the files they came from. Its chosen rows
are listed without text, by their number in the trainer's data set and by the user's columns.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from distill_sampler.artifacts.passes import missing_column
from distill_sampler.artifacts.schema import FACT_COLUMNS, RUN_COLUMNS
from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.planning.why import ExplainedPlan
from distill_sampler.policies.keys import num_distinct
from distill_sampler.serialize import require_writable
from distill_sampler.sources.candidates import Candidate, Layout, read_candidates
from distill_sampler.sources.files import Bad, Sources
from distill_sampler.specs import parse_policies
from distill_sampler.types import IntArray

ROWS = 1024
"""How many rows are written to a Parquet output at a time."""
_OURS = ("prompt", "completion", "messages", "input_ids", "labels", "tools", "weight", "reason")
"""The names of a training set's columns, besides its metrics and the user's columns."""


def run(
    path: Path, *, policies: Sequence[str], output: Path, data: Sequence[str], seed: int | None, epoch: int | None
) -> dict[str, Any]:
    """Choose rows, and write them. Returns the counts.

    Args:
        path: a file of `score`, or a run's folder.
        policies: policies as users type them.
        output: the file to write.
        data: where the data is now; empty: where it was when it was scored.
        seed: seed of the policies; None: the run's, or 0.
        epoch: which epoch of a run; None: the last.

    Raises:
        ValueError: a policy does not fit the scores, the data is missing or has changed, or `output` cannot be written.
    """
    say = Console(stderr=True, soft_wrap=True)
    require_writable(output, ".jsonl", ".parquet")
    scores = Scores.open(path)
    seed = int(scores.facts.get("seed") or 0) if seed is None else seed
    choice = scores.choose(parse_policies(policies, scores.metrics), seed=seed, epoch=epoch)
    columns = scores.facts.get("layout")
    if columns is None and data:
        raise ValueError(
            f"--data: {path} holds the scores of a training run, whose rows are the tokens that its trainer prepared. "
            "They cannot be matched with files of text. Leave --data out to get a list by row number and by your "
            "columns."
        )
    plan = choice.plan
    wanted = np.zeros(len(choice.left_out_by), bool)
    wanted[plan.indices] = True
    unfinished = output.with_name(output.name + ".unfinished")
    parquet = output.suffix == ".parquet"
    if columns is None:
        _write_list(_listed(scores, choice, epoch), unfinished, parquet=parquet)
    else:
        layout = Layout(**{part.name: columns.get(part.name) for part in fields(Layout)})
        where = list(data) or scores.facts["paths"]
        sources = Sources(where, split=scores.facts["split"], subset=scores.facts["subset"])
        read = dict.fromkeys(name for metric in scores.facts["metrics"] for name in metric["uses_columns"])
        with tempfile.TemporaryFile() as kept:
            found = read_candidates(sources, layout, read=tuple(read))
            places = _keep(found, choice.content_hash, wanted, kept, layout, scores)
            _write(_rows(choice, kept, places), unfinished, parquet=parquet)
    unfinished.rename(output)
    chain = ", then ".join(policy.text for policy in choice.policies)
    distinct = num_distinct(plan.indices)
    say.print(
        f"{output}: {len(plan):,} rows ({distinct:,} distinct of {len(wanted):,} candidates) by {chain}.", markup=False
    )
    counts = {"output": output, "rows": len(plan), "distinct": distinct, "candidates": len(wanted)}
    if columns is None:
        say.print(
            f"{path} holds no text, so this is a list: 'sample' is a row's number in the data set that the trainer "
            "prepared, 'source_row' its number in the trainer's original data, 'weight' its weight in the loss.",
            markup=False,
        )
    return {**counts, "policies": [policy.text for policy in choice.policies]}


def _keep(
    candidates: Iterator[Candidate | Bad], hashes: Any, wanted: Any, kept: IO[bytes], layout: Layout, scores: Scores
) -> IntArray:
    """Write the wanted candidates one after the other. `[candidates]` where each begins; -1 for the others."""
    places = np.full(len(wanted), -1, np.int64)
    chat = scores.facts.get("template") != "plain"
    taken = {*scores.metrics, *(name for metric in scores.metrics.values() for name in metric.columns), *_OURS}
    row = 0
    for candidate in candidates:
        if row == len(wanted):
            break
        # a row that was left out of the scores as bad has no hash among them: go on to the next row
        if isinstance(candidate, Bad) or candidate.content_hash != int(hashes[row]):
            continue
        if wanted[row]:
            places[row] = kept.tell()
            kept.write(json.dumps(_record(candidate, layout, taken, chat), ensure_ascii=False).encode() + b"\n")
        row += 1
    if row < len(wanted):
        raise ValueError(
            f"The data is not what {scores.path} was made from: it no longer has candidate {row} of {len(wanted)}. "
            "Score again, or say with --data where the scored data is."
        )
    return places


def _record(candidate: Candidate, layout: Layout, taken: Collection[str], chat: bool) -> dict[str, Any]:
    """A candidate as TRL reads it: `prompt` and `completion`, or `messages` where every turn is trained on, or `text`,
    or `input_ids` with `labels`.

    The user's columns are added, under another name where a column of the library has theirs.
    """
    record: dict[str, Any] = {}
    if candidate.input_ids is not None:
        record["input_ids"], record["labels"] = candidate.input_ids, candidate.labels or candidate.input_ids
    elif candidate.text is not None:
        record["text"] = candidate.text
    elif not chat:
        record["prompt"], record["completion"] = (message["content"] for message in candidate.messages)
    elif candidate.first:
        record["prompt"] = candidate.messages[: candidate.first]
        record["completion"] = candidate.messages[candidate.first :]
    else:
        record["messages"] = candidate.messages
    if candidate.tools:
        record["tools"] = candidate.tools
    identity = {layout.group or "prompt_id": candidate.group, layout.teacher or "teacher": candidate.teacher}
    for name, value in {**identity, **candidate.extra}.items():
        free = name
        while free in record or free in taken:
            free += "_in_data"
        record[free] = value
    return record


def _rows(choice: ExplainedPlan, kept: IO[bytes], places: IntArray) -> Iterator[dict[str, Any]]:
    """The rows of the training set, in the order of the plan."""
    plan = choice.plan
    weighted = bool((plan.weights != 1).any())
    for sample, weight in zip(map(int, plan.indices), map(float, plan.weights), strict=True):  # converted one by one
        kept.seek(int(places[sample]))
        row = json.loads(kept.readline())
        numbers = {name: float(values[sample]) for name, values in choice.scores.items()}
        row.update({name: value if np.isfinite(value) else None for name, value in numbers.items()})
        if weighted:
            row["weight"] = weight
        row["reason"] = choice.reason(sample)
        yield row


def _listed(scores: Scores, choice: ExplainedPlan, epoch: int | None) -> pa.Table:
    """The plan of a run as a table: identity, scores, weight and reason of each row."""
    plan = choice.plan
    ours = {*RUN_COLUMNS, *FACT_COLUMNS, *choice.scores, *map(missing_column, scores.metrics)}
    names = [name for name in scores.names if name not in ours]
    table = scores.read(names, epoch=epoch).take(pa.array(plan.indices))
    table = table.rename_columns([name + "_in_data" * (name in ("weight", "reason")) for name in names])
    for name, values in choice.scores.items():
        table = table.append_column(name, pa.array(values[plan.indices], from_pandas=True))
    reasons = pa.array([choice.reason(sample) for sample in plan.indices.tolist()])
    return table.append_column("weight", pa.array(plan.weights)).append_column("reason", reasons)


def _write_list(table: pa.Table, path: Path, *, parquet: bool) -> None:
    if parquet:
        pq.write_table(table, path, compression="zstd")
        return
    with path.open("w", encoding="utf-8") as lines:
        for batch in table.to_batches(ROWS):
            lines.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in batch.to_pylist())


def _write(rows: Iterator[dict[str, Any]], path: Path, *, parquet: bool) -> None:
    if not parquet:
        with path.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return
    writer: pq.ParquetWriter | None = None
    try:
        waiting: list[dict[str, Any]] = []
        for row in rows:
            waiting.append(row)
            if len(waiting) == ROWS:
                writer, waiting = _flush(writer, waiting, path), []
        if waiting:
            writer = _flush(writer, waiting, path)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(
            f"The rows do not fit into one table ({str(error).splitlines()[0]}). Write a .jsonl file with --output."
        ) from None
    finally:
        if writer is not None:
            writer.close()


def _flush(writer: pq.ParquetWriter | None, rows: list[dict[str, Any]], path: Path) -> pq.ParquetWriter:
    table = pa.Table.from_pylist(rows, schema=None if writer is None else writer.schema)
    writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
    writer.write_table(table)
    return writer
