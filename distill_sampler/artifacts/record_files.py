"""The passes and plans of a run's record as tables, and read back from its files (`record.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_sampler.artifacts.parts import read_part
from distill_sampler.artifacts.passes import missing_column
from distill_sampler.planning.planner import PlannedEpoch
from distill_sampler.store import Measurements, ScoringPass
from distill_sampler.types import EpochPlan, IntArray


def pass_table(scoring_pass: ScoringPass) -> pa.Table:
    """One row for each measurement, in the order in which they were made."""
    tables = []
    for measurements in scoring_pass.measured:
        missing = {missing_column(name): codes.astype(np.int8) for name, codes in measurements.missing.items()}
        tables.append(
            pa.table(
                {
                    "sample": measurements.indices,
                    "step": measurements.step,
                    "observed": np.full(len(measurements.indices), measurements.observed),
                    **measurements.columns,
                    **missing,
                }
            )
        )
    metadata = {
        "epoch": scoring_pass.epoch,
        "step": scoring_pass.step,
        "drift": scoring_pass.drift,
        "num_samples": scoring_pass.num_samples,
        "metrics": list(scoring_pass.measured[-1].missing) if scoring_pass.measured else [],
    }
    table = pa.concat_tables(tables) if tables else pa.table({"sample": np.zeros(0, np.int64)})
    return table.replace_schema_metadata({b"record": json.dumps(metadata).encode()})


def read_pass(path: Path) -> ScoringPass:
    """A pass that was written.

    Raises:
        ValueError: the file is damaged.
    """
    table = read_part(path)
    metadata = json.loads(table.schema.metadata[b"record"])
    metrics: list[str] = metadata["metrics"]
    missing = {name: missing_column(name) for name in metrics}
    names = [n for n in table.column_names if n not in ("sample", "step", "observed", *missing.values())]
    measured = []
    observed = table["observed"].to_numpy() if "observed" in table.column_names else np.zeros(0, bool)
    for was_observed in (True, False):  # observed numbers come first
        selected = np.flatnonzero(observed == was_observed)
        if len(selected):
            rows = table.take(pa.array(selected))
            measured.append(
                Measurements(
                    indices=rows["sample"].to_numpy(),
                    step=rows["step"].to_numpy(),
                    columns={name: rows[name].to_numpy() for name in names},
                    missing={name: rows[column].to_numpy().astype(np.int64) for name, column in missing.items()},
                    observed=was_observed,
                )
            )
    return ScoringPass(
        num_samples=metadata["num_samples"],
        epoch=metadata["epoch"],
        step=metadata["step"],
        measured=measured,
        drift=metadata["drift"],
    )


def plan_table(planned: PlannedEpoch) -> pa.Table:
    """The samples of a plan in their order."""
    metadata = {"epoch": planned.epoch, "step": planned.step, "start": planned.start, "passes": planned.passes}
    plan = pa.table({"sample": planned.plan.indices, "weight": planned.plan.weights, **packs_of(planned.plan)})
    return plan.replace_schema_metadata({b"record": json.dumps(metadata).encode()})


def reasons_table(planned: PlannedEpoch) -> pa.Table:
    """Which policy left out which sample."""
    return pa.table({"left_out_by": planned.left_out_by.astype(np.int16)})


def read_plan(path: Path) -> PlannedEpoch:
    """A plan that was written, with its reasons.

    Raises:
        ValueError: a file is damaged, or the reasons are missing.
    """
    reasons = path.name.rpartition("-")[0].replace("plan", "left")
    if (left_out := next(path.parent.glob(f"{reasons}-*.parquet"), None)) is None:  # it is written before the plan
        raise ValueError(f"{path.parent} is damaged: the reasons of {path.name} ({reasons}) were deleted.")
    table = read_part(path)
    plan = EpochPlan(indices=table["sample"].to_numpy(), weights=table["weight"].to_numpy(), packs=_bounds_of(table))
    return PlannedEpoch(
        plan=plan,
        left_out_by=read_part(left_out)["left_out_by"].to_numpy().astype(np.int64),
        **json.loads(table.schema.metadata[b"record"]),
    )


def plan_header(kept: Path | PlannedEpoch) -> tuple[int, int] | None:
    """A plan's epoch and start, which are read without the plan; None if they cannot be read."""
    if not isinstance(kept, Path):
        return kept.epoch, kept.start
    try:
        metadata = json.loads(pq.read_schema(kept).metadata[b"record"])
    except (OSError, ValueError):  # pyarrow raises both
        return None
    return metadata["epoch"], metadata["start"]


def packs_of(plan: EpochPlan) -> dict[str, IntArray]:
    """The column `pack` of a plan's table: the number of each sample's pack, from 0. None without packs."""
    if plan.packs is None:
        return {}
    return {"pack": np.repeat(np.arange(plan.num_rows), np.diff(plan.packs))}


def _bounds_of(table: pa.Table) -> IntArray | None:
    if "pack" not in table.column_names:
        return None
    pack = table["pack"].to_numpy()
    return np.searchsorted(pack, np.arange(pack[-1] + 2))
