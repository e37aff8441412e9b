"""Fixed shares of the epoch for each domain, whatever the scores say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.keys import random_keys
from distill_sampler.types import EpochPlan, Policy, Pool, unknown_name


@documents_fields
@dataclass(frozen=True)
class MixDomains(Policy):
    """Give each domain its share of the plan, to one sample; the order of the plan stays.

    DeepSeek-R1's recipe is `{"reasoning": 3, "general": 1}` (arXiv:2501.12948). Which samples of a domain are left out
    (or repeated) is drawn anew each epoch. Without `num` no sample is repeated and the domain that is shortest of
    its share sets the length: the trade-off is that a rare domain with a large share makes a small epoch.
    """

    shares: Mapping[Any, float]
    """For each value of the column its share, in any unit: only ratios count. 0 leaves a domain out."""
    column: str = "domain"
    """Column that tells what kind of task a row is."""
    by: Literal["samples", "tokens"] = "samples"
    """Whether the shares are of samples or of tokens (prompt included)."""
    num: int | None = None
    """How many samples (or tokens) the plan shall have, each sample repeated as often as any other of its domain or
    once more, copies side by side; None: as many as need no repeats."""

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
                    f"MixDomains(column='{self.column}'): the plan has samples of {domain!r}, which has no share; "
                    f"give it one, 0 to leave it out."
                )
        for domain, share in self.shares.items():
            if share and domain not in column.values:
                known = map(str, column.values)
                raise ValueError(f"MixDomains: {unknown_name('domain', str(domain), known, 'in the column')}")
            if share and domain not in present:
                raise ValueError(
                    f"MixDomains: no sample of {domain!r} is left in the plan, so it cannot have its share; loosen the "
                    f"policies before this one, or give it share 0."
                )
        rows = {domain: np.flatnonzero(domains == present[domain]) for domain, s in self.shares.items() if s}
        stock = {domain: int(sizes[at].sum()) for domain, at in rows.items()}
        wanted = self._wanted(stock)
        keys = random_keys(plan, pool, rng)
        times = np.zeros(len(plan), np.int64)
        for domain, at in rows.items():
            rounds, rest = divmod(wanted[domain], stock[domain])
            times[at] = rounds
            if rest:
                drawn = at[np.argsort(keys[at], kind="stable")]
                so_far = np.r_[0, np.cumsum(sizes[drawn])]
                times[drawn[: np.argmin(np.abs(so_far - rest))]] += 1
        return plan.take(np.repeat(np.arange(len(plan)), times))

    def _wanted(self, stock: Mapping[Any, int]) -> dict[Any, int]:
        """How many samples (or tokens) of each domain: the nearest whole numbers that add up (largest remainders)."""
        shares = {domain: Fraction(self.shares[domain]).limit_denominator(10**9) for domain in stock}
        whole = sum(shares.values())
        total = self.num or math.floor(min(stock[domain] * whole / share for domain, share in shares.items()))
        exact = {domain: total * share / whole for domain, share in shares.items()}
        wanted = {domain: math.floor(number) for domain, number in exact.items()}
        by_remainder = sorted(exact, key=lambda domain: wanted[domain] - exact[domain])
        for domain in by_remainder[: total - sum(wanted.values())]:
            wanted[domain] += 1
        return wanted
