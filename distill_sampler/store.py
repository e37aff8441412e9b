"""The score store: for every sample its latest numbers, the step they were taken at, and the history of all passes.

A sample is *measured* when the student reads it: in a scoring pass, or in training, where its scores are *observed*.
Between measurements the student goes on learning, so what was not measured in a pass is carried on as an *estimate*:
it moves by the median change of those that were. That keeps the order among the estimates. `estimated` says which is
which.

Written to a checkpoint as plain JSON values (`state_dict`, arrays through `pack`), to disk as a table (`to_table`).
What the scores belong to (metric configuration, data set, numerics) travels with them; scores of another origin are
refused, never mixed.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distill_sampler.distributed import Ranks
from distill_sampler.types import BoolArray, FloatArray, IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """The numbers of some samples as the student gave them."""

    indices: IntArray
    """`[n]` which samples."""
    step: IntArray
    """`[n]` optimizer steps the student had taken."""
    columns: Mapping[str, FloatArray]
    """`[n]` each, float32; NaN where the student's logits were not finite."""
    observed: bool = False
    """Whether they come from the forward of training, not from one of scoring."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScorePass:
    """What was known when a plan was made: an entry of the history."""

    num_samples: int
    epoch: int
    """The epoch it was taken for, from 0."""
    step: int
    """Optimizer steps the student had taken."""
    measured: list[Measured] = field(default_factory=list)
    """Observed first. What comes later holds."""
    drift: dict[str, float] = field(default_factory=dict)
    """By column: what was not measured went from `old` to `old + drift`."""

    @property
    def columns(self) -> dict[str, FloatArray]:
        """`[samples]` each, float32: what was measured; NaN elsewhere."""
        names = self.measured[-1].columns if self.measured else ()
        columns = {name: np.full(self.num_samples, np.nan, np.float32) for name in names}
        for some in self.measured:
            for name, values in some.columns.items():
                columns[name][some.indices] = values
        return columns

    @property
    def which(self) -> BoolArray:
        """`[samples]` True where a sample was measured."""
        which = np.zeros(self.num_samples, bool)
        for some in self.measured:
            which[some.indices] = True
        return which


class ScoreStore:
    """Latest scores and history of `num_samples` samples. A pass is `begin`, any number of `write`, `settle`.

    Args:
        num_samples: rows of the data set.
        columns: names of the numbers that the metrics give.
        origin: what the scores belong to, as plain values: metric configuration, data set fingerprint, numerics.
        watched: the column whose changes are kept; left out, the first.
    """

    def __init__(
        self, num_samples: int, columns: Sequence[str], origin: Mapping[str, Any], *, watched: str | None = None
    ) -> None:
        self.origin = dict(origin)
        self.latest: dict[str, FloatArray] = {name: np.full(num_samples, np.nan, np.float32) for name in columns}
        """`[samples]` each: the last measurement, or the estimate that it has become since."""
        self.step: IntArray = np.full(num_samples, -1, np.int64)
        """`[samples]` optimizer step of the last measurement; -1: never."""
        self.times_scored: IntArray = np.zeros(num_samples, np.int64)
        """`[samples]` how often it was measured."""
        self.change: FloatArray = np.full(num_samples, np.nan, np.float16)
        """`[samples]` how far the watched column's last measurement was from its estimate; NaN: fewer than two."""
        self._watched = watched or next(iter(columns), None)
        self.estimated: BoolArray = np.zeros(num_samples, bool)
        """`[samples]` True where `latest` is a measurement carried on by the drift of others, not one of its own."""
        self.observed = Observations(num_samples, columns)
        """What training has shown since the last pass."""
        self.history: list[ScorePass] = []
        """The passes of this process; of those before a resume the latest numbers are in `latest`."""
        self.numerics: dict[str, str] = {}
        """What decided the latest scores besides weights and data (`Scorer.numerics`): dtype, tie rule and so on."""
        self.passes: list[tuple[int, int]] = []
        """`(epoch, step)` of every pass of the run, those before a resume included: where the history stands."""

    def begin(self, *, epoch: int, step: int) -> None:
        """Open a pass with what was observed since the last; what `write` brings from now on was taken at `step`."""
        self._before = {name: values.copy() for name, values in self.latest.items()}
        self.history.append(ScorePass(num_samples=len(self.step), epoch=epoch, step=step))
        self.passes.append((epoch, step))
        seen = self.observed.measured()
        if len(seen.indices):
            self._take_in(seen)
            self.observed = Observations(len(self.step), list(self.latest))

    def write(self, indices: IntArray, columns: Mapping[str, FloatArray]) -> None:
        """Take in the numbers of some samples, as soon as they are known. `[len(indices)]` each."""
        step = np.full(len(indices), self.history[-1].step)
        self._take_in(Measured(indices=indices, step=step, columns=columns))

    def settle(self) -> None:
        """Close the pass: what was not measured in it moves with the drift of what was."""
        taken = self.history[-1]
        which = taken.which
        # what training has shown was chosen by score, and what looks best is so by chance in part: it tells of the
        # others only if nobody was asked
        asked = np.zeros_like(which)
        for some in taken.measured:
            asked[some.indices] |= not some.observed
        if not asked.any():
            asked = which
        for name, values in self.latest.items():
            old = self._before[name]
            if name == self._watched:
                moved = np.abs(values - old)
                self.change = np.where(which & np.isfinite(moved), moved, self.change).astype(np.float16)
            change = (values - old)[asked]
            if np.isfinite(change).any() and not which.all():
                taken.drift[name] = float(np.nanmedian(np.where(np.isfinite(change), change, np.nan)))
                self.latest[name] = np.where(which, values, _drifted(values, taken.drift[name]))
        self.times_scored += which
        self.estimated = ~which & (self.estimated | ((self.step >= 0) & bool(taken.drift)))
        del self._before

    def _take_in(self, measured: Measured) -> None:
        self.history[-1].measured.append(measured)
        self.step[measured.indices] = measured.step
        for name, values in measured.columns.items():
            self.latest[name][measured.indices] = values

    def before(self, epoch: int) -> dict[str, FloatArray]:
        """The numbers that the plans of the epoch before this one went by, `[samples]` each; NaN without any."""
        columns = {name: np.full_like(values, np.nan) for name, values in self.latest.items()}
        for taken in self.history:
            if taken.epoch < epoch:
                measured, which = taken.columns, taken.which
                for name, old in columns.items():
                    carried = _drifted(old, taken.drift[name]) if name in taken.drift else old
                    columns[name] = np.where(which, measured.get(name, carried), carried)
        return columns

    def state_dict(self) -> dict[str, Any]:
        """Everything but the history, as plain JSON values; see `load_state_dict`."""
        return {
            "origin": self.origin,
            "numerics": self.numerics,
            "passes": [list(taken) for taken in self.passes],
            "estimated": pack(self.estimated),
            "step": pack(self.step),
            "times_scored": pack(self.times_scored),
            "change": pack(self.change),
            "latest": {name: pack(values) for name, values in self.latest.items()},
            "observed": self.observed.state_dict(),
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
        self.estimated = unpack(state["estimated"])
        self.step, self.times_scored = (unpack(state[name]).astype(np.int64) for name in ("step", "times_scored"))
        self.change = unpack(state["change"])
        self.latest = {name: unpack(state["latest"][name]) for name in self.latest}
        self.observed.load_state_dict(state["observed"])

    def to_table(self, **columns: pa.Array | Sequence[Any]) -> pa.Table:
        """One row for each measurement, by pass and sample: the given columns (`[samples]` each), `sample, epoch, step,
        observed` and the scores. The table's metadata holds the origin.
        """
        given = pa.table({"sample": pa.array(np.arange(len(self.step))), **columns})
        parts = []
        for taken in self.history:
            where = np.flatnonzero(taken.which)
            step, observed = np.empty(len(self.step), np.int64), np.empty(len(self.step), bool)
            for some in taken.measured:
                step[some.indices], observed[some.indices] = some.step, some.observed
            rows = given.take(pa.array(where))
            for name, values in (
                ("epoch", np.full(len(where), taken.epoch)),
                ("step", step[where]),
                ("observed", observed[where]),
                *((name, values[where]) for name, values in taken.columns.items()),
            ):
                rows = rows.append_column(name, pa.array(values))
            parts.append(rows)
        described = {**self.origin, **self.numerics}
        metadata = {f"distill_sampler.{name}": str(value) for name, value in described.items()}
        return pa.concat_tables(parts).replace_schema_metadata(metadata) if parts else given


class Observations:
    """What the forwards of training have shown of samples, the latest of each.

    Args:
        num_samples: rows of the data set.
        columns: names of the numbers.
    """

    def __init__(self, num_samples: int, columns: Sequence[str]) -> None:
        self.step: IntArray = np.full(num_samples, -1, np.int64)
        """`[samples]` optimizer steps the student had taken; -1: not observed."""
        self.columns: dict[str, FloatArray] = {name: np.full(num_samples, np.nan, np.float32) for name in columns}
        """`[samples]` each, float32; NaN where not observed."""

    def write(self, indices: IntArray, columns: Mapping[str, FloatArray], *, step: int) -> None:
        """Take in the numbers of some samples, `[len(indices)]` each."""
        self.step[indices] = step
        for name, values in columns.items():
            self.columns[name][indices] = values

    def merge(self, ranks: Ranks) -> None:
        """Give every process what the others have seen: of each sample the latest; if several saw it in one step, the
        mean of it."""
        if ranks.world_size == 1:
            return
        latest = ranks.largest(self.step)
        seen = latest >= 0
        ours = seen & (self.step == latest)
        rows = np.zeros((len(latest), len(self.columns) + 1))
        rows[ours, -1] = 1
        for place, values in enumerate(self.columns.values()):
            rows[ours, place] = values[ours]
        rows = ranks.total(rows)
        self.step = latest
        for place, name in enumerate(self.columns):
            self.columns[name] = np.full(len(latest), np.nan, np.float32)
            self.columns[name][seen] = rows[seen, place] / rows[seen, -1]

    def measured(self) -> Measured:
        """All of them, as measurements."""
        indices = np.flatnonzero(self.step >= 0)
        columns = {name: values[indices] for name, values in self.columns.items()}
        return Measured(indices=indices, step=self.step[indices], columns=columns, observed=True)

    def state_dict(self) -> dict[str, Any]:
        return {"step": pack(self.step), **{name: pack(values) for name, values in self.columns.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = unpack(state["step"]).astype(np.int64)
        self.columns = {name: unpack(state[name]) for name in self.columns}


def _drifted(values: FloatArray, drift: float) -> FloatArray:
    return (values.astype(np.float64) + drift).astype(np.float32)


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
