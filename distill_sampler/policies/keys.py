"""Random and sorting keys that depend on a sample's content, not on its position in the data set.

Policies sort by these keys, so the plan does not depend on the order of the data set's rows. Every sort is stable, so
all machines get the same plan.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from distill_sampler.hashing import splitmix64
from distill_sampler.protocols import Pool
from distill_sampler.types import BoolArray, EpochPlan, FloatArray, HashArray, IntArray

HALF = np.uint64(32)


def occurrence(values: IntArray | HashArray) -> IntArray:
    """`[n]` how many times each value has appeared before its position: `[7, 8, 7, 7] -> [0, 0, 1, 2]`."""
    order = np.argsort(values, kind="stable")
    first = np.flatnonzero(first_of_each(values[order]))
    counts = np.arange(len(values)) - np.repeat(first, np.diff(np.r_[first, len(values)]))
    result = np.empty(len(values), np.int64)
    result[order] = counts
    return result


def random_keys(plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> HashArray:
    """`[len(plan)]` 64-bit keys, uniform and independent. A sample's key does not depend on its row number."""
    salt = rng.integers(0, 2**64, dtype=np.uint64)
    content = pool.content_hash[plan.indices]
    keys = splitmix64(content ^ salt)
    if first_of_each(np.sort(content)).all():  # no repeats: skipping the count halves the time
        return splitmix64(keys)
    return splitmix64(keys + occurrence(content).astype(np.uint64))


def to_unit_interval(keys: HashArray) -> npt.NDArray[np.float64]:
    """`[n]` the keys as float64 numbers strictly between 0 and 1."""
    return ((keys >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def first_of_each(in_order: IntArray | HashArray, k: int = 1) -> BoolArray:
    """`[n]` True for the first `k` elements of each run of equal neighbours: `k=2, [5, 5, 5, 6] -> [T, T, F, T]`."""
    first = np.ones(len(in_order), np.bool_)
    first[k:] = in_order[k:] != in_order[:-k]
    return first


def num_distinct(values: IntArray | HashArray) -> int:
    """How many different values there are. (`np.unique` hashes, which takes ten times as long on millions of them.)"""
    in_order = values.copy()
    in_order.sort()
    return int(first_of_each(in_order).sum())


def num_distinct_in(groups: IntArray, values: IntArray) -> IntArray:
    """`[largest group + 1]` how many different values, numbers from 0, each group has."""
    width = int(values.max()) + 1
    pairs: IntArray = np.sort(groups * width + values)
    return np.bincount(pairs[first_of_each(pairs)] // width, minlength=int(groups.max()) + 1)


def renumbered(codes: IntArray) -> IntArray:
    """`[n]` numbers from 0 without gaps in place of numbers from 0, in their order: `[7, 3, 7] -> [1, 0, 1]`."""
    return (np.cumsum(np.bincount(codes) > 0) - 1)[codes]


def descending_bits(numbers: FloatArray) -> HashArray:
    """`[n]` integers whose ascending order is the descending order of the numbers, NaN last."""
    descending = np.subtract(0.0, numbers, dtype=np.float64)  # 0.0 and -0.0 both become 0.0
    bits = descending.view(np.uint64)
    flip = (descending < 0).astype(np.uint64)
    np.negative(flip, out=flip)  # flip all bits of negative numbers, the sign bit of the others
    flip |= np.uint64(1 << 63)
    bits ^= flip
    bits[np.isnan(numbers)] = np.uint64(2**64 - 1)
    return bits


def sort_by(first: HashArray, *then: tuple[HashArray, int]) -> IntArray:
    """`[n]` the stable order by `first`; ties by the low 32 bits of `words >> shift` for each of `then`.

    Like `np.lexsort`, but a later key is read only where all keys before it tie.
    """
    order = np.argsort(first, kind="stable")
    tied = ~first_of_each(first[order])[1:]  # [i] whether i + 1 equals i
    for words, shift in then:
        at = np.flatnonzero(np.r_[tied, False] | np.r_[False, tied])
        if len(at) == 0:
            break
        run = np.cumsum(np.r_[True, ~tied], dtype=np.uint64)[at]
        word = (words[order[at]] >> np.uint64(shift)) & np.uint64(2**32 - 1)
        packed = run << HALF | word
        by_word = np.argsort(packed, kind="stable")
        order[at] = order[at][by_word]
        tied[at[:-1]] = ~first_of_each(packed[by_word])[1:]
    return order


def best_first_order(
    goodness: FloatArray, content: HashArray, groups: IntArray | None = None, *, last: BoolArray | None = None
) -> IntArray:
    """`[n]` the order by group, then best first; ties by content hash, NaN last in its group.

    Args:
        goodness: `[n]` higher is better.
        content: `[n]` breaks ties.
        groups: `[n]` equal numbers for one group. None: all are one group.
        last: `[n]` True for those that come after all others of their group that have a score. None: none.
    """
    if last is not None and last.any():
        order = best_first_order(goodness, content, groups)
        last = last | np.isnan(goodness)
        return order[np.lexsort((last[order], np.zeros(len(order)) if groups is None else groups[order]))]
    bits = descending_bits(goodness)
    by_content = (content, 32), (content, 0)
    if groups is None:
        return sort_by(bits, *by_content)
    return sort_by(groups.astype(np.uint64) << HALF | bits >> HALF, (bits, 0), *by_content)


def group_codes(plan: EpochPlan, pool: Pool, per: str, policy: str) -> IntArray:
    """`[len(plan)]` the group of each sample, as a number.

    Args:
        plan: the samples.
        pool: where the column is.
        per: the column whose equal values are a group.
        policy: name of the policy, for the error message.

    Raises:
        ValueError: some samples have no value in the column.
    """
    column = pool.column(per)
    codes = column.codes[plan.indices]
    if None in column.values:
        missing = int(np.count_nonzero(codes == list(column.values).index(None)))
        if missing:
            raise ValueError(
                f"{policy}(per='{per}'): {missing} of {len(plan)} samples have no value in column '{per}', so they "
                f"belong to no group. Fill the column, or drop these rows."
            )
    return codes
