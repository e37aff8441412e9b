"""Why a sample is in an epoch or not, for the trainer, the report and the command line.

Planning records which policy left out each sample. From that record, the scores and the policies' declared metrics and
columns, this module makes one sentence per sample, without running a policy again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from distill_sampler.policies import Anneal, Column, During, apply_one_by_one
from distill_sampler.policies.expressions import numbers_of
from distill_sampler.policies.keys import best_first_order, occurrence
from distill_sampler.policies.stages import unfolded
from distill_sampler.protocols import Policy, Pool
from distill_sampler.serialize import as_typed
from distill_sampler.types import BoolArray, EncodedColumn, EpochPlan, FloatArray, IntArray, Missing

KEPT = -1
"""Value in `left_out_by`: every policy kept the sample."""
NO_CANDIDATE = -2
"""Value in `left_out_by`: the sample has no token to score, so it is not a candidate."""


@dataclass(frozen=True, kw_only=True)
class PolicyFacts:
    """What an explanation needs to know about a policy. A file that holds it can be explained without the policy's
    code."""

    text: str
    """The policy as a user would type it."""
    metrics: tuple[str, ...]
    """The metrics whose values explain its choice."""
    columns: tuple[str, ...]
    """The columns of the data set whose values explain its choice."""
    group_by: str | None
    ranks_by: str | None = None
    """The metric or column that it ranks samples by; None: it ranks by none, or by an expression of several."""
    higher_is_better: bool | None = None
    """Which way a column that it ranks by is better. None: it ranks by none."""
    by: str | None = None
    """What `begin` and `end` count, `"epoch"` or `"step"`. None: it applies to the whole run."""
    begin: int = 0
    end: int | None = None

    @classmethod
    def of(cls, policy: Policy) -> PolicyFacts:
        if isinstance(policy, During):
            until = "" if policy.end is None else f" until {policy.by} {policy.end}"
            inner = cls.of(policy.policy)
            text = inner.text + (f" from {policy.by} {policy.begin}" if policy.begin else "") + until
            return replace(inner, text=text, by=policy.by, begin=policy.begin, end=policy.end)
        if isinstance(policy, Anneal):
            inner = cls.of(policy.policy)
            return replace(inner, text=f"{inner.text} with {policy.argument} moving to {policy.to}")
        explained_by = policy.explained_by
        metrics = tuple(name for name in policy.uses_metrics if name in explained_by)
        metric = getattr(policy, "metric", metrics[0] if len(metrics) == 1 else None)
        by_column = metric if isinstance(metric, Column) and metric.name in explained_by else None
        return cls(
            text=as_typed(policy),
            metrics=metrics,
            columns=tuple(name for name in policy.uses_columns if name in explained_by),
            group_by=policy.group_by,
            ranks_by=by_column.name if by_column else metric if metric in metrics else None,
            higher_is_better=by_column.higher_is_better if by_column else None,
        )

    @classmethod
    def from_json(cls, recorded: Mapping[str, Any]) -> PolicyFacts:
        """Restore what `to_json` returned."""
        return cls(
            text=str(recorded["text"]),
            metrics=tuple(recorded["metrics"]),
            columns=tuple(recorded["columns"]),
            group_by=recorded["group_by"],
            # older files do not say: a policy with one metric ranked by it
            ranks_by=recorded.get("ranks_by", recorded["metrics"][0] if len(recorded["metrics"]) == 1 else None),
            higher_is_better=recorded.get("higher_is_better"),
            by=recorded.get("by"),
            begin=recorded.get("begin", 0),
            end=recorded.get("end"),
        )

    def to_json(self) -> dict[str, Any]:
        """The facts as plain JSON values."""
        return asdict(self)

    def applies(self, epoch: int, step: int) -> bool:
        """Whether it applies to a plan that was made for this epoch at this optimizer step."""
        now = epoch if self.by == "epoch" else step
        return self.by is None or (self.begin <= now and (self.end is None or now < self.end))

    @property
    def kind(self) -> str:
        """Name of the policy's class."""
        return self.text.partition("(")[0]


def plan_with_reasons(
    policies: Sequence[Policy], candidates: IntArray, pool: Pool, seed: int
) -> tuple[EpochPlan, IntArray]:
    """Apply policies to the candidates, and record which policy left out each sample.

    Returns:
        The plan, and `[samples]` the index of the policy that left each sample out, or `KEPT`, or `NO_CANDIDATE`.

    Raises:
        ValueError: a policy names an unknown metric or column, or leaves no sample.
    """
    plan = EpochPlan(indices=candidates)
    left_out_by = np.full(len(pool.lengths), NO_CANDIDATE, np.int64)
    left_out_by[candidates] = KEPT
    for policy_index, (_, after) in enumerate(apply_one_by_one(policies, plan, pool, seed)):
        left_out = left_out_by == KEPT
        left_out[after.indices] = False
        left_out_by[left_out] = policy_index
        plan = after
    return plan, left_out_by


@dataclass(frozen=True, kw_only=True, eq=False)
class ExplainedPlan:
    """A plan with the reason why it has each sample, or does not."""

    policies: Sequence[PolicyFacts]
    plan: EpochPlan
    left_out_by: IntArray
    """`[samples]` see `plan_with_reasons`."""
    epoch: int = 0
    """The epoch that it is for."""
    step: int = 0
    """Optimizer steps that the student had taken when it was made."""
    start: int = 0
    """The position from which a replanned epoch changed; 0 for an epoch's first plan."""
    scores: Mapping[str, FloatArray]
    """The numbers that the policies used: by column, `[samples]` each."""
    higher_is_better: Mapping[str, bool]
    """By metric."""
    columns: Mapping[str, EncodedColumn]
    lengths: IntArray
    content_hash: Any
    cut: BoolArray | None = None
    """`[samples]` True where truncation cut off the response; None: nowhere."""
    missing: Mapping[str, IntArray] = field(default_factory=dict)
    """By metric, `[samples]` why a sample has no score (`Missing`)."""

    @classmethod
    def from_policies(cls, policies: Sequence[Policy], candidates: IntArray, pool: Pool, seed: int) -> ExplainedPlan:
        """Apply policies to the candidates of a pool.

        Raises:
            ValueError: a policy names an unknown metric or column, or leaves no sample.
        """
        policies = unfolded(policies)
        plan, left_out_by = plan_with_reasons(policies, candidates, pool, seed)
        return cls(
            epoch=pool.epoch,
            step=pool.step,
            policies=[PolicyFacts.of(policy) for policy in policies],
            plan=plan,
            left_out_by=left_out_by,
            scores=pool.scores,
            higher_is_better={name: metric.higher_is_better for name, metric in pool.metrics.items()},
            columns=pool.columns,
            lengths=pool.lengths,
            content_hash=pool.content_hash,
            cut=pool.cut,
        )

    @cached_property
    def in_plan(self) -> BoolArray:
        """`[samples]` True for the samples in the plan."""
        found = np.zeros(len(self.left_out_by), bool)
        found[self.plan.indices] = True
        return found

    def reason(self, sample: int) -> str:
        """Why a sample is in the plan, or is not, as the end of a sentence."""
        by = int(self.left_out_by[sample])
        if by == NO_CANDIDATE:
            return "it has no response token to score"
        if self.in_plan[sample]:
            if by != KEPT:
                return "trained on before the epoch was replanned"
            applied = [index for index, each in enumerate(self.policies) if each.applies(self.epoch, self.step)]
            deciding = [i for i in applied if self.policies[i].metrics or self.policies[i].ranks_by]
            if not deciding:
                names = ", ".join(self._names[index] for index in applied)
                return f"kept by {names}" if names else "kept: there is no policy"
            return f"kept by {self._names[deciding[0]]}{self._standing(sample, deciding[0])}"
        if by != KEPT:
            return f"left out by {self._names[by]}{self._standing(sample, by)}"
        if self.start:
            return "the policies kept it when the epoch was replanned, but samples trained on before took its place"
        return f"the plan was cut to {len(self.plan)} samples, and it came after the cut"

    def explanation(self, sample: int, epoch: int) -> str:
        """Why a sample is in an epoch's plan, or is not, as a whole sentence."""
        positions = np.flatnonzero(self.plan.indices == sample)
        if not len(positions):
            return f"Sample {sample} was not in epoch {epoch}: {self.reason(sample)}."
        where = ", ".join(map(str, positions.tolist()))
        weight = f"{self.plan.weights[positions[0]]:.3g}"
        return (
            f"Sample {sample} was in epoch {epoch}, at position {where} of {len(self.plan)}, with weight {weight}: "
            f"{self.reason(sample)}."
        )

    @cached_property
    def _names(self) -> list[str]:
        """The policies' class names; the full text where two policies have the same class."""
        kinds = [policy.kind for policy in self.policies]
        return [p.kind if kinds.count(p.kind) == 1 else p.text for p in self.policies]

    def _standing(self, sample: int, policy_index: int) -> str:
        """How a sample ranked among those that the policy at `policy_index` was given, as the end of a sentence."""
        policy = self.policies[policy_index]
        name = policy.ranks_by
        if not policy.metrics and name is None:
            values = [f"{name} = {self._value(name, sample)}" for name in policy.columns]
            return f": {', '.join(values or [f'{self.lengths[sample]} tokens'])}"
        for metric in policy.metrics:
            if np.isnan(self.scores[metric][sample]):
                return f": it has no {metric}{self._why_missing(metric, sample)}"
        if name is None:
            scores = [f"{metric} {self.scores[metric][sample]:.4g}" for metric in policy.metrics]
            values = [f"{column} = {self._value(column, sample)}" for column in policy.columns]
            return f": {', '.join(scores + values)}"
        score, _ = self._score(policy_index)
        if np.isnan(score[sample]):
            return f": it has no {name}"
        number, size, best = self._rankings(policy_index)
        rivals = str(size[sample])
        if policy.group_by is not None:
            rivals += f" with {policy.group_by} = {self._value(policy.group_by, sample)}"
        others = [
            f"{column} = {self._value(column, sample)}"
            for column in policy.columns
            if column not in (policy.group_by, name)
        ]
        details = f" ({', '.join(others)})" if others else ""
        first = "" if number[sample] == 0 else f"; the best, sample {best[sample]}, has {score[best[sample]]:.4g}"
        cut = "; its response was cut off by truncation" if self.cut is not None and self.cut[sample] else ""
        return f": its {name} {score[sample]:.4g} is number {number[sample] + 1} of {rivals}{details}{first}{cut}"

    def _why_missing(self, metric: str, sample: int) -> str:
        code = self.missing.get(metric)
        reason = Missing(int(code[sample])).reason if code is not None else ""
        return f" ({reason})" if reason else ""

    def _rankings(self, policy_index: int) -> tuple[IntArray, IntArray, IntArray]:
        """For one policy, `[samples]` each: the sample's rank among its rivals (from 0), how many rivals there are,
        and which is best. Rivals are the samples that the policy was given, within the group if it has one.
        """
        if policy_index not in self._ranked:
            policy = self.policies[policy_index]
            given = np.flatnonzero((self.left_out_by == KEPT) | (self.left_out_by >= policy_index))
            score, higher_is_better = self._score(policy_index)
            goodness = score if higher_is_better else -score
            groups = np.zeros(len(goodness), np.int64)
            if policy.group_by is not None:
                groups = self.columns[policy.group_by].codes
            order = given[best_first_order(goodness[given], self.content_hash[given], groups[given])]
            number = np.zeros(len(goodness), np.int64)
            number[order] = occurrence(groups[order])
            first = np.zeros(int(groups.max(initial=0)) + 1, np.int64)
            best = order[number[order] == 0]
            first[groups[best]] = best
            size = np.bincount(groups[given], minlength=len(first))
            self._ranked[policy_index] = number, size[groups], first[groups]
        return self._ranked[policy_index]

    def _score(self, policy_index: int) -> tuple[FloatArray, bool]:
        """`[samples]` the metric or column that a policy ranks by, and whether higher is better."""
        policy = self.policies[policy_index]
        assert policy.ranks_by is not None
        if policy.higher_is_better is None:
            return self.scores[policy.ranks_by], self.higher_is_better[policy.ranks_by]
        return numbers_of(self.columns[policy.ranks_by], policy.ranks_by), policy.higher_is_better

    @cached_property
    def _ranked(self) -> dict[int, tuple[IntArray, IntArray, IntArray]]:
        return {}

    def _value(self, name: str, sample: int) -> str:
        column = self.columns[name]
        return str(column.values[column.codes[sample]])


def facts_of(policies: Iterable[Policy]) -> list[dict[str, Any]]:
    """What to write to a file, so that its plans can be explained later."""
    return [PolicyFacts.of(policy).to_json() for policy in unfolded(list(policies))]
