"""`check_policy`: a policy is pure, declares what it reads, ignores the order of rows, and allows a dry run."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from distill_sampler.protocols import Metric, Policy, Pool
from distill_sampler.testing.verdict import Verdict
from distill_sampler.types import EncodedColumn, EpochPlan, FloatArray, IntArray, Sample, TokenStats


def check_policy(
    policy: Policy,
    *,
    metrics: Sequence[Metric] = (),
    columns: Mapping[str, Sequence[Any]] | None = None,
    fixed_length: bool | None = None,
    rounds: int = 40,
    seed: int = 0,
) -> None:
    """Check a policy's contract on random pools and plans.

    Args:
        policy: the policy.
        metrics: the metrics that it reads, if it needs more of them than their scores. By default stand-ins whose group
            score is the mean.
        columns: values for the columns that it reads. By default `"a"`, `"b"`, `"c"`.
        fixed_length: whether the length of its plan is independent of the scores. By default the opposite of the
            policy's `length_depends_on_scores`. Give False for a policy that chooses among groups of different sizes.
        rounds: how many random pools to try.
        seed: seed of everything random.

    Raises:
        AssertionError: the policy breaks the contract; the message says how, and the cure.
    """
    say = Verdict(policy, Policy)
    say.require_value(policy)
    _check_declarations(policy, say)
    twin: Policy = pickle.loads(pickle.dumps(policy))
    refusals = []
    for number in range(rounds):
        rng = np.random.default_rng([seed, number])
        pool = _pool(policy, metrics, columns or {}, rng, say)
        plan = _plan(len(pool.lengths), rng)
        before = _contents(pool, plan)
        result = _planned(policy, plan, pool, say)
        say.require(
            _contents(pool, plan) == before,
            "it modifies the pool or the plan that it is given",
            "Copy what you change: pool.scores[name].copy()",
        )
        if isinstance(result, str):
            refusals.append(result)
            continue
        for other in (policy, twin):
            say.require(
                _planned(other, plan, pool, say) == result,
                "equal arguments give another plan the second time",
                "Draw only from the generator that it is given, and keep no state: every process makes its own plan",
            )
        _check_result(result, plan, say)
        _check_permuted(policy, plan, pool, result, say, rng)
        fixed = not policy.length_depends_on_scores if fixed_length is None else fixed_length
        _check_dry_run(policy, plan, pool, say, fixed_length=fixed)
        _check_samples_to_score(policy, plan, pool, result, say)
        empty = _planned(policy, EpochPlan(indices=np.zeros(0, np.int64)), pool, say)
        say.require(
            not isinstance(empty, str) and len(empty) == 0,
            "an empty plan does not stay empty",
            "Return the plan unchanged if len(plan) is 0",
        )
    say.require(
        len(refusals) < rounds,
        f"it refuses all {rounds} random pools ({refusals[-1] if refusals else ''})",
        "If it needs certain values in a column, give them: check_policy(columns={name: values})",
    )


def _check_declarations(policy: Policy, say: Verdict) -> None:
    for member, names in (("uses_metrics", policy.uses_metrics), ("uses_columns", policy.uses_columns)):
        say.require(
            isinstance(names, tuple) and all(isinstance(name, str) for name in names),
            f"{member} is {names!r}",
            "Return a tuple of names",
        )
    say.require(
        policy.group_by is None or policy.group_by in policy.uses_columns,
        f"group_by is {policy.group_by!r}, which is not in uses_columns",
        "List the column in uses_columns too, so that the pool has it",
    )


def _check_result(result: EpochPlan, plan: EpochPlan, say: Verdict) -> None:
    say.require(
        set(result.indices.tolist()) <= set(plan.indices.tolist()),
        "its plan has samples that the plan before it does not have",
        "Build on plan.indices, for instance with plan.take(positions)",
    )
    mean = float(result.weights.mean(dtype=np.float64)) if len(result) else 1.0
    least = float(result.weights.min(initial=1.0))
    say.require(
        abs(mean - 1) < 1e-5 and least >= 0,
        f"its weights have the mean {mean:.6g} and the minimum {least:.6g}",
        "Make all weights at least 0, and divide them by their mean",
    )


def _check_permuted(
    policy: Policy, plan: EpochPlan, pool: Pool, result: EpochPlan, say: Verdict, rng: np.random.Generator
) -> None:
    """Check that the same samples in another order of rows give the same plan."""
    old_row = rng.permutation(len(pool.lengths))  # [new row] -> old row
    new_row = np.argsort(old_row)
    permuted = replace(
        pool,
        scores=_Listed({name: values[old_row] for name, values in pool.scores.items()}, "metric", say),
        columns=_Listed({name: _permuted(column, old_row) for name, column in pool.columns.items()}, "column", say),
        **{name: values[old_row] for name, values in _arrays(pool).items()},
    )
    other = _planned(policy, EpochPlan(indices=new_row[plan.indices], weights=plan.weights), permuted, say)
    same = (
        not isinstance(other, str)
        and other.indices.tolist() == new_row[result.indices].tolist()
        and np.allclose(other.weights, result.weights, rtol=1e-4)
    )
    say.require(
        same,
        "the plan depends on the order of the data set's rows",
        "Break ties by pool.content_hash, and draw random keys from the content (distill_sampler.policies.keys: "
        "best_first_order, random_keys), never from the row's number",
    )


def _check_dry_run(policy: Policy, plan: EpochPlan, pool: Pool, say: Verdict, *, fixed_length: bool) -> None:
    """Check that the plan has the same length with a constant for every score as with real scores."""
    lengths = []
    for constant in (1.0, 100.0):
        scores = {name: np.full(len(values), constant) for name, values in pool.scores.items()}
        dry = _planned(policy, plan, replace(pool, scores=_Listed(scores, "metric", say), dry_run=True), say)
        say.require(
            not isinstance(dry, str),
            f"it refuses a dry run ({dry})",
            "In a dry run (pool.dry_run) the scores are constants, and only the length of the plan matters",
        )
        lengths.append(len(dry))
    say.require(
        lengths[0] == lengths[1],
        f"a dry run gives {lengths[0]} samples if every score is 1, and {lengths[1]} if every score is 100",
        "Make bounds on scores accept everything in a dry run (pool.dry_run), so that the length of an epoch is known "
        "before there are scores",
    )
    if fixed_length:
        known = {name: np.where(np.isnan(values), 1.0, values) for name, values in pool.scores.items()}
        real = _planned(policy, plan, replace(pool, scores=_Listed(known, "metric", say)), say)
        say.require(
            isinstance(real, str) or len(real) == lengths[0],
            f"a dry run gives {lengths[0]} samples, and the real plan has {len(real)}",
            "If the length has to depend on the scores, let length_depends_on_scores be True; users then give "
            "Curriculum(num_samples=)",
        )


def _check_samples_to_score(policy: Policy, plan: EpochPlan, pool: Pool, result: EpochPlan, say: Verdict) -> None:
    """Check that the plan does not change if only the samples of `samples_to_score` have scores."""
    constant = {name: np.ones(len(values)) for name, values in pool.scores.items()}
    read = policy.samples_to_score(plan, replace(pool, scores=_Listed(constant, "metric", say), dry_run=True))
    if read is None:
        return
    say.require(
        set(read.tolist()) <= set(plan.indices.tolist()),
        "samples_to_score names samples that are not in the plan",
        "Build on plan.indices, for instance with plan.indices[positions]",
    )
    unread = ~np.isin(np.arange(len(pool.lengths)), read)
    blind = {name: np.where(unread, np.nan, values) for name, values in pool.scores.items()}
    say.require(
        _planned(policy, plan, replace(pool, scores=_Listed(blind, "metric", say)), say) == result,
        "its plan depends on scores of samples that samples_to_score does not name",
        "Name every sample whose score it reads, or return None",
    )


def _planned(policy: Policy, plan: EpochPlan, pool: Pool, say: Verdict) -> EpochPlan | str:
    """The policy's plan, or the message with which it refuses the pool."""
    try:
        result = policy(plan, pool, np.random.default_rng(7))
    except ValueError as refusal:
        return str(refusal)
    except AssertionError as error:
        if "weights have mean 1" not in str(error):
            raise
        say.require(False, "its weights do not have mean 1", "Divide them by their mean, or use plan.take(positions)")
        raise
    except Exception as error:
        raise AssertionError(
            f"{type(policy).__name__}: it raises {type(error).__name__}: {error}. Raise a ValueError for what users "
            "can correct. No pool may cause any other exception."
        ) from error
    say.require(
        isinstance(result, EpochPlan),
        f"it returns a {type(result).__name__}",
        "Return a distill_sampler.EpochPlan, for instance plan.take(positions)",
    )
    return result


# ---- Pools ----


_AWKWARD = (0.0, -0.0, 1.0, -1.0, 2.5, 1.0 + 1e-12, 3e-8, -7.0)
"""Scores that are tied or almost tied: -0.0 equals 0.0, and some differ by less than float32 can express."""


@dataclass(frozen=True, kw_only=True)
class _AnyMetric(Metric):
    """A stand-in for a metric of which only name, direction and scores are used."""

    name: str = ""
    higher: bool = True

    @property
    def higher_is_better(self) -> bool:
        return self.higher

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        raise NotImplementedError


class _Listed(dict[str, Any]):
    """A pool's metrics, scores or columns by name. Reading one that the policy does not list is a broken contract."""

    def __init__(self, values: Mapping[str, Any], what: str, say: Verdict) -> None:
        super().__init__(values)
        self._what, self._say = what, say

    def __contains__(self, name: object) -> bool:
        self._say.require(
            super().__contains__(name), f"it reads the {self._what} '{name}'", f"List it in uses_{self._what}s"
        )
        return True

    def __missing__(self, name: str) -> Any:
        return name in self

    def get(self, name: str, default: Any = None) -> Any:
        return self[name]


def _pool(
    policy: Policy,
    metrics: Sequence[Metric],
    columns: Mapping[str, Sequence[Any]],
    rng: np.random.Generator,
    say: Verdict,
) -> Pool:
    """Up to 24 candidates, some or all without a score, some tied."""
    num = int(rng.integers(1, 25))
    given = {metric.name: metric for metric in metrics}
    used: dict[str, Metric] = {
        name: given.get(name, _AnyMetric(name=name, higher=bool(rng.integers(2)))) for name in policy.uses_metrics
    }
    unscored, tied = rng.choice([0.0, 0.2, 0.9, 1.0], p=[0.4, 0.4, 0.1, 0.1]), rng.choice([0.0, 0.5, 1.0])
    scores: dict[str, FloatArray] = {}
    for metric in used.values():
        missing = rng.random(num) < unscored
        for name in metric.columns:
            drawn = np.where(rng.random(num) < tied, rng.choice(_AWKWARD, num), 3 * rng.normal(size=num))
            if metric.name in given:  # its aggregate may divide one of its numbers by another
                drawn = np.abs(drawn) + 0.1
            scores[name] = np.where(missing, np.nan, drawn)
    pool_columns = {}
    for name in policy.uses_columns:
        values = columns.get(name, ("a", "b", "c"))
        pool_columns[name] = _encoded([values[place] for place in rng.integers(len(values), size=num)])
    return Pool(
        epoch=int(rng.integers(0, 5)),
        metrics=_Listed(used, "metric", say),
        scores=_Listed(scores, "metric", say),
        columns=_Listed(pool_columns, "column", say),
        lengths=rng.integers(1, 10, num),
        content_hash=rng.integers(2**64, size=num, dtype=np.uint64),
        times_trained=rng.integers(0, 4, num),
        score_step=rng.integers(-1, 9, num),
        estimated=rng.random(num) < 0.3,
        cut=rng.random(num) < 0.2,
        step=10,
        num_epochs=5,
    )


def _plan(num: int, rng: np.random.Generator) -> EpochPlan:
    """Each sample at most once in any order, or some repeatedly; with loss weights."""
    once = bool(rng.integers(2))
    indices = rng.permutation(num)[: rng.integers(1, num + 1)] if once else rng.integers(num, size=rng.integers(1, 30))
    weights = rng.uniform(0.1, 4, len(indices))
    return EpochPlan(indices=indices, weights=weights / weights.mean())


def _encoded(values: Sequence[Any]) -> EncodedColumn:
    """A column as the data set has it: distinct values in order of first appearance."""
    distinct = tuple(dict.fromkeys(values))
    return EncodedColumn(codes=np.array([distinct.index(value) for value in values], np.int64), values=distinct)


def _permuted(column: EncodedColumn, old_row: IntArray) -> EncodedColumn:
    return _encoded([column.values[code] for code in column.codes[old_row]])


def _contents(pool: Pool, plan: EpochPlan) -> list[bytes]:
    """The bytes of everything that a policy could modify."""
    columns = [column.codes for column in pool.columns.values()]
    arrays = [*pool.scores.values(), *columns, *_arrays(pool).values(), plan.indices, plan.weights]
    return [array.tobytes() for array in arrays]


def _arrays(pool: Pool) -> dict[str, Any]:
    """The pool's own arrays, `[samples]` each, by field."""
    return {each.name: value for each in fields(pool) if isinstance(value := getattr(pool, each.name), np.ndarray)}
