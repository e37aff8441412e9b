"""The score store: for every sample its latest numbers, the step they were taken at, and the history of all passes.

Written to a checkpoint as plain JSON values (`state_dict`, arrays through `pack`), to disk as a table (`to_table`).
What the scores belong to (metric configuration, data set, numerics) travels with them; scores of another origin are
refused, never mixed.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distill_sampler.types import FloatArray, IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class ScorePass:
    """What one scoring pass found: an entry of the history."""

    epoch: int
    """The epoch it was taken for, from 0."""
    step: int
    """Optimizer steps the student had taken."""
    columns: Mapping[str, FloatArray]
    """`[samples]` each, float32; NaN where a sample was not scored or its logits were not finite."""


class ScoreStore:
    """Latest scores and history of `num_samples` samples. Grows by `begin` and `write`, is never rewritten.

    Args:
        num_samples: rows of the data set.
        columns: names of the numbers that the metrics give.
        origin: what the scores belong to, as plain values: metric configuration, data set fingerprint, numerics.
    """

    def __init__(self, num_samples: int, columns: Sequence[str], origin: Mapping[str, Any]) -> None:
        self.origin = dict(origin)
        self.latest: dict[str, FloatArray] = {name: np.full(num_samples, np.nan, np.float32) for name in columns}
        self.step: IntArray = np.full(num_samples, -1, np.int64)
        """`[samples]` optimizer step of the latest score; -1: never scored."""
        self.history: list[ScorePass] = []
        """The passes of this process; of those before a resume the latest numbers are in `latest`."""
        self.numerics: dict[str, str] = {}
        """What decided the latest scores besides weights and data (`Scorer.numerics`): dtype, tie rule and so on."""
        self.passes: list[tuple[int, int]] = []
        """`(epoch, step)` of every pass of the run, those before a resume included: where the history stands."""

    def begin(self, *, epoch: int, step: int) -> None:
        """Open a pass; what `write` brings from now on was taken at this step."""
        blank = {name: np.full_like(values, np.nan) for name, values in self.latest.items()}
        self.history.append(ScorePass(epoch=epoch, step=step, columns=blank))
        self.passes.append((epoch, step))

    def write(self, indices: IntArray, columns: Mapping[str, FloatArray]) -> None:
        """Take in the numbers of some samples, as soon as they are known. `[len(indices)]` each."""
        current = self.history[-1]
        self.step[indices] = current.step
        for name, values in columns.items():
            self.latest[name][indices] = values
            current.columns[name][indices] = values

    def before(self, epoch: int) -> dict[str, FloatArray]:
        """The latest numbers of the passes taken for epochs before this one, `[samples]` each; NaN without any."""
        columns = {name: np.full_like(values, np.nan) for name, values in self.latest.items()}
        for taken in self.history:
            if taken.epoch < epoch:
                for name, values in taken.columns.items():
                    columns[name] = np.where(np.isnan(values), columns[name], values)
        return columns

    def state_dict(self) -> dict[str, Any]:
        """Latest scores, their steps and the passes so far, as plain JSON values; see `load_state_dict`."""
        return {
            "origin": self.origin,
            "numerics": self.numerics,
            "passes": [list(taken) for taken in self.passes],
            "step": pack(self.step),
            "latest": {name: pack(values) for name, values in self.latest.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: the scores belong to something else; the message says what differs.
        """
        if differing := differences(state["origin"], self.origin):
            raise ValueError(
                f"These scores belong to another run: {differing}. Use the data set and settings they were made with, "
                "or start without them."
            )
        self.numerics = dict(state["numerics"])
        self.passes = [(epoch, step) for epoch, step in state["passes"]]
        self.step = unpack(state["step"]).astype(np.int64)
        self.latest = {name: unpack(state["latest"][name]) for name in self.latest}

    def to_table(self, **columns: pa.Array | Sequence[Any]) -> pa.Table:
        """One row for each sample and pass: the given identifying columns, then `sample, epoch, step` and the scores.

        The table's metadata holds the origin.
        """
        parts = []
        for taken in self.history:
            scores = {name: pa.array(values, pa.float32()) for name, values in taken.columns.items()}
            size = len(self.step)
            parts.append(
                pa.table(
                    {
                        "sample": pa.array(np.arange(size)),
                        **columns,
                        "epoch": pa.array(np.full(size, taken.epoch)),
                        "step": pa.array(np.full(size, taken.step)),
                        **scores,
                    }
                )
            )
        described = {**self.origin, **self.numerics}
        metadata = {f"distill_sampler.{name}": str(value) for name, value in described.items()}
        return pa.concat_tables(parts).replace_schema_metadata(metadata)


def differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two origins, in words: `their seed is 0, here it is 1`. Empty if nothing does."""
    return "; ".join(
        f"their {name} is {saved.get(name)!r}, here it is {here.get(name)!r}"
        for name in sorted(saved.keys() | here.keys())
        if saved.get(name) != here.get(name)
    )


def pack(array: npt.NDArray[Any]) -> dict[str, str]:
    """An array of numbers as JSON: compressed with zlib, which finds more in it if all first bytes come first.

    A plan or scores of a million samples take 3 to 5 MB and a tenth of a second each; a constant takes nothing.
    """
    if array.dtype.kind == "i":  # indices and steps are small numbers most of the time
        narrow = (np.iinfo(kind) for kind in (np.int8, np.int16, np.int32, np.int64))
        low, high = array.min(initial=0), array.max(initial=0)
        array = array.astype(next(kind.dtype for kind in narrow if kind.min <= low and high <= kind.max))
    array = array.astype(array.dtype.newbyteorder("<"))
    by_place = np.frombuffer(array.tobytes(), np.uint8).reshape(-1, array.itemsize).T.tobytes()
    return {"dtype": array.dtype.str, "data": base64.b64encode(zlib.compress(by_place, 1)).decode()}


def unpack(packed: Mapping[str, str]) -> npt.NDArray[Any]:
    """The array that `pack` was given; integers come back as narrow as they were packed."""
    dtype = np.dtype(packed["dtype"])
    by_place = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), np.uint8)
    return np.frombuffer(by_place.reshape(dtype.itemsize, -1).T.tobytes(), dtype).copy()
