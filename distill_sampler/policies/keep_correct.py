"""Rejection sampling: keep the responses that are marked as correct."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.policies.expressions import MetricExpression, column_names, metric_names
from distill_sampler.policies.keys import best_first_order, first_of_each, group_codes, num_distinct
from distill_sampler.protocols import Policy, Pool
from distill_sampler.types import EpochPlan


@documents_fields
@dataclass(frozen=True)
class KeepCorrect(Policy):
    """Keep the correct samples, in the plan's order. `if_none` decides about prompts that have none.

    This is the correctness filter of DeepSeek-R1's distillation recipe (arXiv:2501.12948). Correct samples are kept
    with or without a score. Trade-off: hard prompts lose the most samples, because few teachers solve them; and on top
    of RSR the filter gained nothing (50.7 against 51.3, arXiv:2601.14249).
    """

    column: str
    """Column that says whether the response is correct: true or false, 1 or 0. A missing value counts as incorrect."""
    if_none: Literal["keep_best", "drop", "error"] = "keep_best"
    """For a prompt without a correct response: keep the best one by `metric`, drop the prompt, or raise an error."""
    metric: str | MetricExpression | None = None
    """Name of the metric, or an expression, that ranks incorrect responses. Only for `if_none="keep_best"`.

    If no response of a prompt has a score, the one with the smallest content hash is kept.
    """
    per: str | None = None
    """Column that identifies the prompt. Needed unless `if_none="drop"`."""

    def __post_init__(self) -> None:
        if self.if_none not in ("keep_best", "drop", "error"):
            raise ValueError(f"KeepCorrect(if_none={self.if_none!r}): choose 'keep_best', 'drop' or 'error'.")
        if self.if_none == "keep_best" and self.metric is None:
            raise ValueError(
                "KeepCorrect(if_none='keep_best') needs metric= to rank the incorrect responses of a prompt; give "
                "one, or choose if_none='drop' to drop prompts without a correct response."
            )
        if self.if_none != "keep_best" and self.metric is not None:
            raise ValueError(
                f"KeepCorrect(metric={self.metric!r}) is used only with if_none='keep_best'; leave it out."
            )
        if self.if_none != "drop" and self.per is None:
            raise ValueError(
                f"KeepCorrect(if_none={self.if_none!r}) needs per=, the column that identifies the prompt."
            )

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        return () if self.metric is None else metric_names(self.metric)

    @property
    def uses_columns(self) -> tuple[str, ...]:
        names = (self.column, *(() if self.per is None else (self.per,)), *column_names(self.metric))
        return tuple(dict.fromkeys(names))

    @property
    def group_by(self) -> str | None:
        return self.per

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        column = pool.column(self.column)
        correct = np.array([is_correct(value, self.column) for value in column.values], np.bool_)
        keep = correct[column.codes[plan.indices]]
        if self.if_none != "drop" and len(plan):
            assert self.per is not None
            groups = group_codes(plan, pool, self.per, "KeepCorrect")
            solved = np.zeros(groups.max() + 1, np.bool_)
            solved[groups[keep]] = True
            unsolved = np.flatnonzero(~solved[groups])
            if self.if_none == "error" and len(unsolved):
                example = pool.column(self.per).values[groups[unsolved[0]]]
                raise ValueError(
                    f"KeepCorrect(if_none='error'): {num_distinct(groups[unsolved])} prompts have no correct "
                    f"response, for example {self.per}={example!r}. Drop them, or choose if_none='keep_best'."
                )
            if self.metric is not None and len(unsolved):
                rows = plan.indices[unsolved]
                by_group = best_first_order(pool.goodness(self.metric)[rows], pool.content_hash[rows], groups[unsolved])
                order = unsolved[by_group]
                keep[order[first_of_each(groups[order])]] = True
        return plan.take(np.flatnonzero(keep))


def is_correct(value: Any, column: str) -> bool:
    """Whether a value of the data set's column means that the response is correct. Missing (None, NaN) is False.

    Raises:
        ValueError: the value is not true, false, 1 or 0.
    """
    if value is None or value != value:
        return False
    if isinstance(value, (str, bytes)) or value not in (0, 1):  # True == 1
        raise ValueError(
            f"KeepCorrect(column='{column}'): the column holds {value!r}; it must hold true or false (1 or 0). "
            f"Compare rewards with a threshold first."
        )
    return bool(value)
