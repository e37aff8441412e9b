"""The output of `distill-sampler score`: chunks that are kept as they are scored, and the file they are joined into.

    OUTPUT.parts/           the chunks of the current run, in the order of the data
    OUTPUT.parts.earlier/   chunks from before the data changed; rows with the same content are reused
    OUTPUT                  all chunks in one file

Scores belong to the content of the model's files and of the data, not to their names. Scores made with other weights or
other settings are never reused. Rows with the same content have the same scores, so an unfinished run can continue
after the data has been corrected.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_sampler.artifacts.parts import Parts, read_part
from distill_sampler.artifacts.schema import TRACE_COLUMNS
from distill_sampler.distributed import Ranks
from distill_sampler.engines.writing import join_store
from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.keys import first_of_each, num_distinct
from distill_sampler.serialize import decode_facts, differences, encode_facts, hash_of
from distill_sampler.types import BoolArray, HashArray, IntArray

ROW_GROUP = 1 << 14
"""How many rows form a row group of the output, which is compressed as a whole."""
_PIECES_HELD = 4
"""How many earlier chunks are held in memory. Rows are looked up in the order of the data, which seldom changes."""


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Origin:
    """What scores belong to. Models and data are compared by content; their names are only used in messages."""

    model: str
    """The student's folder, or its name on the hub."""
    lora: str | None = None
    """The adapter on the student, if there is one."""
    commit: str | None = None
    """Commit of a model from the hub."""
    files: Mapping[str, str]
    """Hashes of the model's files, by part and name: `"weights/model.safetensors"`."""
    settings: Mapping[str, Any]
    """The other settings that the scores depend on."""
    data: Sequence[tuple[str, str | None]]
    """The name of each file or data set, and a hash of its content; None: the content is unknown."""
    rows: Mapping[str, Any]
    """Settings that decide which rows there are, which columns they have, and which rows are read together."""

    def to_json(self) -> dict[str, Any]:
        """The origin as plain JSON values."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    def other_scores(self, before: Mapping[str, Any], made: str) -> str | None:
        """Why scores of this origin must not be mixed with earlier ones: a sentence, or None.

        Args:
            before: the origin of the earlier scores, from JSON.
            made: the name of the earlier scores in the sentence: `"scores.parquet"`.
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
                names = old.keys() & new.keys()  # more files of the same commit may be in the cache now
            if changed := sorted(name for name in names if old.get(name) != new.get(name)):
                return f"{whose} has {what} ({Path(changed[0]).name}) than when {made} was made."
        if not (before["files"] or now["files"]) and before["commit"] != self.commit:
            return f"The model {self.model} has another commit ({self.commit}) than when {made} was made."
        return _other_settings(before["settings"], now["settings"], made)

    def other_rows(self, before: Mapping[str, Any], made: str) -> str | None:
        """How the rows of this origin differ from earlier ones: a sentence, or None. Data sets of unknown content are
        compared by name."""
        old, new = before["data"], self.to_json()["data"]
        if len(old) != len(new):
            return f"The data has {len(new)} files now, and had {len(old)} when {made} was made."
        for (was, content), (name, found) in zip(old, new, strict=True):
            if was != name if None in (content, found) else content != found:
                return f"{name} has other content than the data that {made} was made from."
        return _other_settings(before["rows"], self.to_json()["rows"], made)

    @property
    def sure_of_data(self) -> bool:
        """Whether the content of all data is known."""
        return all(content is not None for _, content in self.data)


class ScoreOutput:
    """The output of one run of the command, and the scores that earlier runs have left.

    Args:
        output: the file to write.
        origin: returns what the scores belong to. Only the first process calls it.
        overwrite: discard the scores of earlier runs.
        ranks: the first process reads and writes files, and sends the others what they need.
        recheck: match the rows of a complete output with the data by content, because nobody knows whether it changed,
            instead of taking the output as it is.

    Raises:
        ValueError: the scores of earlier runs belong to another model, to other settings or, if the output is complete,
            to other data.
    """

    def __init__(
        self, output: Path, origin: Callable[[], Origin], *, overwrite: bool, ranks: Ranks, recheck: bool = False
    ) -> None:
        self.output = output
        self.rows = 0
        """How many candidates are scored and written."""
        self.earlier = 0
        """How many candidates were scored before the data changed."""
        self.taken = 0
        """How many of these this run has reused."""
        self.schema: pa.Schema | None = None
        """The schema of the chunks that are written; None: there are none."""
        self.complete = False
        """Whether the output already holds all scores."""
        self._parts = Parts(output.with_name(output.name + ".parts"))
        self._earlier = Parts(output.with_name(output.name + ".parts.earlier"))
        self._read = lru_cache(_PIECES_HELD)(read_part)
        self._ranks = ranks
        self._recheck = recheck
        failure: str | None = None
        if ranks.rank == 0:
            try:
                self.origin = origin()
                self._open(overwrite)
            except (ValueError, OSError) as error:
                failure = str(error)
        found = (failure, self.rows, self.earlier, self.schema, self.complete)
        failure, self.rows, self.earlier, self.schema, self.complete = ranks.gather(found)[0]
        if failure:
            raise ValueError(failure)

    def _open(self, overwrite: bool) -> None:
        if overwrite:
            self._parts.remove()
            self._earlier.remove()
            self.output.unlink(missing_ok=True)
        if self.output.exists() and self._recheck:
            self._take_apart()
        if self.output.exists():
            found, made = _origin_of(self.output), str(self.output)
            if why := self.origin.other_scores(found, made) or self.origin.other_rows(found, made):
                raise ValueError(f"{why} Give another --output, or score again with --overwrite.")
            self._parts.remove()
            self._earlier.remove()
            self.complete = True
            return
        # earlier runs that have scored nothing do not count
        current = self._parts.identity if self._parts.drop_damaged() else None
        earlier = self._earlier.identity if self._earlier.drop_damaged() else None
        made = f"the unfinished {self.output}"
        for before in (current, earlier):
            if before is not None and (why := self.origin.other_scores(before, made)):
                raise ValueError(
                    f"{why[0].upper()}{why[1:]} Continue with the model and settings of the earlier run, give another "
                    "--output, or start over with --overwrite."
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

    def _take_apart(self) -> None:
        """Make the complete output an unfinished one again."""
        self._parts.begin(_origin_of(self.output))
        with pq.ParquetFile(self.output) as file:
            for batch in file.iter_batches(batch_size=ROW_GROUP):
                self._parts.add(pa.Table.from_batches([batch]).replace_schema_metadata(None))
        self.output.unlink()

    # ---- Scores from before the data changed ----

    def _index(self) -> None:
        """Find out where each earlier row is, by its content hash."""
        self._pieces = self._earlier.paths()
        hashes = [_hashes_of(path) for path in self._pieces]
        self._starts: IntArray = np.cumsum([0, *map(len, hashes)])
        every = np.concatenate([np.zeros(0, np.uint64), *hashes])
        by_hash = np.argsort(every, kind="stable")
        self._places: IntArray = by_hash[first_of_each(every[by_hash])]
        self._hashes = every[self._places]
        self.earlier = len(every)

    def require_some(self, hashes: Iterable[int]) -> None:
        """Refuse data that has none of the earlier candidates, because it is other data and not a changed version.

        Args:
            hashes: the content hashes of the data's candidates.

        Raises:
            ValueError: no earlier row has one of these hashes.
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
            except ValueError as error:  # the other processes wait for the result
                failure = str(error)
        if failure := self._ranks.gather(failure)[0]:
            raise ValueError(failure)

    def known(self, hashes: HashArray, traced: BoolArray, columns: Sequence[str]) -> tuple[BoolArray, pa.Table | None]:
        """The rows of a chunk that an earlier run has scored.

        Args:
            hashes: `[rows]` the candidates' content hashes.
            traced: `[rows]` whether the scores of every token are needed.
            columns: the columns of scores.

        Returns:
            `[rows]` whether a row is known; and on the first process the known rows, in order, or None if there are
            none.
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
                usable = ~traced[there]
                if traced[there].any():
                    usable |= rows["tokens"].is_valid().to_numpy()
                there[there] = usable
                rows = _with_traces_of(rows.filter(pa.array(usable)), traced[there])
        there = self._ranks.gather(there)[0]
        self.taken += int(there.sum())
        return there, rows

    def _find(self, hashes: HashArray) -> IntArray:
        """`[n]` for each content hash the number of an earlier row that has it; -1 if there is none."""
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
        """Add a scored chunk. It is on disk when this returns."""
        if self._ranks.rank == 0:
            self._parts.add(table)
        self.rows += table.num_rows

    @property
    def data(self) -> Sequence[tuple[str, str | None]]:
        """The names and contents of the data when the run began."""
        return self.origin.data

    @property
    def kept(self) -> str:
        """A sentence on what is kept if the run ends now."""
        return f"The scores of {self.rows:,} candidates are kept."

    def duplicates(self) -> int:
        """How many candidates of the output repeat an earlier one's content. Compares a share of the hashes at a time,
        to save memory."""
        count = 0
        with pq.ParquetFile(self.output) as file:
            shares = 1 + file.metadata.num_rows // (1 << 18)
            for share in range(shares):
                batches = (batch["content_hash"].to_numpy() for batch in file.iter_batches(columns=["content_hash"]))
                hashes = np.concatenate(
                    [np.zeros(0, np.uint64), *(values[values % shares == share] for values in batches)]
                )
                count += len(hashes) - num_distinct(hashes)
        return count

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self._ranks.rank == 0

    def tables(self) -> Iterator[pa.Table]:
        """The chunks, one at a time."""
        return self._parts.tables()

    def join(self, facts: Mapping[str, Any]) -> None:
        """Join the chunks into the output file (a store if it ends in `.arrow`), and delete them."""
        paths = self._parts.paths()
        contents = (_hashes_of(path).tobytes() for path in paths)
        entries = encode_facts({**facts, "dataset": hash_of(*contents), "origin": self.origin.to_json()})
        schema = pq.read_schema(paths[0]).with_metadata(entries)
        if self.output.suffix == ".arrow":
            unfinished = _unfinished(self.output)
            join_store(unfinished, schema, map(read_part, paths))
            unfinished.rename(self.output)
            self._remove_parts()
            return
        write_scores(self.output, schema, map(read_part, paths))
        self._remove_parts()

    def _remove_parts(self) -> None:
        self._parts.remove()
        self._earlier.remove()


def write_scores(output: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write tables, one at a time, into a Parquet file that is there completely or not at all.

    Args:
        output: the file.
        schema: its schema, with the facts as metadata.
        tables: its rows, in order.
    """
    unfinished = _unfinished(output)
    with pq.ParquetWriter(unfinished, schema, compression="zstd") as writer:
        waiting: list[pa.Table] = []
        rows = 0
        for table in tables:
            waiting.append(table.replace_schema_metadata(schema.metadata))
            rows += len(table)
            if rows >= ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting, rows = [], 0
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
    unfinished.rename(output)


def _unfinished(output: Path) -> Path:
    return output.with_name(output.name + ".unfinished")


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
        if output.suffix == ".arrow":
            with pa.memory_map(str(output)) as file:
                metadata = pa.ipc.open_file(file).schema.metadata
        else:
            metadata = pq.read_schema(output).metadata
        found = decode_facts(metadata).get("origin")
    except (pa.ArrowException, OSError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"{output} exists, but was not written by this command. Give another --output, or --overwrite."
        )
    return found


def _hashes_of(path: Path) -> HashArray:
    hashes: HashArray = read_part(path, ["content_hash"])["content_hash"].to_numpy()
    return hashes


def _with_traces_of(rows: pa.Table, traced: BoolArray) -> pa.Table:
    """The rows, with the scores of every token only where `traced` is True."""
    wanted = pa.array(traced)
    for name in set(TRACE_COLUMNS) & set(rows.column_names):
        column = rows[name]
        kept = pc.if_else(wanted, column.combine_chunks(), pa.scalar(None, column.type))
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), kept)
    return rows
