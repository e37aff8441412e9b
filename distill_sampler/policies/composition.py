"""Policies in a list: who gets which randomness, and what is refused whichever policy it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from distill_sampler.types import EpochPlan, Policy, Pool, unknown_name


def apply_one_by_one(
    policies: Sequence[Policy], plan: EpochPlan, pool: Pool, seed: int
) -> Iterator[tuple[Policy, EpochPlan]]:
    """Each policy in turn with the plan that it makes of the one before.

    The policy at `position` draws from `np.random.default_rng([seed, pool.epoch, position])`, so its randomness
    depends on nothing that the others do.

    Raises:
        ValueError: a policy names a metric or a column that is not there, or leaves nothing of a plan.
    """
    for position, policy in enumerate(policies):
        for what, used, known, which in (
            ("metric", policy.uses_metrics, pool.metrics, "that are scored"),
            ("column", policy.uses_columns, pool.columns, "that are available"),
        ):
            for name in used:
                if name not in known:
                    raise ValueError(f"{policy}: {unknown_name(what, name, known, which)}")
        before, plan = plan, policy(plan, pool, np.random.default_rng([seed, pool.epoch, position]))
        if len(before) and not len(plan):
            unscored = [name for name in policy.uses_metrics if np.isnan(pool.scores[name][before.indices]).all()]
            raise ValueError(
                f"{policy} keeps none of the {len(before)} samples it was given: "
                + (
                    f"none of them has a score by '{unscored[0]}'; score them before this epoch is planned."
                    if unscored
                    else "none meets its arguments; loosen them, or take it out of the list."
                )
            )
        yield policy, plan


def apply_policies(policies: Sequence[Policy], plan: EpochPlan, pool: Pool, seed: int) -> EpochPlan:
    """The plan after all policies, first to last; the plan as it is if there are none. See `apply_one_by_one`."""
    result = plan
    for _, made in apply_one_by_one(policies, plan, pool, seed):
        result = made
    return result
