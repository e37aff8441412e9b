"""Equal budgets: a selection repeated or cut to so many response tokens or samples, and a control that matches it.

A selection also changes how long the responses are, so equal numbers of samples are unequal numbers of tokens. Here
every arm gets the same tokens, to within a percent, in whole optimizer steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies import MatchTeachers
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan, FloatArray, IntArray

TOLERANCE = 0.01
"""Largest relative difference of an arm's tokens from the budget."""
_AIM = 0.5 * TOLERANCE
_TRIALS = 20_000


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much every arm trains on."""

    amount: int
    """Number of response tokens, or of samples."""
    unit: Literal["tokens", "samples"] = "tokens"
    """What `amount` counts. Tokens are those of responses, without end markers."""
    step: int = 1
    """Samples in an optimizer step. An arm trains on whole steps."""

    def __post_init__(self) -> None:
        if self.amount < 1:
            raise ValueError(f"Budget(amount={self.amount}): give a positive number of {self.unit}.")
        if self.step < 1:
            raise ValueError(f"Budget(step={self.step}): an optimizer step has at least one sample.")

    def share(self, parts: int) -> Budget:
        """An equal part of it, for each of several rounds."""
        return replace(self, amount=max(1, round(self.amount / parts)))


@documents_fields
@dataclass(frozen=True)
class Given(Policy):
    """A plan that was made beforehand, whatever is scored."""

    indices: tuple[int, ...]
    """The samples in order."""
    weights: tuple[float, ...] = ()
    """Their weights in the loss; empty: all alike."""

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        indices = np.array(self.indices, np.int64)
        weights = self.weights or (1.0,) * len(indices)
        return EpochPlan(indices=indices, weights=np.array(weights, np.float32))


def given(plan: EpochPlan) -> Given:
    """The policy that gives exactly this plan."""
    weights = () if (plan.weights == 1).all() else tuple(plan.weights.tolist())
    return Given(tuple(plan.indices.tolist()), weights)


def fill(plan: EpochPlan, tokens: IntArray, budget: Budget, rng: np.random.Generator) -> EpochPlan:
    """Repeat or cut a selection until it has the budget, in a new random order in each repetition.

    The number of samples is the number of whole steps whose tokens are closest to the budget. A few of the samples are
    then exchanged for others of the selection, at random, until the tokens are within half a percent.

    Args:
        plan: the selection; its order does not matter.
        tokens: `[samples]` response tokens of each sample of the data set.
        budget: what is wanted.
        rng: the source of randomness.

    Raises:
        ValueError: the selection is empty, or so small that no exchange comes within a percent of the budget.
    """
    if not len(plan):
        raise ValueError("The policies leave no sample to fill the budget with.")
    lengths = tokens[plan.indices]
    if budget.unit == "samples":
        number = -(-budget.amount // budget.step) * budget.step
        return _taken(plan, np.concatenate([*_orders(len(plan), number, rng)])[:number])
    most = 2 * budget.step + int(np.ceil(budget.amount / max(lengths.mean() * 0.5, 1)))
    order = np.concatenate([*_orders(len(plan), most, rng)])
    steps = np.cumsum(lengths[order])[budget.step - 1 :: budget.step]
    number = (1 + int(np.abs(steps - budget.amount).argmin())) * budget.step
    chosen = order[:number]
    times = np.bincount(chosen, minlength=len(plan))
    off = int(lengths[chosen].sum()) - budget.amount
    for _ in range(_TRIALS):
        if abs(off) <= _AIM * budget.amount:
            break
        place, other = int(rng.integers(number)), int(rng.integers(len(plan)))
        change = int(lengths[other] - lengths[chosen[place]])
        # none may be repeated twice more often than another
        if abs(off + change) < abs(off) and times[other] <= times[chosen[place]] - (times.max() == times.min()):
            times[chosen[place]] -= 1
            times[other] += 1
            chosen[place] = other
            off += change
    _require_close(off, budget)
    return _taken(plan, chosen)


def match(
    of: EpochPlan,
    candidates: IntArray,
    pool: Pool,
    tokens: IntArray,
    budget: Budget,
    rng: np.random.Generator,
    *,
    teacher: str,
    per: str,
) -> EpochPlan:
    """Random samples with exactly the teachers' counts of a plan, the same prompts, and the budget's tokens.

    `MatchTeachers` draws them. In a budget of tokens, pairs of prompts then exchange their teachers, at random, where
    that brings the tokens closer to the budget.

    Args:
        of: the filled plan of the selection.
        candidates: the samples to draw from.
        pool: what is known of all samples.
        tokens: `[samples]` response tokens of each.
        budget: what `of` was filled to.
        rng: the source of randomness.
        teacher: column that names the teacher.
        per: column that tells which rows answer the same prompt.

    Raises:
        ValueError: the tokens cannot be brought within a percent of the budget.
    """
    everything = EpochPlan(indices=candidates)
    chosen = MatchTeachers(of=given(replace(of, weights=np.ones(len(of)))), teacher=teacher, per=per)(
        everything, pool, rng
    ).indices.copy()
    rng.shuffle(chosen)
    if budget.unit == "samples":
        return EpochPlan(indices=chosen)
    teachers, prompts = pool.column(teacher).codes, pool.column(per).codes
    cells: dict[tuple[int, int], list[int]] = {}
    for sample in candidates[np.argsort(pool.content_hash[candidates], kind="stable")].tolist():
        cells.setdefault((int(prompts[sample]), int(teachers[sample])), []).append(sample)
    used = np.bincount(chosen, minlength=len(tokens))
    most = int(np.bincount(of.indices).max())  # repeated no more often than the subject repeats
    off = int(tokens[chosen].sum()) - budget.amount
    for _ in range(_TRIALS):
        if abs(off) <= _AIM * budget.amount:
            break
        left, right = (int(place) for place in rng.integers(len(chosen), size=2))
        a, b = int(chosen[left]), int(chosen[right])
        new_a = _unused(cells.get((int(prompts[a]), int(teachers[b])), []), used, most, rng)
        new_b = _unused(cells.get((int(prompts[b]), int(teachers[a])), []), used, most, rng)
        if new_a is None or new_b is None or prompts[a] == prompts[b]:
            continue
        change = int(tokens[new_a] + tokens[new_b] - tokens[a] - tokens[b])
        if abs(off + change) < abs(off):
            np.add.at(used, [a, b, new_a, new_b], [-1, -1, 1, 1])
            chosen[left], chosen[right] = new_a, new_b
            off += change
    _require_close(off, budget)
    return EpochPlan(indices=chosen)


def _orders(size: int, wanted: int, rng: np.random.Generator) -> Iterator[IntArray]:
    for _ in range(-(-wanted // size)):
        yield rng.permutation(size)


def _taken(plan: EpochPlan, positions: IntArray) -> EpochPlan:
    weights: FloatArray = plan.weights[positions]
    return EpochPlan(indices=plan.indices[positions], weights=weights / weights.mean(dtype=np.float64))


def _unused(cell: list[int], used: IntArray, most: int, rng: np.random.Generator) -> int | None:
    """A sample of a cell that is used less than so many times."""
    free = [sample for sample in cell if used[sample] < most]
    return free[int(rng.integers(len(free)))] if free else None


def _require_close(off: int, budget: Budget) -> None:
    if abs(off) > TOLERANCE * budget.amount:
        raise ValueError(
            f"--budget {budget.amount}: a plan of whole steps misses this number of response tokens by {abs(off)}, "
            "more than a percent. Give a larger budget, or fewer samples a step."
        )
