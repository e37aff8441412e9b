"""Choose the teacher that suits this student: rank teachers on a few traces each, keep the traces of the best."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.hashing import splitmix64
from distill_sampler.policies.keys import first_of_each, group_codes, num_distinct_in
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan, IntArray


@documents_fields
@dataclass(frozen=True)
class BestTeacher(Policy):
    """Keep all samples of the teacher with the best *group* score, in the plan's order.

    A teacher's group score is the metric's `aggregate` (for RSR a ratio of sums) over at most `num_samples` of its
    samples. Only these are scored. The draw depends on the samples' content alone, so it is the same in every epoch;
    with `per`, all teachers are compared on the same prompts, those that most teachers answered first. With RSR and 200
    samples this is the teacher selection of arXiv:2601.14249: average accuracy 48.3, against 48.7 for the oracle. The
    winner's samples are kept with or without a score. Trade-off: the plan has one teacher's style and blind spots;
    `BestOf` mixes teachers prompt by prompt.
    """

    metric: str
    """Name of the metric. Expressions have no group score."""
    teacher: str = "teacher"
    """Column that names the teacher."""
    num_samples: int = 200
    """Maximum number of samples to rank each teacher by; 200 in the paper."""
    per_domain: str | None = None
    """Column with one winner for each of its values, for example `"domain"`. None: one winner for the whole plan."""
    per: str | None = None
    """Column that tells which rows answer the same prompt, to compare teachers on the same prompts. None: samples of
    each teacher are drawn without regard to prompts."""

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str):
            raise ValueError(
                f"BestTeacher(metric={self.metric!r}): an expression has no group score; give the name of one metric."
            )
        if self.num_samples < 1:
            raise ValueError(f"BestTeacher(num_samples={self.num_samples}): give at least 1 sample of each teacher.")

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    @property
    def uses_columns(self) -> tuple[str, ...]:
        return tuple(name for name in (self.teacher, self.per_domain, self.per) if name is not None)

    def samples_to_score(self, plan: EpochPlan, pool: Pool) -> IntArray:
        drawn: IntArray = plan.indices[self._draw(plan, pool)]
        return drawn

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        names = pool.column(self.teacher).values
        cells = self._cells(plan, pool)
        metric = pool.metrics[self.metric]
        drawn = self._draw(plan, pool)
        unscored = [np.isnan(pool.scores[column][plan.indices[drawn]]) for column in metric.columns]
        order = drawn[~np.any(unscored, axis=0)]
        winners: dict[int, tuple[float, str, int]] = {}
        for cell in np.split(order, np.flatnonzero(first_of_each(cells[order]))[1:]) if len(order) else ():
            rows = plan.indices[cell]
            score = metric.aggregate({column: pool.scores[column][rows] for column in metric.columns})
            domain, teacher = divmod(int(cells[cell[0]]), len(names))
            badness = -score if metric.higher_is_better else score
            entry = (math.inf if math.isnan(badness) else badness, str(names[teacher]), teacher)  # ties: by name
            winners[domain] = min(winners.get(domain, entry), entry)
        best = [domain * len(names) + teacher for domain, (_, _, teacher) in winners.items()]
        return plan.take(np.flatnonzero(np.isin(cells, best)))

    def _cells(self, plan: EpochPlan, pool: Pool) -> IntArray:
        """`[len(plan)]` one number for each teacher in each domain."""
        teachers = pool.column(self.teacher)
        domains = np.zeros(len(plan), np.int64)
        if self.per_domain is not None:
            domains = pool.column(self.per_domain).codes[plan.indices]
        cells: IntArray = domains * len(teachers.values) + teachers.codes[plan.indices]
        return cells

    def _draw(self, plan: EpochPlan, pool: Pool) -> IntArray:
        """Positions in the plan of the samples that rank the teachers, cell by cell."""
        cells = self._cells(plan, pool)
        content = splitmix64(pool.content_hash[plan.indices])
        order = np.argsort(content, kind="stable")
        if self.per is not None and len(plan):
            groups = group_codes(plan, pool, self.per, "BestTeacher")
            answered = num_distinct_in(groups, cells)
            smallest = np.full(int(groups.max()) + 1, 2**64 - 1, np.uint64)
            np.minimum.at(smallest, groups, content)
            # groups that most teachers answered first, then by content; within a group by content
            order = np.lexsort((content, splitmix64(smallest)[groups], -answered[groups]))
        order = order[np.argsort(cells[order], kind="stable")]
        return order[first_of_each(cells[order], self.num_samples)]
