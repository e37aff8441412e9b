"""Applying a list of policies: each gets its own random generator, and mistakes common to all are refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan, unknown_name


def apply_one_by_one(
    policies: Sequence[Policy], plan: EpochPlan, pool: Pool, seed: int
) -> Iterator[tuple[Policy, EpochPlan]]:
    """Yield each policy with the plan that it makes from the plan before it.

    The policy at `position` draws from `np.random.default_rng([seed, pool.epoch, position])`, so its random numbers do
    not depend on the other policies.

    Raises:
        ValueError: a policy names an unknown metric or column, or leaves no sample.
    """
    for position, policy in enumerate(policies):
        for kind, names, known, listed_as in (
            ("metric", policy.uses_metrics, pool.metrics, "that are scored"),
            ("column", policy.uses_columns, pool.columns, "that are available"),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(f"{policy}: {unknown_name(kind, name, known, listed_as)}")
        before, plan = plan, policy(plan, pool, np.random.default_rng([seed, pool.epoch, position]))
        if len(before) and not len(plan):
            unscored = [name for name in policy.uses_metrics if np.isnan(pool.scores[name][before.indices]).all()]
            raise ValueError(
                f"{policy} keeps none of the {len(before)} samples it was given: "
                + (
                    f"none of them has a score for '{unscored[0]}'; score them before planning this epoch."
                    if unscored
                    else "no sample satisfies its arguments; loosen them, or remove the policy."
                )
            )
        yield policy, plan


def apply_policies(policies: Sequence[Policy], plan: EpochPlan, pool: Pool, seed: int) -> EpochPlan:
    """The plan after all policies, first to last; the given plan if there are none. See `apply_one_by_one`."""
    result = plan
    for _, after in apply_one_by_one(policies, plan, pool, seed):
        result = after
    return result
