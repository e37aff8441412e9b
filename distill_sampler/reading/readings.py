"""A cache of the statistics that frozen readers gave, so that they never read the same view twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from distill_sampler.protocols import Reader
from distill_sampler.types import TokenStats, View

Key = tuple[str, bytes]
"""A reader's identity, and a hash of a view."""


class Readings:
    """Token statistics of frozen readers, in memory: about 12 bytes for each scored token.

    Every process keeps all of them, because a sample may be read by another process in the next pass.
    """

    def __init__(self) -> None:
        self._kept: dict[Key, TokenStats] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @staticmethod
    def key(reader: Reader, view: View) -> Key:
        """The key of a view: equal for equal views of readers with the same identity."""
        content = hashlib.blake2b(digest_size=16)
        for part in view.identity:
            content.update(part)
        return reader.identity, content.digest()

    def get(self, key: Key, statistics: Iterable[str]) -> TokenStats | None:
        """The statistics of a view; None if they are not kept, or lack some of `statistics`."""
        kept = self._kept.get(key)
        if kept is None or any(getattr(kept, name) is None for name in statistics):
            return None
        return kept

    def keep(self, found: Iterable[tuple[Key, TokenStats]]) -> None:
        """Add the statistics of some views."""
        self._kept.update(found)
