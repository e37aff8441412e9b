"""What `distill-sampler score` writes: chunks that are kept as they are done, and the one file they are joined into.

    OUTPUT.parts/           the chunks of the run under way, in the order of the data
    OUTPUT.parts.earlier/   chunks from before the data changed, whose rows are taken over by their content
    OUTPUT                  all chunks in one file

Scores belong to the content of the model's files and of the data, whatever these are called. With other weights or
other settings nothing is ever taken over. Rows whose content is the same have the same scores, so an unfinished run
goes on after the data was repaired.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_sampler.artifacts.parts import Parts, read_part
from distill_sampler.artifacts.schema import TRACE_COLUMNS, decode_facts, encode_facts
from distill_sampler.distributed import Ranks
from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.keys import first_of_each
from distill_sampler.serialize import differences, hash_of
from distill_sampler.types import BoolArray, HashArray, IntArray

ROW_GROUP = 1 << 14
"""Rows of the output that are held together, and their numbers compressed together, when the chunks are joined."""
_PIECES_HELD = 4
"""Earlier chunks that are held in memory: rows are looked up in the order of the data, which seldom changes."""


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Origin:
    """What scores belong to. Models and data are compared by content; their names only serve messages."""

    model: str
    lora: str | None = None
    commit: str | None = None
    """Of a model from the hub."""
    files: Mapping[str, str]
    """Hashes of the model's files, by part and name: `"weights/model.safetensors"`."""
    settings: Mapping[str, Any]
    """What else decides the numbers."""
    data: Sequence[tuple[str, str | None]]
    """Each file's or data set's name and a hash of its content; None if nobody can tell."""
    rows: Mapping[str, Any]
    """What decides which rows there are, what stands beside their scores, and which are read together."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    def other_scores(self, before: Mapping[str, Any], made: str) -> str | None:
        """Why scores of this origin must not stand beside earlier ones: a sentence, or None.

        Args:
            before: the earlier ones' origin, from JSON.
            made: what they are called: `"scores.parquet"`.
        """
        if "files" not in before or "settings" not in before:
            return f"{made} does not say which model and settings it was made with."
        now = self.to_json()
        if bool(before["lora"]) != bool(self.lora):
            return f"{made} was made {'with --lora ' + before['lora'] if before['lora'] else 'without --lora'}."
        for part, (whose, what) in {
            "weights": (f"The model {self.model}", "other weights"),
            "config": (f"The model {self.model}", "another config"),
            "tokenizer": (f"The model {self.model}", "another tokenizer"),
            "adapter": (f"The adapter {self.lora}", "other content"),
        }.items():
            old, new = ({n: h for n, h in o["files"].items() if n.startswith(f"{part}/")} for o in (before, now))
            names = old.keys() | new.keys()
            if self.commit is not None and self.commit == before["commit"] and part != "adapter":
                names = old.keys() & new.keys()  # of one commit, more files may have come into the cache since
            if changed := sorted(name for name in names if old.get(name) != new.get(name)):
                return f"{whose} has {what} ({Path(changed[0]).name}) than when {made} was made."
        if not (before["files"] or now["files"]) and before["commit"] != self.commit:
            return f"The model {self.model} is of another commit ({self.commit}) than when {made} was made."
        return _other_settings(before["settings"], now["settings"], made)

    def other_rows(self, before: Mapping[str, Any], made: str) -> str | None:
        """How the rows of this origin differ from earlier ones: a sentence, or None. Data sets that nobody can tell
        the content of are the same if they are called the same."""
        old, new = before["data"], self.to_json()["data"]
        if len(old) != len(new):
            return f"The data has {len(new)} files, and had {len(old)} when {made} was made."
        for (was, content), (name, found) in zip(old, new, strict=True):
            if was != name if None in (content, found) else content != found:
                return f"{name} has other content than the data that {made} was made from."
        return _other_settings(before["rows"], self.to_json()["rows"], made)

    @property
    def sure_of_data(self) -> bool:
        """Whether equal names and hashes mean equal rows."""
        return all(content is not None for _, content in self.data)


class ScoreOutput:
    """The output of one run of the command, and what earlier runs have left of it.

    Args:
        output: the file.
        origin: gives what its scores belong to; called on the first process.
        overwrite: throw away what is there.
        ranks: the first process reads and writes the disk, and tells the others.

    Raises:
        ValueError: what is there belongs to another model, other settings or, if it is finished, other data.
    """

    def __init__(self, output: Path, origin: Callable[[], Origin], *, overwrite: bool, ranks: Ranks) -> None:
        self.output = output
        self.rows = 0
        """Candidates that are scored and written."""
        self.earlier = 0
        """Candidates that were scored before the data changed."""
        self.taken = 0
        """How many of them were taken over by this run."""
        self.schema: pa.Schema | None = None
        self.complete = False
        self._parts = Parts(output.with_name(output.name + ".parts"))
        self._earlier = Parts(output.with_name(output.name + ".parts.earlier"))
        self._read = lru_cache(_PIECES_HELD)(read_part)
        self._ranks = ranks
        failure: str | None = None
        if ranks.rank == 0:
            try:
                self.origin = origin()
                self._open(overwrite)
            except (ValueError, OSError) as error:
                failure = str(error)
        told = (failure, self.rows, self.earlier, self.schema, self.complete)
        failure, self.rows, self.earlier, self.schema, self.complete = ranks.gather(told)[0]
        if failure:
            raise ValueError(failure)

    def _open(self, overwrite: bool) -> None:
        if overwrite:
            self._parts.remove()
            self._earlier.remove()
            self.output.unlink(missing_ok=True)
        if self.output.exists():
            found, made = _origin_of(self.output), str(self.output)
            if why := self.origin.other_scores(found, made) or self.origin.other_rows(found, made):
                raise ValueError(f"{why} Give another --output, or score anew with --overwrite.")
            self._parts.remove()
            self._earlier.remove()
            self.complete = True
            return
        # an attempt that has scored nothing is in nobody's way
        current = self._parts.identity if self._parts.drop_damaged() else None
        earlier = self._earlier.identity if self._earlier.drop_damaged() else None
        made = f"the unfinished {self.output}"
        for before in (current, earlier):
            if before is not None and (why := self.origin.other_scores(before, made)):
                raise ValueError(
                    f"{why[0].upper()}{why[1:]} Go on with what it was made with, give another --output, or start over "
                    "with --overwrite."
                )
        if current is not None and not (self.origin.sure_of_data and self.origin.other_rows(current, made) is None):
            if earlier is None:
                self._earlier.begin(current)
            self._earlier.take(self._parts)
            current = None
        if current is None:
            self._parts.begin(self.origin.to_json())
        for path in self._parts.paths():
            self.schema = self.schema or pq.read_schema(path)
            self.rows += pq.read_metadata(path).num_rows
        self._index()

    # ---- What was scored before the data changed ----

    def _index(self) -> None:
        """Where each earlier row lies, by the hash of its content."""
        self._pieces = self._earlier.paths()
        hashes = [_hashes_of(path) for path in self._pieces]
        self._starts: IntArray = np.cumsum([0, *map(len, hashes)])
        every = np.concatenate([np.zeros(0, np.uint64), *hashes])
        by_hash = np.argsort(every, kind="stable")
        self._places: IntArray = by_hash[first_of_each(every[by_hash])]
        self._hashes = every[self._places]
        self.earlier = len(every)

    def require_some(self, hashes: Iterable[int]) -> None:
        """Refuse data that has none of the candidates that were scored before it changed: it is other data.

        Raises:
            ValueError: none of the hashes is that of an earlier row.
        """
        failure: str | None = None
        if self._ranks.rank == 0:
            try:
                if not any(self._find(np.array([value], np.uint64))[0] >= 0 for value in hashes):
                    before = ", ".join(name for name, _ in (self._earlier.identity or {}).get("data", ()))
                    failure = (
                        f"The unfinished {self.output} holds the scores of {self.earlier:,} candidates of other data "
                        f"({before}), and this data has none of them. Give another --output, or start over with "
                        "--overwrite."
                    )
            except ValueError as error:  # the other processes wait to be told
                failure = str(error)
        if failure := self._ranks.gather(failure)[0]:
            raise ValueError(failure)

    def known(self, hashes: HashArray, traced: BoolArray, columns: Sequence[str]) -> tuple[BoolArray, pa.Table | None]:
        """What an earlier run has scored of a chunk.

        Args:
            hashes: `[rows]` the candidates' content.
            traced: `[rows]` which need token by token what the student makes of them.
            columns: those that belong to the scores.

        Returns:
            `[rows]` whether the row is known, and on the first process the known rows, in order; None if there is none.
        """
        there: BoolArray = np.zeros(len(hashes), bool)
        rows: pa.Table | None = None
        if not self.earlier:
            return there, rows
        if self._ranks.rank == 0:
            places = self._find(hashes)
            there = places >= 0
            if there.any():
                rows = self._rows(places[there], columns)
                usable = ~traced[there] | rows["tokens"].is_valid().to_numpy()
                there[there] = usable
                rows = _with_traces_of(rows.filter(pa.array(usable)), traced[there])
        there = self._ranks.gather(there)[0]
        self.taken += int(there.sum())
        return there, rows

    def _find(self, hashes: HashArray) -> IntArray:
        """`[n]` the number of an earlier row with each content; -1 if there is none."""
        at = np.searchsorted(self._hashes, hashes)
        hit = at < len(self._hashes)
        hit[hit] = self._hashes[at[hit]] == hashes[hit]
        return np.where(hit, self._places[np.where(hit, at, 0)], -1)

    def _rows(self, places: IntArray, columns: Sequence[str]) -> pa.Table:
        piece = np.searchsorted(self._starts, places, side="right") - 1
        tables, order = [], []
        for number in np.unique(piece).tolist():
            mine = np.flatnonzero(piece == number)
            table = self._read(self._pieces[number]).select(columns)
            tables.append(table.take(pa.array(places[mine] - self._starts[number])))
            order.append(mine)
        return pa.concat_tables(tables).take(pa.array(np.argsort(np.concatenate(order))))

    # ---- Writing ----

    def add(self, table: pa.Table) -> None:
        """Keep a chunk for good."""
        if self._ranks.rank == 0:
            self._parts.add(table)
        self.rows += table.num_rows

    def join(self, facts: Mapping[str, Any]) -> None:
        """Write the one file, in row groups of a useful size, and clear away the chunks."""
        paths = self._parts.paths()
        contents = (_hashes_of(path).tobytes() for path in paths)
        entries = encode_facts({**facts, "dataset": hash_of(*contents), "origin": self.origin.to_json()})
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
        self._earlier.remove()


def _other_settings(before: Mapping[str, Any], now: Mapping[str, Any], made: str) -> str | None:
    for name, value in now.items():
        was = before.get(name)
        if was == value:
            continue
        if name == "template":
            return f"{made} was made with another chat template."
        if isinstance(was, dict) and isinstance(value, dict):
            return f"{made} was made with other {name}: {differences(was, value)}."
        return f"{made} was made with {name} = {was!r}, now it is {value!r}."
    return None


def _origin_of(output: Path) -> dict[str, Any]:
    try:
        found = decode_facts(pq.read_schema(output).metadata).get("origin")
    except (pa.ArrowException, OSError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{output} exists and holds no scores of this command; give another --output, or --overwrite.")
    return found


def _hashes_of(path: Path) -> HashArray:
    hashes: HashArray = read_part(path, ["content_hash"])["content_hash"].to_numpy()
    return hashes


def _with_traces_of(rows: pa.Table, traced: BoolArray) -> pa.Table:
    """Without the tokens of rows whose tokens are not wanted."""
    wanted = pa.array(traced)
    for name in TRACE_COLUMNS:
        column = rows[name]
        kept = pc.if_else(wanted, column.combine_chunks(), pa.scalar(None, column.type))
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), kept)
    return rows
