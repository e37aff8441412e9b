"""The score store: for every sample its latest numbers, and the optimizer step at which they were measured.

A sample is *measured* when the student reads it: in a scoring pass, or in training, where its scores are *observed*.
The student keeps learning between passes, so a score that a pass did not measure becomes an *estimate*: it moves by the
*drift*, the median change of the scores that were measured. This keeps the order among the estimates.

`state_dict` returns the store as JSON values and arrays, for checkpoints. The run's record (`artifacts/record.py`)
keeps what each pass measured. The store knows what its scores belong to (metrics, data set, numerics) and refuses
scores of another origin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distill_sampler.distributed import Ranks
from distill_sampler.serialize import differences
from distill_sampler.showing import html_table
from distill_sampler.types import BoolArray, FloatArray, IntArray, Missing


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurements:
    """The numbers of some samples, as the student gave them."""

    indices: IntArray
    """`[n]` the samples."""
    step: IntArray
    """`[n]` optimizer steps the student had taken."""
    columns: Mapping[str, FloatArray]
    """By column, `[n]` float32; NaN where there is no number."""
    missing: Mapping[str, IntArray] = field(default_factory=dict)
    """By metric, `[n]` why a sample has no score (`Missing`); 0 where it has one."""
    observed: bool = False
    """Whether the numbers were measured in training, instead of in a scoring pass."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoringPass:
    """What one scoring pass measured: an entry of the run's record."""

    num_samples: int
    epoch: int
    """The epoch that the pass was for, from 0."""
    step: int
    """Optimizer steps the student had taken."""
    measured: list[Measurements] = field(default_factory=list)
    """Observed numbers come first. If a sample was measured several times, the last time counts."""
    drift: dict[str, float] = field(default_factory=dict)
    """By column: numbers that were not measured moved from `old` to `old + drift`."""

    @property
    def columns(self) -> dict[str, FloatArray]:
        """By column, `[samples]` float32: the measured numbers; NaN elsewhere."""
        names = self.measured[-1].columns if self.measured else ()
        columns = {name: np.full(self.num_samples, np.nan, np.float32) for name in names}
        for measurements in self.measured:
            for name, values in measurements.columns.items():
                columns[name][measurements.indices] = values
        return columns

    @property
    def missing(self) -> dict[str, IntArray]:
        """By metric, `[samples]` why a sample that was measured has no score; 0 elsewhere."""
        names = self.measured[-1].missing if self.measured else ()
        missing = {name: np.zeros(self.num_samples, np.int64) for name in names}
        for measurements in self.measured:
            for name, codes in measurements.missing.items():
                missing[name][measurements.indices] = codes
        return missing

    @property
    def was_measured(self) -> BoolArray:
        """`[samples]` True for the samples that were measured."""
        mask = np.zeros(self.num_samples, bool)
        for measurements in self.measured:
            mask[measurements.indices] = True
        return mask

    def scores_after(self, before: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """The latest numbers after this pass, `[samples]` each, from the latest numbers before it."""
        columns, was_measured = self.columns, self.was_measured
        after = {}
        for name, old in before.items():
            estimate = drifted(old, self.drift[name]) if name in self.drift else old
            after[name] = np.where(was_measured, columns.get(name, estimate), estimate)
        return after


class ScoreStore:
    """The latest scores of `num_samples` samples. A pass is one `begin`, any number of `write`, one `end`.

    Args:
        num_samples: rows of the data set.
        columns: names of the numbers that the metrics give.
        origin: what the scores belong to, as plain values: metrics, data set, policies, seed.
        metrics: names of the metrics. For each, the store keeps why a sample has no score.
        watched: the column whose changes are kept in `change`; by default the first.
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
        """By column, `[samples]`: the last measurement, or the estimate that replaced it."""
        self.missing: dict[str, IntArray] = {name: np.full(num_samples, Missing.UNREAD, np.int64) for name in metrics}
        """By metric, `[samples]` why a sample has no score; 0 where it has one."""
        self.step: IntArray = np.full(num_samples, -1, np.int64)
        """`[samples]` optimizer step of the last measurement; -1: never."""
        self.times_scored: IntArray = np.zeros(num_samples, np.int64)
        """`[samples]` how often each sample was measured."""
        self.change: FloatArray = np.full(num_samples, np.nan, np.float16)
        """`[samples]` distance of the watched column's last measurement from its estimate; NaN with fewer than two."""
        self._watched = watched or next(iter(columns), None)
        self.estimated: BoolArray = np.zeros(num_samples, bool)
        """`[samples]` True where `latest` is an estimate."""
        self.observed = Observations(num_samples, columns, metrics)
        """Scores observed in training since the last pass."""
        self.numerics: dict[str, str] = {}
        """What the latest scores depend on besides weights and data: dtype, tie rule and so on."""
        self.passes: list[tuple[int, int]] = []
        """`(epoch, step)` of every pass of the run, including those before a resume."""
        self._open: ScoringPass | None = None
        self._latest_before: dict[str, FloatArray] = {}

    def __repr__(self) -> str:
        scored = int((self.step >= 0).sum())
        return f"ScoreStore({len(self.step):,} samples, {scored:,} scored, columns {', '.join(self.latest)})"

    def _repr_html_(self) -> str:
        """Mean and range of each number, for a notebook."""
        rows = []
        for name, values in self.latest.items():
            finite = values[np.isfinite(values)].astype(np.float64)
            figures = [float(f(finite)) if len(finite) else None for f in (np.mean, np.min, np.median, np.max)]
            rows.append((name, len(finite), *figures))
        measured = self.step[self.step >= 0]
        note = f"measured at optimizer steps {measured.min():,} to {measured.max():,}" if len(measured) else ""
        return html_table(repr(self), ("", "scored", "mean", "lowest", "median", "highest"), rows, note=note)

    def begin(self, *, epoch: int, step: int) -> None:
        """Begin a pass with the scores observed since the last one. What `write` adds was measured at `step`."""
        self._latest_before = {name: values.copy() for name, values in self.latest.items()}
        self._open = ScoringPass(num_samples=len(self.step), epoch=epoch, step=step)
        self.passes.append((epoch, step))
        observed = self.observed.measurements()
        if len(observed.indices):
            self._add(observed)
            self.observed = Observations(len(self.step), list(self.latest), list(self.missing))

    def write(
        self, indices: IntArray, columns: Mapping[str, FloatArray], missing: Mapping[str, IntArray] | None = None
    ) -> None:
        """Add the numbers of some samples as soon as they are known. Arrays are `[len(indices)]`."""
        assert self._open is not None
        step = np.full(len(indices), self._open.step)
        self._add(Measurements(indices=indices, step=step, columns=columns, missing=missing or {}))

    def end(self) -> ScoringPass:
        """End the pass: scores that it did not measure move with the drift of those that it did. Returns the pass."""
        scoring_pass = self._open
        assert scoring_pass is not None
        was_measured = scoring_pass.was_measured
        # Samples are trained on because their scores were good, partly by chance, so the change of observed scores is
        # biased. The drift comes from the samples that were read for scoring, if there are any.
        sets_drift = np.zeros_like(was_measured)
        for measurements in scoring_pass.measured:
            sets_drift[measurements.indices] |= not measurements.observed
        if not sets_drift.any():
            sets_drift = was_measured
        for name, values in self.latest.items():
            old = self._latest_before[name]
            if name == self._watched:
                distance = np.abs(values - old)
                self.change = np.where(was_measured & np.isfinite(distance), distance, self.change).astype(np.float16)
            change = (values - old)[sets_drift]
            if np.isfinite(change).any() and not was_measured.all():
                drift = float(np.nanmedian(np.where(np.isfinite(change), change, np.nan)))
                scoring_pass.drift[name] = drift
                self.latest[name] = np.where(was_measured, values, drifted(values, drift))
        self.times_scored += was_measured
        self.estimated = ~was_measured & (self.estimated | ((self.step >= 0) & bool(scoring_pass.drift)))
        self._open, self._latest_before = None, {}
        return scoring_pass

    def _add(self, measurements: Measurements) -> None:
        assert self._open is not None
        self._open.measured.append(measurements)
        self.step[measurements.indices] = measurements.step
        for name, values in measurements.columns.items():
            self.latest[name][measurements.indices] = values
        for name, codes in measurements.missing.items():
            self.missing[name][measurements.indices] = codes

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs, as JSON values and arrays. The arrays are the store's own."""
        return {
            "origin": self.origin,
            "numerics": self.numerics,
            "passes": [[epoch, step] for epoch, step in self.passes],
            "estimated": self.estimated,
            "step": self.step,
            "times_scored": self.times_scored,
            "change": self.change,
            "latest": dict(self.latest),
            "missing": dict(self.missing),
            "observed": self.observed.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the scores have another origin; the message says what differs.
        """
        if differing := differences(state["origin"], self.origin):
            raise ValueError(
                f"These scores belong to another configuration ({differing}). Use the data set and settings that they "
                "were computed with, or start without these scores."
            )
        self.numerics = dict(state["numerics"])
        self.passes = [(epoch, step) for epoch, step in state["passes"]]
        self.estimated, self.change = (state[name].copy() for name in ("estimated", "change"))
        self.step, self.times_scored = (state[name].astype(np.int64) for name in ("step", "times_scored"))
        self.latest = {name: state["latest"][name].copy() for name in self.latest}
        self.missing = {name: state["missing"][name].astype(np.int64) for name in self.missing}
        self.observed.load_state_dict(state["observed"])


class Observations:
    """The latest scores of each sample that were observed in training.

    Args:
        num_samples: rows of the data set.
        columns: names of the numbers.
        metrics: names of the metrics.
    """

    def __init__(self, num_samples: int, columns: Sequence[str], metrics: Sequence[str] = ()) -> None:
        self.step: IntArray = np.full(num_samples, -1, np.int64)
        """`[samples]` optimizer steps the student had taken; -1: not observed."""
        self.columns: dict[str, FloatArray] = {name: np.full(num_samples, np.nan, np.float32) for name in columns}
        """By column, `[samples]` float32; NaN where not observed."""
        self.missing: dict[str, IntArray] = {name: np.zeros(num_samples, np.int64) for name in metrics}
        """By metric, `[samples]` why an observed sample has no score."""

    def write(
        self,
        indices: IntArray,
        columns: Mapping[str, FloatArray],
        missing: Mapping[str, IntArray] | None = None,
        *,
        step: int | IntArray,
    ) -> None:
        """Add the numbers of some samples. Arrays are `[len(indices)]`."""
        self.step[indices] = step
        for name, values in columns.items():
            self.columns[name][indices] = values
        for name, codes in (missing or {}).items():
            self.missing[name][indices] = codes

    def merge(self, ranks: Ranks) -> None:
        """Share the observations among all processes: the latest of each sample, or the mean if several processes
        observed a sample in the same step."""
        if ranks.world_size == 1 or not ranks.max_over_ranks(int((self.step >= 0).any())):
            return  # nothing was observed anywhere
        latest = ranks.elementwise_max(self.step)
        observed = latest >= 0
        latest_here = observed & (self.step == latest)
        sums = np.zeros((len(latest), len(self.columns) + 1))  # one column per number, then the count of processes
        sums[latest_here, -1] = 1
        for column, values in enumerate(self.columns.values()):
            sums[latest_here, column] = values[latest_here]
        sums = ranks.elementwise_sum(sums)
        self.step = latest
        for column, name in enumerate(self.columns):
            self.columns[name] = np.full(len(latest), np.nan, np.float32)
            self.columns[name][observed] = sums[observed, column] / sums[observed, -1]
        for name, codes in self.missing.items():
            self.missing[name] = ranks.elementwise_max(np.where(latest_here, codes, 0))

    def measurements(self) -> Measurements:
        """All observations, as measurements."""
        indices = np.flatnonzero(self.step >= 0)
        return Measurements(
            indices=indices,
            step=self.step[indices],
            columns={name: values[indices] for name, values in self.columns.items()},
            missing={name: codes[indices] for name, codes in self.missing.items()},
            observed=True,
        )

    def state_dict(self) -> dict[str, Any]:
        """All observations, of the samples that have some."""
        observed = self.measurements()
        return {
            "indices": observed.indices,
            "step": observed.step,
            "columns": dict(observed.columns),
            "missing": dict(observed.missing),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.step[:] = -1
        for values in self.columns.values():
            values[:] = np.nan
        for codes in self.missing.values():
            codes[:] = 0
        self.write(state["indices"], state["columns"], state["missing"], step=state["step"])


def drifted(values: FloatArray, drift: float) -> FloatArray:
    """Scores moved by a drift."""
    return (values.astype(np.float64) + drift).astype(np.float32)


def replay(passes: Iterable[ScoringPass], before: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """The latest numbers after these passes, `[samples]` each, from the latest numbers before them."""
    latest = dict(before)
    for scoring_pass in passes:
        latest = scoring_pass.scores_after(latest)
    return latest


def replay_missing(passes: Iterable[ScoringPass], metrics: Iterable[str], num_samples: int) -> dict[str, IntArray]:
    """By metric, `[num_samples]` why a sample has no score after these passes; 0 where it has one."""
    latest = {name: np.full(num_samples, Missing.UNREAD, np.int64) for name in metrics}
    for scoring_pass in passes:
        measured, codes = scoring_pass.was_measured, scoring_pass.missing
        latest = {name: np.where(measured, codes.get(name, before), before) for name, before in latest.items()}
    return latest
