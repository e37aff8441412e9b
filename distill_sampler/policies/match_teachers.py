"""Random samples with the teacher mixture of another selection: a control that shows the gain of the mixture alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.hashing import splitmix64
from distill_sampler.policies.keys import first_of_each, group_codes, occurrence, random_keys
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan, HashArray, IntArray

_ROUNDS = 24
"""How often every prompt may swap its teacher with another prompt's. Each round makes about half of the possible swaps.
"""


@documents_fields
@dataclass(frozen=True)
class MatchTeachers(Policy):
    """Draw as many samples of each teacher as another selection has, at random, with a new draw each epoch.

    Selecting by a score also changes the mixture of teachers, and much of the gain may come from the mixture. This
    control keeps the mixture and ignores the score. It first applies `of` to the same samples, and then draws exactly
    as many samples of each teacher. With `per`, each prompt also has as many samples as in that plan, so the two plans
    differ only in which teacher's response a prompt gets. To draw, it starts from the plan of `of`: pairs of prompts
    swap their teachers repeatedly (the usual randomisation of a table with fixed margins), and then a response of each
    prompt's new teacher is drawn.

    Samples stay in the plan's order. A sample that the selection repeats may be repeated here. Trade-off: a prompt that
    only one teacher answered cannot change, so on sparse data the control resembles the selection.
    """

    of: Policy | Sequence[Policy]
    """The other selection: a policy such as `BestOf("rank_surprisal_ratio", per="prompt_id")`, or several
    in a list."""
    teacher: str = "teacher"
    """Column that names the teacher."""
    per: str | None = None
    """Column that tells which rows answer the same prompt. Each prompt's number of samples is then kept too. None: only
    the teachers' counts are kept."""

    def __post_init__(self) -> None:
        policies = (self.of,) if isinstance(self.of, Policy) else tuple(self.of) if _is_list(self.of) else ()
        if not policies or not all(isinstance(policy, Policy) and not isinstance(policy, type) for policy in policies):
            raise ValueError(
                f"MatchTeachers(of={self.of!r}): give the other selection as a policy, or as a list of policies, such "
                "as of=BestOf('rank_surprisal_ratio', per='prompt_id')."
            )
        object.__setattr__(self, "of", self.of if isinstance(self.of, Policy) else policies)

    @property
    def _policies(self) -> tuple[Policy, ...]:
        return (self.of,) if isinstance(self.of, Policy) else tuple(self.of)

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for policy in self._policies for name in policy.uses_metrics))

    @property
    def uses_columns(self) -> tuple[str, ...]:
        own = (self.teacher,) if self.per is None else (self.teacher, self.per)
        return tuple(dict.fromkeys((*own, *(name for policy in self._policies for name in policy.uses_columns))))

    @property
    def group_by(self) -> str | None:
        return self.per

    @property
    def explained_by(self) -> tuple[str, ...]:
        return (self.teacher,)

    @property
    def length_depends_on_scores(self) -> bool:
        return any(policy.length_depends_on_scores for policy in self._policies)

    def samples_to_score(self, plan: EpochPlan, pool: Pool) -> IntArray | None:
        return self._policies[0].samples_to_score(plan, pool) if len(self._policies) == 1 else None

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        if not len(plan):
            return plan
        selected = plan
        for policy in self._policies:
            selected = policy(selected, pool, np.random.default_rng(rng.integers(2**63)))
        teachers = pool.column(self.teacher).codes
        groups = np.zeros(len(teachers), np.int64)
        if self.per is not None:
            group_codes(plan, pool, self.per, "MatchTeachers")  # refuses samples without a prompt
            groups = pool.column(self.per).codes
        content = pool.content_hash
        chosen_groups, chosen_teachers = groups[selected.indices], teachers[selected.indices]
        if self.per is not None:
            chosen_teachers = _swapped(
                chosen_groups, chosen_teachers, groups[plan.indices], teachers[plan.indices], content[plan.indices], rng
            )
        width = int(teachers.max()) + 1
        wanted = np.bincount(chosen_groups * width + chosen_teachers)
        return plan.take(_drawn(groups[plan.indices] * width + teachers[plan.indices], wanted, plan, pool, rng))


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _drawn(cells: IntArray, wanted: IntArray, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> IntArray:
    """`wanted[c]` random positions of the plan in each cell c, repeated evenly if the cell has too few."""
    available = np.bincount(cells, minlength=len(wanted))
    wanted = np.r_[wanted, np.zeros(len(available) - len(wanted), np.int64)]
    repeats, remainder = np.divmod(wanted, np.maximum(available, 1))
    order = np.argsort(random_keys(plan, pool, rng), kind="stable")
    order = order[np.argsort(cells[order], kind="stable")]
    times = repeats[cells]
    times[order] += occurrence(cells[order]) < remainder[cells[order]]
    return np.repeat(np.arange(len(cells)), times)


def _swapped(
    groups: IntArray,
    teachers: IntArray,
    all_groups: IntArray,
    all_teachers: IntArray,
    all_content: HashArray,
    rng: np.random.Generator,
) -> IntArray:
    """`[n]` other teachers for the n chosen samples: each group and each teacher keeps its number of samples.

    In each round one sample of every group takes part. Groups are paired at random, and a pair swaps its teachers where
    each group still has an unused sample of the other's teacher, half of the time.

    Args:
        groups: `[n]` the groups of the chosen samples.
        teachers: `[n]` their teachers.
        all_groups: `[m]` the groups of all samples that could be chosen.
        all_teachers: `[m]` their teachers.
        all_content: `[m]` their content hashes, from which random numbers are made.
        rng: the source of randomness.
    """
    width, size = int(all_teachers.max()) + 1, int(all_groups.max()) + 1
    available = np.bincount(all_groups * width + all_teachers, minlength=size * width)
    used = np.bincount(groups * width + teachers, minlength=size * width)
    smallest = np.full(size, 2**64 - 1, np.uint64)  # not the codes, which depend on the rows' order
    np.minimum.at(smallest, all_groups, all_content)
    of_teacher = np.full(width, 2**64 - 1, np.uint64)
    np.minimum.at(of_teacher, all_teachers, all_content)
    teachers = teachers.copy()
    for salt in rng.integers(0, 2**64, size=_ROUNDS, dtype=np.uint64):
        # samples of one group and teacher are interchangeable, so it does not matter which of them swaps
        keys = splitmix64(splitmix64(smallest[groups] ^ salt) ^ of_teacher[teachers])
        order = np.argsort(keys, kind="stable")
        order = order[np.argsort(groups[order], kind="stable")]
        one_of_each = order[first_of_each(groups[order])]
        mixed = one_of_each[np.argsort(splitmix64(smallest[groups[one_of_each]] + salt), kind="stable")]
        left, right = mixed[: len(mixed) // 2], mixed[len(mixed) - len(mixed) // 2 :]
        to_left, to_right = groups[left] * width + teachers[right], groups[right] * width + teachers[left]
        fits = (used[to_left] < available[to_left]) & (used[to_right] < available[to_right])
        fits &= (splitmix64(keys[left] + keys[right]) >> np.uint64(63)).astype(bool)
        fits &= teachers[left] != teachers[right]
        left, right, to_left, to_right = left[fits], right[fits], to_left[fits], to_right[fits]
        # each group takes part once, so no cell changes twice in a round
        used[groups[left] * width + teachers[left]] -= 1
        used[groups[right] * width + teachers[right]] -= 1
        used[to_left] += 1
        used[to_right] += 1
        teachers[left], teachers[right] = teachers[right], teachers[left]
    return teachers
