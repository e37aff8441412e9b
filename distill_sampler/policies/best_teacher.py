"""Choose the teacher that suits this student: rank teachers on a few traces each, keep the traces of the best."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.keys import first_of_each, random_keys
from distill_sampler.types import EpochPlan, Policy, Pool


@documents_fields
@dataclass(frozen=True)
class BestTeacher(Policy):
    """Keep all samples of the teacher with the best *group* score, in the plan's order.

    A teacher's group score is the metric's `aggregate` (for RSR a ratio of sums) over at most `num_samples` of its
    scored samples, redrawn each epoch. With RSR and 200 samples this is the teacher selection of arXiv:2601.14249:
    average accuracy 48.3, against 48.7 for the oracle. The winner's samples are kept with or without a score.
    Trade-off: the plan has one teacher's style and blind spots; `BestOf` mixes teachers prompt by prompt.
    """

    metric: str
    """Name of the metric. Expressions have no group score."""
    teacher: str = "teacher"
    """Column that names the teacher."""
    num_samples: int = 200
    """Maximum number of samples to rank each teacher by; 200 in the paper."""
    per_domain: str | None = None
    """Column with one winner for each of its values, for example `"domain"`. None: one winner for the whole plan."""

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
        return (self.teacher,) if self.per_domain is None else (self.teacher, self.per_domain)

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        names = pool.column(self.teacher).values
        teachers = pool.column(self.teacher).codes[plan.indices]
        domains = 0 if self.per_domain is None else pool.column(self.per_domain).codes[plan.indices]
        cells = domains * len(names) + teachers  # one cell for each teacher in each domain
        metric = pool.metrics[self.metric]
        unscored = [np.isnan(pool.scores[column][plan.indices]) for column in metric.columns]
        scored = np.flatnonzero(~np.any(unscored, axis=0))
        order = scored[np.argsort(random_keys(plan, pool, rng)[scored], kind="stable")]
        order = order[np.argsort(cells[order], kind="stable")]
        order = order[first_of_each(cells[order], self.num_samples)]
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
