"""Does the choice prefer correct responses: their shares in the pool, in the choice, and with `KeepCorrect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.planning.why import ExplainedPlan
from distill_sampler.policies import KeepCorrect
from distill_sampler.policies.keys import num_distinct, renumbered
from distill_sampler.protocols import Policy
from distill_sampler.specs import parse_policies
from distill_sampler.types import IntArray

FEW_PROMPTS = 10
"""With fewer prompts than this, nothing is said of a preference."""
_DRAWS = 400


def correctness(
    scores: Scores,
    correct: IntArray,
    choice: ExplainedPlan | None,
    policies: Sequence[Policy],
    seed: int,
) -> dict[str, Any] | None:
    """What the page says of correctness; None if the file does not say which responses are correct.

    Args:
        scores: the scores.
        correct: `[samples]` 1: correct, 0: incorrect, -1: unknown.
        choice: the choice that is shown.
        policies: the policies that made it; empty: those that the file names.
        seed: of the policies, and of the bootstrap over prompts.
    """
    known = correct >= 0
    if not known.any():
        return None
    found: dict[str, Any] = {"column": scores.correct, "judged": int(known.sum()), "pool": _share(correct, known)}
    if choice is None:
        found["sentences"] = [f"{_percent(found['pool'])} of {found['judged']:,} judged responses are correct."]
        return found
    codes = scores.codes(scores.group)
    groups = np.arange(len(correct)) if codes is None else codes
    chosen = choice.plan.indices[known[choice.plan.indices]]
    found["chosen"] = _share(correct, chosen) if len(chosen) else None
    found["num_chosen"] = len(chosen)
    found["prompts"] = num_distinct(groups[chosen]) if len(chosen) else 0
    low, high = _difference(correct, known, chosen, groups, seed)
    found["sentences"] = _sentences(found, low, high)
    if scores.correct is not None and scores.group is not None:
        kept = _with_filter(scores, policies or _recorded(choice), seed)
        if kept is not None and found["chosen"] is not None:
            rows = kept.plan.indices
            judged = rows[known[rows]]
            found["kept"] = _share(correct, judged) if len(judged) else None
            prompts, before = num_distinct(groups[rows]), num_distinct(groups[choice.plan.indices])
            found["sentences"].append(
                f"With KeepCorrect('{scores.correct}', if_none='drop') before the other policies, "
                f"{_percent(found['kept'])} of the choice is correct, and {prompts:,} of {before:,} prompts keep a "
                "response."
            )
    return found


def _sentences(found: dict[str, Any], low: float, high: float) -> list[str]:
    if found["chosen"] is None:
        return [f"{_percent(found['pool'])} of the pool is correct; none of the chosen responses is judged."]
    lead = f"Chosen: {_percent(found['chosen'])} correct ({found['num_chosen']:,} judged). Pool: "
    lead += f"{_percent(found['pool'])} ({found['judged']:,} judged)."
    if found["prompts"] < FEW_PROMPTS:
        return [lead, f"{found['prompts']} judged prompts are too few to tell the choice from the pool."]
    if low > 0:
        told = "The choice prefers correct responses"
    elif high < 0:
        told = "The choice prefers wrong responses"
    else:
        told = "The choice cannot be told apart from the pool"
    return [lead, f"{told} (difference {100 * low:+.0f} to {100 * high:+.0f} points, 95 % over prompts)."]


def _difference(correct: IntArray, known: Any, chosen: IntArray, groups: IntArray, seed: int) -> tuple[float, float]:
    """A 95 % interval of the share of correct ones in the choice less that of the pool; a bootstrap over prompts."""
    if not len(chosen):
        return -1.0, 1.0
    pool = np.flatnonzero(known)
    groups = renumbered(groups)
    size = int(groups.max()) + 1

    def sums(rows: IntArray) -> tuple[Any, Any]:
        own = groups[rows]
        return np.bincount(own, weights=correct[rows], minlength=size), np.bincount(own, minlength=size)

    (right, of), (right_chosen, of_chosen) = sums(pool), sums(chosen)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(_DRAWS if size <= 100_000 else 50):
        times = np.bincount(rng.integers(size, size=size), minlength=size)
        if (times @ of) and (times @ of_chosen):
            drawn.append(times @ right_chosen / (times @ of_chosen) - times @ right / (times @ of))
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (-1.0, 1.0)
    return float(low), float(high)


def _recorded(choice: ExplainedPlan) -> list[Policy]:
    """The policies of a recorded plan, where they are the library's or of installed packages.

    An import path that was read from a file is never followed.
    """
    if any(":" in facts.text for facts in choice.policies):
        return []
    try:
        return [policy for facts in choice.policies for policy in parse_policies([facts.text], facts.metrics)]
    except ValueError:
        return []


def _with_filter(scores: Scores, policies: Sequence[Policy], seed: int) -> ExplainedPlan | None:
    """The choice of the same policies among the correct responses; None if they filter already, or leave nothing."""
    if not policies or any(isinstance(policy, KeepCorrect) for policy in policies):
        return None
    assert scores.correct is not None
    try:
        return scores.choose([KeepCorrect(scores.correct, if_none="drop"), *policies], seed=seed)
    except ValueError:
        return None


def _share(correct: IntArray, rows: Any) -> float:
    return float(correct[rows].mean())


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"
