"""A cache of the statistics that frozen readers gave, so that they never read the same view twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from distill_sampler.protocols import Reader
from distill_sampler.types import TokenStats, View

Key = tuple[str, bytes]
"""A reader's identity, and a hash of a view."""


class Readings:
    """Token statistics of frozen readers, in memory: about 20 bytes for each scored token.

    Every process keeps all of them, because a sample may be read by another process in the next pass.
    """

    def __init__(self) -> None:
        self._kept: dict[Key, TokenStats] = {}
        self._unsaved: list[Key] = []

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

    def keep(self, found: Iterable[tuple[Key, TokenStats]], *, saved: bool = False) -> None:
        """Add the statistics of some views.

        Args:
            found: the views' keys with their statistics.
            saved: whether they come from a file, so that they need not be written to one.
        """
        for key, stats in found:
            self._kept[key] = stats
            if not saved:
                self._unsaved.append(key)

    def take_unsaved(self) -> list[tuple[Key, TokenStats]]:
        """What was added since the last call and did not come from a file, each view once."""
        keys, self._unsaved = dict.fromkeys(self._unsaved), []
        return [(key, self._kept[key]) for key in keys]
