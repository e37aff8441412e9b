"""Banded MinHash (Broder, 1997) of a response, to find near duplicates as in arXiv:2107.06499."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.hashing import splitmix64
from distill_sampler.protocols import Metric
from distill_sampler.types import Sample, TokenStats, View


@documents_fields
@dataclass(frozen=True, kw_only=True)
class MinHash(Metric):
    """Hashes of bands of MinHash values, by which `DropDegenerate` finds near duplicates. Needs no forward pass.

    A response is treated as the set of its n-grams of `ngram` tokens. Two responses whose sets have the Jaccard
    similarity s share a band with probability 1 - (1 - s^rows)^bands: with the defaults, 0.03 for s = 0.5, 0.77 for 0.8
    and 0.99 for 0.9. The numbers lie in [0, 1), and only their equality has a meaning. Needs the package datasketch
    (`pip install 'distill_sampler[dedup]'`).

    Columns: `minhash` (the first band), `minhash_2` and so on.

    What to keep in mind: paraphrases share few n-grams, so they are not found. The same boilerplate around different
    reasoning makes responses look alike.
    """

    bands: int = 8
    """Number of hashes of a response. With more bands, more duplicates are found. Each band takes 4 bytes per sample in
    a checkpoint."""
    rows: int = 8
    """MinHash values in a band. With more rows, fewer pairs that are not alike are found."""
    ngram: int = 5
    """Tokens in an n-gram."""
    name: str = "minhash"
    """Its name in policies, and the beginning of the columns' names."""

    def __post_init__(self) -> None:
        for argument in ("bands", "rows", "ngram"):
            if getattr(self, argument) < 1:
                raise ValueError(f"MinHash({argument}={getattr(self, argument)}): give 1 or more.")

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.name, *(f"{self.name}_{band + 2}" for band in range(self.bands - 1)))

    def views(self, sample: Sample) -> Sequence[View]:
        return ()

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        try:
            from datasketch import MinHash as Sketch  # an optional dependency
        except ImportError:
            raise ValueError("MinHash needs the package datasketch: pip install 'distill_sampler[dedup]'.") from None
        tokens = sample.input_ids[sample.scored].astype(np.uint64)
        hashes = np.zeros(max(1, len(tokens) - self.ngram + 1), np.uint64)
        for place in range(min(self.ngram, len(tokens))):
            hashes = splitmix64(hashes + tokens[place : place + len(hashes)])
        sketch = Sketch(num_perm=self.bands * self.rows, hashfunc=int, scheme="affine64")
        sketch.update_batch(np.unique(hashes).tolist())
        values = np.asarray(sketch.hashvalues, np.uint64).reshape(self.bands, self.rows)
        of_band = np.zeros(self.bands, np.uint64)
        for row in range(self.rows):
            of_band = splitmix64(of_band ^ values[:, row])
        numbers = (of_band >> np.uint64(40)) / 2.0**24  # 24 bits, which float32 holds exactly
        return dict(zip(self.columns, numbers.tolist(), strict=True))
