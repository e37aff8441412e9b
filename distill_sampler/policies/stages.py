"""Policies that change over the run: stages with different lists of policies, and arguments that change gradually."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Real
from typing import Any, Literal

import numpy as np

from distill_sampler.contract import require_field_types
from distill_sampler.field_docs import documents_fields
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan, is_whole


@documents_fields
@dataclass(frozen=True)
class Stage:
    """A list of policies, and when they begin to apply; see `Stages`."""

    policies: Sequence[Policy]
    """Applied in order."""
    from_epoch: int | None = None
    """The stage begins with this epoch, counted from 0."""
    from_step: int | None = None
    """The stage begins with the first plan that is made at this optimizer step of the run, or later. Plans are made
    before each epoch, and with `Rescore(every_steps=)` within epochs too."""

    def __post_init__(self) -> None:
        listed = isinstance(self.policies, Sequence) and not isinstance(self.policies, str)
        if not listed or not all(isinstance(each, Policy) and not isinstance(each, type) for each in self.policies):
            raise ValueError(f"Stage({self.policies!r}): give a list of policies, such as [Shuffle()].")
        if any(isinstance(each, Stages) for each in self.policies):
            raise ValueError(
                "Stage: a stage cannot contain Stages. Put all stages into one list, with from_epoch= or from_step=."
            )
        if self.from_epoch is not None and self.from_step is not None:
            raise ValueError("Stage: give from_epoch= or from_step=, not both.")
        if min(self.from_epoch or 0, self.from_step or 0) < 0:
            raise ValueError("Stage: a stage begins with an epoch or step of 0 or more.")
        object.__setattr__(self, "policies", tuple(self.policies))

    @property
    def begin(self) -> int:
        """The epoch or step at which the stage begins."""
        return self.from_epoch or self.from_step or 0


@documents_fields
@dataclass(frozen=True)
class Stages(Policy):
    """Apply one list of policies until an epoch or step, then another list, and so on. A resume is exact.

    For example, train first on responses that were sampled at a low temperature and later on those of a higher one, as
    in the sequel of arXiv:2512.20908 (DASD). The temperature is in a column of the data:

        Stages([Stage([MixDomains({0.6: 1, 1.0: 0}, column="temperature")]),
                Stage([MixDomains({0.6: 0, 1.0: 1}, column="temperature")], from_epoch=3)])

    The stage depends only on the epoch, or on the optimizer step at which the plan is made, so a resumed run makes the
    same plans. All stages must make epochs of the same length, or `Curriculum(num_samples=)` sets the length. Policies
    before and after `Stages` in the list apply in every stage. Trade-off: a trainer's learning-rate schedule ignores
    stages, so late stages train with small steps.
    """

    stages: Sequence[Stage]
    """The stages in order. All begin at epochs, or all at steps. The first one begins with the run."""

    def __post_init__(self) -> None:
        listed = isinstance(self.stages, Sequence) and not isinstance(self.stages, str)
        if not listed or not self.stages or not all(isinstance(each, Stage) for each in self.stages):
            raise ValueError("Stages: give a list such as [Stage([Shuffle()]), Stage([SortBy('a')], from_epoch=1)].")
        first, *later = self.stages
        begins = [stage.begin for stage in self.stages]
        by_epoch, by_step = (
            [getattr(stage, name) is not None for stage in later] for name in ("from_epoch", "from_step")
        )
        if first.begin or not (all(by_epoch) or all(by_step)) or sorted(set(begins)) != begins:
            raise ValueError(
                f"Stages: the stages begin with {', '.join(map(str, begins))}. Let the first one begin with the run, "
                "and give each later one a larger from_epoch=, or each a larger from_step=."
            )
        object.__setattr__(self, "stages", tuple(self.stages))

    @property
    def parts(self) -> tuple[During, ...]:
        """Every policy of every stage, with the part of the run in which it applies."""
        ends = [*(stage.begin for stage in self.stages[1:]), None]
        by: Literal["epoch", "step"] = "step" if self.stages[-1].from_step is not None else "epoch"
        return tuple(
            During(policy, begin=stage.begin, end=end, by=by)
            for stage, end in zip(self.stages, ends, strict=True)
            for policy in stage.policies
        )

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.uses_metrics))

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.uses_columns))

    @property
    def group_by(self) -> str | None:
        return next((part.group_by for part in self.parts if part.group_by is not None), None)

    @property
    def length_depends_on_scores(self) -> bool:
        return any(part.length_depends_on_scores for part in self.parts)

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        for part in self.parts:
            plan = part(plan, pool, np.random.default_rng(rng.integers(2**63)))
        return plan


class _AsPolicy(Policy):
    """What a policy that applies another one says of itself: the same as that one."""

    policy: Policy

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return self.policy.uses_metrics

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return self.policy.uses_columns

    @property
    def group_by(self) -> str | None:
        return self.policy.group_by

    @property
    def explained_by(self) -> tuple[str, ...]:
        return self.policy.explained_by

    @property
    def length_depends_on_scores(self) -> bool:
        return self.policy.length_depends_on_scores


@documents_fields
@dataclass(frozen=True)
class During(_AsPolicy):
    """Apply a policy during a part of the run, and leave plans unchanged before and after. `Stages` consists of these.

    Trade-off: a policy that selects may change the length of an epoch, which must be constant; see `Stages`.
    """

    policy: Policy
    """The policy."""
    begin: int = 0
    """The first epoch or step that it applies to."""
    end: int | None = None
    """The first epoch or step that it no longer applies to. None: it applies until the end of the run."""
    by: Literal["epoch", "step"] = "epoch"
    """Whether `begin` and `end` are epochs, from 0, or optimizer steps at which plans are made."""

    def __post_init__(self) -> None:
        _require_policy(self.policy, "During")
        if self.by not in ("epoch", "step"):
            raise ValueError(f"During(by={self.by!r}): choose 'epoch' or 'step'.")
        if self.begin < 0 or (self.end is not None and self.end <= self.begin):
            raise ValueError(f"During(begin={self.begin}, end={self.end}): give 0 <= begin < end.")

    def applies(self, epoch: int, step: int) -> bool:
        """Whether the policy applies to a plan that is made for this epoch at this optimizer step."""
        now = epoch if self.by == "epoch" else step
        return self.begin <= now and (self.end is None or now < self.end)

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        return self.policy(plan, pool, rng) if self.applies(pool.epoch, pool.step) else plan


@documents_fields
@dataclass(frozen=True)
class Anneal(_AsPolicy):
    """Change a numeric argument of a policy gradually over the run, from the policy's own value to another one.

    `Anneal(SampleBySoftmax("rank_surprisal_ratio", temperature=2.0), "temperature", to=0.2)` draws almost uniformly at
    first, and almost only the best samples at the end. In between, the value is from + (to - from) t, where t is the
    share of the run that is over when the plan is made. With `shape="cosine"`, t is replaced by (1 - cos πt) / 2; with
    `"exponential"`, the value is from (to / from)^t. The values of integer arguments are rounded. If the
    argument changes an epoch's length, `Curriculum(num_samples=)` is needed. Trade-off: the value only changes when a
    plan is made, so a run of one epoch needs `steps` and `Rescore(every_steps=)`.
    """

    policy: Policy
    """The policy, with the argument's first value."""
    argument: str
    """Name of its argument."""
    to: float
    """The argument's last value."""
    shape: Literal["linear", "cosine", "exponential"] = "linear"
    """The shape of the change. Exponential needs two values of the same sign, neither of them 0."""
    epochs: int | None = None
    """The first epoch with the last value, counted from 0. None: the run's last epoch."""
    steps: int | None = None
    """The optimizer step from which the last value applies. Give it instead of `epochs`."""

    def __post_init__(self) -> None:
        _require_policy(self.policy, "Anneal")
        names: list[str] = [each.name for each in fields(self.policy)] if is_dataclass(self.policy) else []
        start: Any = getattr(self.policy, self.argument) if self.argument in names else None
        numeric = isinstance(start, Real) and not isinstance(start, bool)
        if not numeric:
            raise ValueError(
                f"Anneal(argument={self.argument!r}): {type(self.policy).__name__} has no such argument with "
                f"a number. Choose one of: {', '.join(names) or 'none'}, and give the policy its first value."
            )
        if self.shape not in ("linear", "cosine", "exponential"):
            raise ValueError(f"Anneal(shape={self.shape!r}): choose 'linear', 'cosine' or 'exponential'.")
        if self.shape == "exponential" and not start * self.to > 0:
            raise ValueError(
                f"Anneal(to={self.to}, shape='exponential'): the first value is {start}, so give another one of "
                "the same sign, not 0. Choose 'linear' or 'cosine' for other values."
            )
        if self.epochs is not None and self.steps is not None:
            raise ValueError("Anneal: give epochs= or steps=, not both.")
        for name, value in (("epochs", self.epochs), ("steps", self.steps)):
            if value is not None and value < 1:
                raise ValueError(f"Anneal({name}={value}): give 1 or more.")
        self.at(1.0)  # the policy refuses a last value that is not valid

    def at(self, share: float) -> Policy:
        """The policy with the argument's value at this share of the run, from 0 to 1."""
        start = getattr(self.policy, self.argument)
        if self.shape == "exponential":
            value = start * (self.to / start) ** share
        else:
            part = share if self.shape == "linear" else (1 - math.cos(math.pi * share)) / 2
            value = start + (self.to - start) * part
        given: Any = round(value) if is_whole(start) else value
        made: Policy = replace(self.policy, **{self.argument: given})  # type: ignore[type-var]
        require_field_types(made)
        return made

    @property
    def length_depends_on_scores(self) -> bool:
        return super().length_depends_on_scores or self.at(1.0).length_depends_on_scores

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        return self.at(self._share(pool))(plan, pool, rng)

    def _share(self, pool: Pool) -> float:
        if self.steps is not None:
            return min(1.0, pool.step / self.steps)
        last = self.epochs
        if last is None and pool.num_epochs is not None:
            last = pool.num_epochs - 1
        if last is None:
            if pool.dry_run or pool.epoch == 0:
                return float(pool.epoch > 0)
            raise ValueError(
                f"Anneal({type(self.policy).__name__}, '{self.argument}'): the number of epochs of the run is unknown. "
                "Give epochs= (the first epoch with the last value) or steps=."
            )
        return min(1.0, pool.epoch / max(last, 1))


def unfolded(policies: Sequence[Policy]) -> tuple[Policy, ...]:
    """The policies, with `Stages` replaced by its parts, so that each part is explained by itself."""
    return tuple(part for policy in policies for part in (policy.parts if isinstance(policy, Stages) else (policy,)))


def turning_points(policies: Sequence[Policy]) -> list[tuple[int, int]]:
    """The `(epoch, step)` pairs at which a policy begins, ends or has its last value. Plans may change length there."""
    points = []
    for policy in unfolded(policies):
        if isinstance(policy, During):
            times = [time for time in (policy.begin, policy.end) if time]
            points += [(time, 0) if policy.by == "epoch" else (0, time) for time in times]
            points += turning_points([policy.policy])
        if isinstance(policy, Anneal):
            points.append((0, policy.steps) if policy.steps else (policy.epochs or 10**9, 0))
    return list(dict.fromkeys(points))


def _require_policy(policy: Any, kind: str) -> None:
    if not isinstance(policy, Policy) or isinstance(policy, (type, Stages)):
        raise ValueError(f"{kind}(policy={policy!r}): give a policy, such as SampleBySoftmax('a', temperature=1.0).")
