"""Give each domain a fixed share of the epoch, whatever the scores say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.keys import random_keys
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan, unknown_name


@documents_fields
@dataclass(frozen=True)
class MixDomains(Policy):
    """Give each domain its share of the plan, exact to one sample, in the plan's order.

    DeepSeek-R1's recipe is `{"reasoning": 3, "general": 1}` (arXiv:2501.12948). Which samples of a domain are left out
    or repeated is redrawn each epoch. Without `num` no sample is repeated, so the domain with the fewest samples for
    its share sets the length. Trade-off: a rare domain with a large share makes a short epoch.
    """

    shares: Mapping[Any, float]
    """The share of each value of the column, in any unit: only ratios count. 0 leaves a domain out."""
    column: str = "domain"
    """Column that names the domain."""
    by: Literal["samples", "tokens"] = "samples"
    """Whether shares count samples or tokens (prompt included)."""
    num: int | None = None
    """Number of samples (or tokens) in the plan. Samples of a domain are repeated equally often, some once more, with
    copies side by side. None: as many as possible without repeats."""

    def __post_init__(self) -> None:
        if not self.shares or not all(0 <= s < math.inf for s in self.shares.values()) or not any(self.shares.values()):
            raise ValueError(
                f"MixDomains({dict(self.shares)}): give each domain a share, 0 or more, not all of them 0."
            )
        if self.by not in ("samples", "tokens"):
            raise ValueError(f"MixDomains(by={self.by!r}): choose 'samples' or 'tokens'.")
        if self.num is not None and self.num < 1:
            raise ValueError(f"MixDomains(num={self.num}): num must be at least 1.")

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        if not len(plan):
            return plan
        column = pool.column(self.column)
        domains = column.codes[plan.indices]
        sizes = pool.lengths[plan.indices] if self.by == "tokens" else np.ones(len(plan), np.int64)
        present = {column.values[code]: code for code in np.flatnonzero(np.bincount(domains)).tolist()}
        for domain in present:
            if domain not in self.shares:
                raise ValueError(
                    f"MixDomains(column='{self.column}'): the plan has samples of {domain!r}, which has no share. "
                    f"Give it one, or 0 to leave it out."
                )
        for domain, share in self.shares.items():
            if share and domain not in column.values:
                known = map(str, column.values)
                raise ValueError(f"MixDomains: {unknown_name('domain', str(domain), known, 'in the column')}")
            if share and domain not in present:
                raise ValueError(
                    f"MixDomains: no sample of {domain!r} is left in the plan, so it cannot have its share. Loosen the "
                    f"policies before this one, or set its share to 0."
                )
        rows = {domain: np.flatnonzero(domains == present[domain]) for domain, s in self.shares.items() if s}
        available = {domain: int(sizes[at].sum()) for domain, at in rows.items()}
        wanted = self._wanted(available)
        keys = random_keys(plan, pool, rng)
        times = np.zeros(len(plan), np.int64)
        for domain, at in rows.items():
            repeats, remainder = divmod(wanted[domain], available[domain])
            times[at] = repeats
            if remainder:
                drawn = at[np.argsort(keys[at], kind="stable")]
                cumulative = np.r_[0, np.cumsum(sizes[drawn])]
                times[drawn[: np.argmin(np.abs(cumulative - remainder))]] += 1
        return plan.take(np.repeat(np.arange(len(plan)), times))

    def _wanted(self, available: Mapping[Any, int]) -> dict[Any, int]:
        """How many samples (or tokens) each domain gets, rounded by largest remainders so that they add up."""
        shares = {domain: Fraction(self.shares[domain]).limit_denominator(10**9) for domain in available}
        whole = sum(shares.values())
        total = self.num or math.floor(min(available[domain] * whole / share for domain, share in shares.items()))
        exact = {domain: total * share / whole for domain, share in shares.items()}
        wanted = {domain: math.floor(number) for domain, number in exact.items()}
        by_remainder = sorted(exact, key=lambda domain: wanted[domain] - exact[domain])
        for domain in by_remainder[: total - sum(wanted.values())]:
            wanted[domain] += 1
        return wanted
