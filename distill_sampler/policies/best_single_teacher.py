"""All samples of one teacher, the strongest: the baseline that choosing among teachers has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.expressions import MetricExpression, column_names, metric_names
from distill_sampler.policies.keys import group_codes
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import BoolArray, EpochPlan, unknown_name


@documents_fields
@dataclass(frozen=True)
class BestSingleTeacher(Policy):
    """Keep the samples of one teacher, in the plan's order: the one with the best mean, or one that is named.

    `BestSingleTeacher(Column("correct"), per="prompt_id")` keeps the strongest teacher, the baseline of most studies of
    selection. To find the best teacher in hindsight, which papers call the oracle (48.7 against 48.3 for `BestTeacher`
    with RSR, arXiv:2601.14249), train once on each teacher, and then give its name. `BestTeacher` chooses by a metric's
    group score of a few samples; this policy uses the mean over all samples with a score, and also accepts columns and
    expressions. Trade-off: the strongest teacher is not always a good one for this student, and the plan has a single
    style.
    """

    metric: str | MetricExpression | None = None
    """The teacher with the best mean of this is kept: a `Column` such as `Column("correct")`, the name of a metric, or
    an expression. Give this or `named`."""
    named: str | None = None
    """The teacher to keep."""
    teacher: str = "teacher"
    """Column that names the teacher."""
    per: str | None = None
    """Column that tells which rows answer the same prompt, to compare teachers only on prompts that all of them
    answered, if there are any. None: every teacher on its own samples."""

    def __post_init__(self) -> None:
        if (self.metric is None) == (self.named is None):
            raise ValueError(
                "BestSingleTeacher: give exactly one of metric= (to choose the teacher by, such as Column('correct')) "
                "and named= (the teacher's name)."
            )
        if self.named is not None and self.per is not None:
            raise ValueError(f"BestSingleTeacher(named={self.named!r}): per= is used only with metric=; leave it out.")

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return () if self.metric is None else metric_names(self.metric)

    @property
    def uses_columns(self) -> tuple[str, ...]:
        own = (self.teacher,) if self.per is None else (self.teacher, self.per)
        return tuple(dict.fromkeys((*own, *column_names(self.metric))))

    @property
    def explained_by(self) -> tuple[str, ...]:
        return (self.teacher,)

    @property
    def length_depends_on_scores(self) -> bool:
        return bool(self.uses_metrics)

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        if not len(plan):
            return plan
        column = pool.column(self.teacher)
        teachers = column.codes[plan.indices]
        if self.metric is None:
            names = [str(value) for value in column.values]
            if self.named not in names:
                raise ValueError(
                    f"BestSingleTeacher: {unknown_name('teacher', str(self.named), names, 'in the column')}"
                )
            return plan.take(np.flatnonzero(teachers == names.index(self.named)))
        if self.uses_metrics and pool.dry_run:
            return plan
        goodness = pool.goodness(self.metric)[plan.indices]
        counts = ~np.isnan(goodness) & self._on_common_prompts(plan, pool)
        if not counts.any():
            counts = ~np.isnan(goodness)
        number = np.bincount(teachers[counts], minlength=len(column.values))
        # sorted, so that the sum does not depend on the order of the rows
        order = np.argsort(goodness, kind="stable")
        order = order[counts[order]]
        total = np.bincount(teachers[order], goodness[order], minlength=len(column.values))
        present = np.flatnonzero(number)
        if not len(present):
            return plan.take(np.zeros(0, np.int64))
        best = min(present.tolist(), key=lambda code: (-total[code] / number[code], str(column.values[code])))
        return plan.take(np.flatnonzero(teachers == best))

    def _on_common_prompts(self, plan: EpochPlan, pool: Pool) -> BoolArray:
        """`[len(plan)]` True for the samples of prompts that every teacher of the plan answered; all without `per`."""
        if self.per is None:
            return np.ones(len(plan), bool)
        groups = group_codes(plan, pool, self.per, "BestSingleTeacher")
        teachers = pool.column(self.teacher).codes[plan.indices]
        width = int(teachers.max()) + 1
        pairs = np.unique(groups * width + teachers)
        answered = np.bincount(pairs // width, minlength=int(groups.max()) + 1)
        common: BoolArray = answered[groups] == len(np.unique(teachers))
        return common
