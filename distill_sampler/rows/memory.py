"""Tables of scores that stay in memory, in the place of a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from distill_sampler.policies.keys import num_distinct
from distill_sampler.serialize import encode_facts, hash_of
from distill_sampler.types import BoolArray, HashArray


class TablesInMemory:
    """Takes the chunks of one run, as `ScoreOutput` does, and gives them as one table.

    Args:
        data: the name of the data, and what is known of its content.
    """

    kept = ""
    """Nothing is kept of a run that ends early."""
    is_first = True
    """Every process keeps its table."""
    earlier = taken = 0
    """There are no scores of earlier runs."""

    def __init__(self, data: Sequence[tuple[str, str | None]]) -> None:
        self.data = data
        self.rows = 0
        """How many candidates are scored."""
        self.schema: pa.Schema | None = None
        self._tables: list[pa.Table] = []
        self._entries: dict[bytes, bytes] = {}

    @property
    def table(self) -> pa.Table:
        """All chunks as one table, with the facts as its metadata."""
        return pa.concat_tables(self._tables).replace_schema_metadata(self._entries)

    def known(self, hashes: HashArray, traced: BoolArray, columns: Sequence[str]) -> tuple[BoolArray, None]:
        """No row is known from an earlier run."""
        return np.zeros(len(hashes), bool), None

    def require_some(self, hashes: Iterable[int]) -> None:
        """There is nothing to compare with."""

    def add(self, table: pa.Table) -> None:
        """Add a scored chunk."""
        self._tables.append(table)
        self.rows += table.num_rows

    def join(self, facts: Mapping[str, Any]) -> None:
        """Keep the facts."""
        contents = (table["content_hash"].to_numpy().tobytes() for table in self._tables)
        self._entries = encode_facts({**facts, "dataset": hash_of(*contents)})

    def duplicates(self) -> int:
        """How many candidates repeat an earlier one's content."""
        hashes = np.concatenate([table["content_hash"].to_numpy() for table in self._tables])
        return len(hashes) - num_distinct(hashes)
