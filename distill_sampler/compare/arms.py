"""The arms of a comparison, by name: ways to choose what a student trains on, and the controls beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from distill_sampler.compare.budget import Budget, fill, match
from distill_sampler.field_docs import documents_fields
from distill_sampler.planning.why import plan_with_reasons
from distill_sampler.policies import BestOf, BestSingleTeacher, Column, KeepByMargin, LarkGain
from distill_sampler.policies.expressions import MetricExpression
from distill_sampler.protocols import Policy, Pool
from distill_sampler.specs import parse_policies
from distill_sampler.types import EpochPlan, FloatArray, IntArray, unknown_name

GROUP, TEACHER, CORRECT = "prompt_id", "teacher", "correct"
"""Columns of the prepared candidates, whatever they are called in the data."""
RSR = "rank_surprisal_ratio"


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to choose. What it chooses is repeated or cut to the budget, in random order."""

    name: str
    """Its name in tables and files."""
    policies: Sequence[Policy] = ()
    """Applied in order to all training candidates."""
    kind: Literal["selected", "matched", "untrained"] = "selected"
    """`"matched"`: random samples with the teachers, prompts, samples and tokens of the subject's plan.
    `"untrained"`: the student as it is."""
    rounds: int = 1
    """The student scores and chooses anew so often, for an equal part of the budget each. The optimizer goes on."""

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        """Names of the metrics that it reads."""
        return tuple(dict.fromkeys(name for policy in self.policies for name in policy.uses_metrics))

    @property
    def uses_columns(self) -> tuple[str, ...]:
        """Names of the columns that it reads."""
        return tuple(dict.fromkeys(name for policy in self.policies for name in policy.uses_columns))


@dataclass(frozen=True)
class _Worst(MetricExpression):
    """A metric with its direction turned."""

    metric: str

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def __call__(self, pool: Pool) -> FloatArray:
        return -pool.goodness(self.metric)


def _known(rounds: int) -> dict[str, Arm]:
    rsr = (BestOf(RSR, per=GROUP),)
    every = [
        Arm(name="none", kind="untrained"),
        Arm(name="random", policies=(BestOf("random", per=GROUP),)),
        Arm(name="matched_random", kind="matched"),
        Arm(name="longest", policies=(BestOf("response_length", per=GROUP),)),
        Arm(name="lowest_surprisal", policies=(BestOf("global_naturalness", per=GROUP),)),
        Arm(name="rsr", policies=rsr),
        Arm(name="anti_rsr", policies=(BestOf(_Worst(RSR), per=GROUP),)),
        Arm(name="local_naturalness", policies=(BestOf("local_naturalness", per=GROUP),)),
        Arm(name="lark", policies=(KeepByMargin(LarkGain(per=GROUP), per=GROUP),)),
        Arm(name="best_single_teacher", policies=(BestSingleTeacher(Column(CORRECT), per=GROUP),)),
        Arm(name="all"),
        Arm(name="rsr_rescored", policies=rsr, rounds=rounds),
    ]
    return {arm.name: arm for arm in every}


CORE = ("none", "random", "matched_random", "longest", "lowest_surprisal", "rsr", "best_single_teacher")
"""The six arms that every comparison should have, and the student before training."""
ARMS = tuple(_known(2))
"""The arms that have a name."""
CONTROLS = ("matched_random", "random", "longest", "best_single_teacher")
"""The subject's four contrasts, fixed before looking; the first is the verdict's."""


def parse_arms(texts: Sequence[str], *, rounds: int) -> dict[str, Arm]:
    """Arms by name, or the user's own as `name=policy; policy`: `mine=KeepTop(rank_surprisal_ratio, fraction=0.3)`.

    Args:
        texts: what the user typed.
        rounds: of the arms that are scored again.

    Raises:
        ValueError: an arm is unknown, is there twice, or its policies cannot be parsed.
    """
    known, found = _known(rounds), dict[str, Arm]()
    for text in texts:
        name, own, policies = text.partition("=")
        name = name.strip()
        if own and not name.isidentifier():
            raise ValueError(f"--arm {text}: write an arm of your own as NAME=POLICY, with a name such as mine.")
        if not own and name not in known:
            raise ValueError(f"--arm {text}: {unknown_name('arm', name, known, 'with a name')}")
        if own and name in known:
            raise ValueError(f"--arm {text}: there is an arm '{name}' already. Choose another name.")
        if name in found:
            raise ValueError(f"--arm {text}: there are two arms '{name}'. Give each a name of its own.")
        parts = [part for part in policies.split(";") if part.strip()]
        found[name] = Arm(name=name, policies=tuple(parse_policies(parts))) if own else known[name]
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Chooser:
    """Makes the arms' plans for one seed, each from its own random numbers."""

    pool: Pool
    """What is known of all samples."""
    candidates: IntArray
    """The samples that may be trained on."""
    tokens: IntArray
    """`[samples]` response tokens of each."""
    budget: Budget
    """What every arm gets."""
    seed: int
    """Seed of all random choices."""
    subject: Arm
    """The arm that the matched control matches."""

    def plan(self, arm: Arm, *, around: int = 0) -> EpochPlan:
        """What an arm trains on in a round.

        Args:
            arm: not an untrained one.
            around: the round, from 0.

        Raises:
            ValueError: the arm leaves no sample, or the budget is too small for it.
        """
        budget = self.budget.share(arm.rounds)
        if arm.kind == "matched":
            subject = self.plan(self.subject)
            return match(
                subject, self.candidates, self.pool, self.tokens, budget, self._rng(1, 0), teacher=TEACHER, per=GROUP
            )
        chosen, _ = plan_with_reasons(arm.policies, self.candidates, self.pool, self.seed)
        return fill(chosen, self.tokens, budget, self._rng(0, around))

    def _rng(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *what])


def teacher_counts(plan: EpochPlan, pool: Pool) -> Mapping[str, int]:
    """How many samples of a plan each teacher wrote."""
    column = pool.column(TEACHER)
    counts = np.bincount(column.codes[plan.indices], minlength=len(column.values))
    return {str(name): int(count) for name, count in zip(column.values, counts, strict=True)}
