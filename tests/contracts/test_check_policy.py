"""`check_policy` finds each broken promise, and says which member and what to do. What keeps them passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from distill_sampler import (
    EpochPlan,
    Policy,
    Pool,
    Shuffle,
)
from distill_sampler.policies.keys import best_first_order
from distill_sampler.testing import check_policy

CALLS: list[int] = []


@dataclass(frozen=True)
class Plans(Policy):
    """A policy whose parts can be broken one at a time."""

    do: Callable[[EpochPlan, Pool, np.random.Generator], Any]
    metrics: Any = ("score",)
    columns: Any = ("teacher",)
    group: str | None = None
    depends: bool = False
    read: Callable[[EpochPlan, Pool], Any] | None = None

    uses_metrics = property(lambda self: self.metrics)  # type: ignore[assignment]
    uses_columns = property(lambda self: self.columns)  # type: ignore[assignment]
    group_by = property(lambda self: self.group)  # type: ignore[assignment]
    length_depends_on_scores = property(lambda self: self.depends)  # type: ignore[assignment]

    def samples_to_score(self, plan: EpochPlan, pool: Pool) -> Any:
        return self.read(plan, pool) if self.read else None

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> Any:
        return self.do(plan, pool, rng)


def as_it_is(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    assert pool.goodness("score").shape == pool.column("teacher").codes.shape
    return plan


def with_global_random(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    return plan.take(np.random.permutation(len(plan)))  # noqa: NPY002


def with_memory(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    CALLS.append(1)
    return plan.take(np.roll(np.arange(len(plan)), len(CALLS)))


def writes_scores(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    pool.scores["score"][0] = 17.0
    return plan


def writes_codes(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    pool.column("teacher").codes[:] = 0
    return plan


def adds_all(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    return EpochPlan(indices=np.argsort(pool.content_hash)) if len(plan) else plan


def heavy(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    return EpochPlan(indices=plan.indices, weights=np.full(len(plan), 2.0))


def a_little_heavy(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    return EpochPlan(indices=plan.indices, weights=np.full(len(plan), 1.0005))


def negative(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    weights = np.ones(len(plan))
    weights[: len(plan) // 2] -= 2
    weights[len(plan) - len(plan) // 2 :] += 2
    return EpochPlan(indices=plan.indices, weights=weights)


def by_row(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    return plan.take(np.argsort(plan.indices, kind="stable"))


def random_by_place(plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
    return plan.take(np.argsort(rng.random(len(pool.lengths))[plan.indices], kind="stable"))


def above_two(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    return plan.take(np.flatnonzero(pool.scores["score"][plan.indices] > 2))


def above_two_but_dry(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    return plan if pool.dry_run else above_two(plan, pool, rng)


def never_empty(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    return plan if len(plan) else EpochPlan(indices=np.zeros(1, np.int64))


def refuses_empty(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    if not len(plan):
        raise ValueError("there is nothing to plan")
    return plan


def refuses(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    raise ValueError("the column must hold numbers")


def refuses_dry(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    if pool.dry_run:
        raise ValueError("these scores are made up")
    return plan


def other_metric(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    pool.goodness("another")
    return plan


def other_column(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    pool.column("domain")
    return plan


def asks_for_column(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    return plan.take(np.arange(len(plan))) if pool.columns.get("domain") is None else plan


def by_score(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    return plan.take(best_first_order(pool.goodness("score")[plan.indices], pool.content_hash[plan.indices]))


def whole_first(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    return plan.take(np.argsort(pool.cut[plan.indices], kind="stable"))


def all_of_it(plan: EpochPlan, pool: Pool) -> Any:
    return plan.indices


def none_of_it(plan: EpochPlan, pool: Pool) -> Any:
    return plan.indices[:0]


def all_there_are(plan: EpochPlan, pool: Pool) -> Any:
    return np.arange(len(pool.lengths))


def as_list(plan: EpochPlan, pool: Pool, rng: Any) -> list[int]:
    return plan.indices.tolist()  # type: ignore[no-any-return]


def fails(plan: EpochPlan, pool: Pool, rng: Any) -> EpochPlan:
    raise IndexError("out of range")


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (Shuffle, "is a class"),
        (Plans(as_it_is), None),
        (Plans(lambda plan, pool, rng: plan), "pickling it"),
        (Plans(as_it_is, metrics="score"), "uses_metrics is 'score'"),
        (Plans(as_it_is, columns=["teacher"]), "uses_columns is"),
        (Plans(as_it_is, group="prompt_id"), "group_by is 'prompt_id'.*uses_columns"),
        (Plans(as_it_is, group="teacher"), None),
        (Plans(with_global_random), "second time.*generator"),
        (Plans(with_memory), "second time"),
        (Plans(writes_scores), "modifies the pool"),
        (Plans(writes_codes), "modifies the pool"),
        (Plans(adds_all), "does not have.*plan.take"),
        (Plans(heavy), "mean 1.*plan.take"),
        (Plans(a_little_heavy), "the mean 1.0005"),
        (Plans(negative), "the minimum -1"),
        (Plans(by_row), "order of the data set's rows.*content_hash"),
        (Plans(random_by_place), "order of the data set's rows.*random_keys"),
        (Plans(above_two), "dry run.*pool.dry_run"),
        (Plans(above_two_but_dry), "length_depends_on_scores"),
        (Plans(above_two_but_dry, depends=True), None),
        (Plans(whole_first), None),
        (Plans(by_score, read=all_of_it), None),
        (Plans(by_score, read=none_of_it), "samples_to_score does not name"),
        (Plans(by_score, read=all_there_are), "samples_to_score names samples that are not in the plan"),
        (Plans(never_empty), "empty plan"),
        (Plans(refuses_empty), "empty plan"),
        (Plans(refuses), r"refuses all 40 random pools \(the column must hold numbers\).*columns="),
        (Plans(refuses_dry), r"refuses a dry run \(these scores are made up\)"),
        (Plans(other_metric), "metric 'another'.*uses_metrics"),
        (Plans(other_column), "column 'domain'.*uses_columns"),
        (Plans(asks_for_column), "column 'domain'.*uses_columns"),
        (Plans(as_list), "returns a list.*EpochPlan"),
        (Plans(fails), "raises IndexError"),
    ],
)
def test_a_policy_that_breaks_a_promise_is_told_which(policy: Any, told: str | None) -> None:
    if told is None:
        check_policy(policy)
        return
    with pytest.raises(AssertionError, match=f"^{getattr(policy, '__name__', type(policy).__name__)}: .*{told}"):
        check_policy(policy)


def test_a_policy_whose_length_may_depend_on_scores_passes_if_that_is_said() -> None:
    check_policy(Plans(above_two_but_dry), fixed_length=False)
