"""`distill-sampler select`: policies applied to scores on disk, and a training set written in TRL's formats.

The scores hold no text, so the data is read once more and matched candidate by candidate with the scores' content
hashes; data that has changed since is refused. What is chosen waits in a temporary file, one line each, and is written
in the order of the plan: memory does not grow with the text.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.planning.why import Choice
from distill_sampler.serialize import require_writable
from distill_sampler.sources.candidates import Candidate, Layout, read_candidates
from distill_sampler.sources.files import Bad, Sources
from distill_sampler.specs import parse_policies
from distill_sampler.types import IntArray

ROWS = 1024
"""Rows of a Parquet output that are put together at a time."""


def run(
    path: Path, *, policies: Sequence[str], output: Path, data: Sequence[str], seed: int, epoch: int | None
) -> None:
    """Choose, and write what is chosen.

    Raises:
        ValueError: a policy does not fit the scores, the data is not there or has changed, `output` cannot be written.
    """
    say = Console(stderr=True, soft_wrap=True)
    require_writable(output, ".jsonl", ".parquet")
    scores = Scores.open(path)
    choice = scores.choose(parse_policies(policies), seed=seed, epoch=epoch)
    where = list(data) or list(scores.facts.get("paths") or [])
    if not where:
        raise ValueError(f"{path} does not say where its data lies; name it with --data.")
    sources = Sources(where, split=scores.facts.get("split") or "train", subset=scores.facts.get("subset"))
    told = scores.facts.get("layout") or {}
    layout = Layout(**{part.name: told.get(part.name) for part in fields(Layout)})
    plan = choice.plan
    wanted = np.zeros(len(choice.left_out_by), bool)
    wanted[plan.indices] = True
    unfinished = output.with_name(output.name + ".unfinished")
    with tempfile.TemporaryFile() as kept:
        places = _keep(read_candidates(sources, layout), choice.content_hash, wanted, kept, scores, path)
        _write(_rows(choice, kept, places), unfinished, parquet=output.suffix == ".parquet")
        unfinished.rename(output)
    chain = ", then ".join(policy.text for policy in choice.policies)
    distinct = len(np.unique(plan.indices))
    say.print(
        f"{output}: {len(plan):,} rows ({distinct:,} distinct of {len(wanted):,} candidates) by {chain}.", markup=False
    )


def _keep(
    candidates: Iterator[Candidate | Bad], hashes: Any, wanted: Any, kept: IO[bytes], scores: Scores, path: Path
) -> IntArray:
    """Write the wanted candidates one after the other. Gives where each begins; -1 for the others."""
    places = np.full(len(wanted), -1, np.int64)
    chat = scores.facts.get("template") != "plain"
    row = 0
    for candidate in candidates:
        if row == len(wanted):
            break
        # what was left out of the scores (a bad row) has no hash among them: the next one has
        if isinstance(candidate, Bad) or candidate.content_hash != int(hashes[row]):
            continue
        if wanted[row]:
            places[row] = kept.tell()
            kept.write(json.dumps(_record(candidate, scores, chat), ensure_ascii=False).encode() + b"\n")
        row += 1
    if row < len(wanted):
        raise ValueError(
            f"The data is not what {path} was made from: candidate {row} of {len(wanted)} is not in it any more. Score "
            "again, or name the data with --data."
        )
    return places


def _record(candidate: Candidate, scores: Scores, chat: bool) -> dict[str, Any]:
    """A candidate as TRL reads it: `prompt` and `completion`, or `messages` where every turn is trained on."""
    record: dict[str, Any] = {}
    if not chat:
        record["prompt"], record["completion"] = (message["content"] for message in candidate.messages)
    elif candidate.first:
        record["prompt"] = candidate.messages[: candidate.first]
        record["completion"] = candidate.messages[candidate.first :]
    else:
        record["messages"] = candidate.messages
    if candidate.tools:
        record["tools"] = candidate.tools
    identity = {scores.group or "prompt_id": candidate.group, scores.teacher or "teacher": candidate.teacher}
    return {**candidate.extra, **record, **identity}


def _rows(choice: Choice, kept: IO[bytes], places: IntArray) -> Iterator[dict[str, Any]]:
    """The rows of the training set, in the order of the plan."""
    plan = choice.plan
    weighted = bool((plan.weights != 1).any())
    for sample, weight in zip(map(int, plan.indices), map(float, plan.weights), strict=True):  # made as they are used
        kept.seek(int(places[sample]))
        row = json.loads(kept.readline())
        numbers = {name: float(values[sample]) for name, values in choice.scores.items()}
        row.update({name: value if np.isfinite(value) else None for name, value in numbers.items()})
        if weighted:
            row["weight"] = weight
        row["reason"] = choice.reason(sample)
        yield row


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
            f"The rows do not fit one table ({str(error).splitlines()[0]}); write a .jsonl file."
        ) from None
    finally:
        if writer is not None:
            writer.close()


def _flush(writer: pq.ParquetWriter | None, rows: list[dict[str, Any]], path: Path) -> pq.ParquetWriter:
    table = pa.Table.from_pylist(rows, schema=None if writer is None else writer.schema)
    writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
    writer.write_table(table)
    return writer
