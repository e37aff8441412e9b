"""The score store: for every sample its latest numbers, and the optimizer step they were measured at.

A sample is *measured* when the student reads it: in a scoring pass, or in training, where its scores are *observed*.
The student goes on learning in between, so a score that a pass did not measure becomes an *estimate*: it moves by the
median change of the scores that were measured, which keeps the order among the estimates.

`state_dict` gives all of it as plain JSON values, for a checkpoint. What each pass measured is kept by the run's record
(`artifacts/record.py`), not here. The store knows what its scores belong to (metrics, data set, numerics), and refuses
scores of another origin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distill_sampler.distributed import Ranks
from distill_sampler.serialize import differences, pack, unpack
from distill_sampler.types import BoolArray, FloatArray, IntArray, Missing


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurements:
    """The numbers of some samples as the student gave them."""

    indices: IntArray
    """`[n]` which samples."""
    step: IntArray
    """`[n]` optimizer steps the student had taken."""
    columns: Mapping[str, FloatArray]
    """`[n]` each, float32; NaN where there is none."""
    missing: Mapping[str, IntArray] = field(default_factory=dict)
    """By metric, `[n]` why there is no score (`Missing`); 0 where there is one."""
    observed: bool = False
    """Whether they come from a forward pass of training, not of scoring."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoringPass:
    """What was measured for a plan: an entry of the run's record."""

    num_samples: int
    epoch: int
    """The epoch it was taken for, from 0."""
    step: int
    """Optimizer steps the student had taken."""
    measured: list[Measurements] = field(default_factory=list)
    """What was observed comes first. Of several numbers of a sample the last one holds."""
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
    def missing(self) -> dict[str, IntArray]:
        """By metric, `[samples]` why a sample that was measured has no score; 0 elsewhere."""
        names = self.measured[-1].missing if self.measured else ()
        missing = {name: np.zeros(self.num_samples, np.int64) for name in names}
        for some in self.measured:
            for name, codes in some.missing.items():
                missing[name][some.indices] = codes
        return missing

    @property
    def was_measured(self) -> BoolArray:
        """`[samples]` True where a sample was measured."""
        which = np.zeros(self.num_samples, bool)
        for some in self.measured:
            which[some.indices] = True
        return which

    def scores_after(self, before: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """What is known after this pass, `[samples]` each, if `before` was known before it."""
        measured, which = self.columns, self.was_measured
        known = {}
        for name, old in before.items():
            carried = drifted(old, self.drift[name]) if name in self.drift else old
            known[name] = np.where(which, measured.get(name, carried), carried)
        return known


class ScoreStore:
    """The latest scores of `num_samples` samples. A pass is `begin`, any number of `write`, `end`.

    Args:
        num_samples: rows of the data set.
        columns: names of the numbers that the metrics give.
        origin: what the scores belong to, as plain values: metrics, data set, policies, seed.
        metrics: names of the metrics, for which the store keeps why a sample has no score.
        watched: the column whose changes are kept; left out, the first.
    """

    def __init__(
        self,
        num_samples: int,
        columns: Sequence[str],
        origin: Mapping[str, Any],
        *,
        metrics: Sequence[str] = (),
        watched: str | None = None,
    ) -> None:
        self.origin = dict(origin)
        self.latest: dict[str, FloatArray] = {name: np.full(num_samples, np.nan, np.float32) for name in columns}
        """`[samples]` each: the last measurement, or the estimate that it has become since."""
        self.missing: dict[str, IntArray] = {name: np.full(num_samples, Missing.UNREAD, np.int64) for name in metrics}
        """By metric, `[samples]` why a sample has no score; 0 where it has one."""
        self.step: IntArray = np.full(num_samples, -1, np.int64)
        """`[samples]` optimizer step of the last measurement; -1: never."""
        self.times_scored: IntArray = np.zeros(num_samples, np.int64)
        """`[samples]` how often it was measured."""
        self.change: FloatArray = np.full(num_samples, np.nan, np.float16)
        """`[samples]` how far the watched column's last measurement was from its estimate; NaN: fewer than two."""
        self._watched = watched or next(iter(columns), None)
        self.estimated: BoolArray = np.zeros(num_samples, bool)
        """`[samples]` True where `latest` is an estimate."""
        self.observed = Observations(num_samples, columns, metrics)
        """What training has shown since the last pass."""
        self.numerics: dict[str, str] = {}
        """What decided the latest scores besides weights and data: dtype, tie rule and so on."""
        self.passes: list[tuple[int, int]] = []
        """`(epoch, step)` of every pass of the run, those before a resume included."""
        self._open: ScoringPass | None = None
        self._before: dict[str, FloatArray] = {}

    def begin(self, *, epoch: int, step: int) -> None:
        """Open a pass with what was observed since the last; what `write` brings from now on was measured at `step`."""
        self._before = {name: values.copy() for name, values in self.latest.items()}
        self._open = ScoringPass(num_samples=len(self.step), epoch=epoch, step=step)
        self.passes.append((epoch, step))
        seen = self.observed.measured()
        if len(seen.indices):
            self._take_in(seen)
            self.observed = Observations(len(self.step), list(self.latest), list(self.missing))

    def write(
        self, indices: IntArray, columns: Mapping[str, FloatArray], missing: Mapping[str, IntArray] | None = None
    ) -> None:
        """Take in the numbers of some samples, as soon as they are known. `[len(indices)]` each."""
        assert self._open is not None
        step = np.full(len(indices), self._open.step)
        self._take_in(Measurements(indices=indices, step=step, columns=columns, missing=missing or {}))

    def end(self) -> ScoringPass:
        """Close the pass: scores that it did not measure move with the drift of those that it did. Gives the pass."""
        taken = self._open
        assert taken is not None
        which = taken.was_measured
        # Samples were trained on because their scores were good, in part by chance, so the change of observed scores is
        # biased. The drift comes from samples that were scored on purpose, where there are any.
        scored = np.zeros_like(which)
        for some in taken.measured:
            scored[some.indices] |= not some.observed
        if not scored.any():
            scored = which
        for name, values in self.latest.items():
            old = self._before[name]
            if name == self._watched:
                moved = np.abs(values - old)
                self.change = np.where(which & np.isfinite(moved), moved, self.change).astype(np.float16)
            change = (values - old)[scored]
            if np.isfinite(change).any() and not which.all():
                taken.drift[name] = float(np.nanmedian(np.where(np.isfinite(change), change, np.nan)))
                self.latest[name] = np.where(which, values, drifted(values, taken.drift[name]))
        self.times_scored += which
        self.estimated = ~which & (self.estimated | ((self.step >= 0) & bool(taken.drift)))
        self._open, self._before = None, {}
        return taken

    def _take_in(self, measured: Measurements) -> None:
        assert self._open is not None
        self._open.measured.append(measured)
        self.step[measured.indices] = measured.step
        for name, values in measured.columns.items():
            self.latest[name][measured.indices] = values
        for name, codes in measured.missing.items():
            self.missing[name][measured.indices] = codes

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs, as plain JSON values; see `load_state_dict`."""
        return {
            "origin": self.origin,
            "numerics": self.numerics,
            "passes": [list(taken) for taken in self.passes],
            "estimated": pack(self.estimated),
            "step": pack(self.step),
            "times_scored": pack(self.times_scored),
            "change": pack(self.change),
            "latest": {name: pack(values) for name, values in self.latest.items()},
            "missing": {name: pack(codes) for name, codes in self.missing.items()},
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
        self.missing = {name: unpack(state["missing"][name]).astype(np.int64) for name in self.missing}
        self.observed.load_state_dict(state["observed"])


class Observations:
    """What the forward passes of training have shown of samples, the latest of each.

    Args:
        num_samples: rows of the data set.
        columns: names of the numbers.
        metrics: names of the metrics.
    """

    def __init__(self, num_samples: int, columns: Sequence[str], metrics: Sequence[str] = ()) -> None:
        self.step: IntArray = np.full(num_samples, -1, np.int64)
        """`[samples]` optimizer steps the student had taken; -1: not observed."""
        self.columns: dict[str, FloatArray] = {name: np.full(num_samples, np.nan, np.float32) for name in columns}
        """`[samples]` each, float32; NaN where not observed."""
        self.missing: dict[str, IntArray] = {name: np.zeros(num_samples, np.int64) for name in metrics}
        """By metric, `[samples]` why an observed sample has no score."""

    def write(
        self,
        indices: IntArray,
        columns: Mapping[str, FloatArray],
        missing: Mapping[str, IntArray] | None = None,
        *,
        step: int,
    ) -> None:
        """Take in the numbers of some samples, `[len(indices)]` each."""
        self.step[indices] = step
        for name, values in columns.items():
            self.columns[name][indices] = values
        for name, codes in (missing or {}).items():
            self.missing[name][indices] = codes

    def merge(self, ranks: Ranks) -> None:
        """Give every process what the others have seen: the latest of each sample, or the mean of what several
        processes saw in the same step."""
        if ranks.world_size == 1:
            return
        latest = ranks.elementwise_max(self.step)
        seen = latest >= 0
        ours = seen & (self.step == latest)
        rows = np.zeros((len(latest), len(self.columns) + 1))
        rows[ours, -1] = 1
        for place, values in enumerate(self.columns.values()):
            rows[ours, place] = values[ours]
        rows = ranks.elementwise_sum(rows)
        self.step = latest
        for place, name in enumerate(self.columns):
            self.columns[name] = np.full(len(latest), np.nan, np.float32)
            self.columns[name][seen] = rows[seen, place] / rows[seen, -1]
        for name, codes in self.missing.items():
            self.missing[name] = ranks.elementwise_max(np.where(ours, codes, 0))

    def measured(self) -> Measurements:
        """All of them, as measurements."""
        indices = np.flatnonzero(self.step >= 0)
        return Measurements(
            indices=indices,
            step=self.step[indices],
            columns={name: values[indices] for name, values in self.columns.items()},
            missing={name: codes[indices] for name, codes in self.missing.items()},
            observed=True,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "step": pack(self.step),
            "columns": {name: pack(values) for name, values in self.columns.items()},
            "missing": {name: pack(codes) for name, codes in self.missing.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.step = unpack(state["step"]).astype(np.int64)
        self.columns = {name: unpack(state["columns"][name]) for name in self.columns}
        self.missing = {name: unpack(state["missing"][name]).astype(np.int64) for name in self.missing}


def drifted(values: FloatArray, drift: float) -> FloatArray:
    """Scores moved by the drift of others."""
    return (values.astype(np.float64) + drift).astype(np.float32)


def replay(passes: Iterable[ScoringPass], before: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """What was known after these passes, `[samples]` each, if `before` was known before them."""
    known = dict(before)
    for taken in passes:
        known = taken.scores_after(known)
    return known


def replay_missing(passes: Iterable[ScoringPass], metrics: Iterable[str], num_samples: int) -> dict[str, IntArray]:
    """By metric, `[num_samples]` why a sample had no score after these passes."""
    known = {name: np.full(num_samples, Missing.UNREAD, np.int64) for name in metrics}
    for taken in passes:
        which, codes = taken.was_measured, taken.missing
        known = {name: np.where(which, codes.get(name, before), before) for name, before in known.items()}
    return known
