"""What the demo shows at its end: is what was chosen correct, against chance, and what the student learnt."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from distill_sampler import KeepCorrect
from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.cli.demo_parts import experts_on_right_answers
from distill_sampler.protocols import Policy
from distill_sampler.types import IntArray

RSR = "rank_surprisal_ratio"
DRAWS = 200
"""So many times the control draws."""


def show(say: Console, scores: Scores, rows: Dataset, *, best: Policy, control: Policy) -> None:
    """Print the share of right answers among what was chosen, its controls, and the problem that tells most.

    Args:
        say: where to print.
        scores: the run's scores; its rows are those of `rows`.
        rows: the candidates, with `correct` and `wrong_step`.
        best: the policy that chose.
        control: random traces with the same mixture of teachers.
    """
    right = np.array(rows["correct"], bool)
    first = scores.numbers(epoch=0)[RSR]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("traces with the first epoch's scores")
    for heading in ("number", "right answers", "mean RSR"):
        table.add_column(heading, justify="right")

    def add(name: str, chosen: IntArray) -> None:
        share = f"{right[chosen].sum()} of {len(chosen)}, {right[chosen].mean():.0%}"
        table.add_row(name, str(len(chosen)), share, f"{first[chosen].mean():.2f}")

    add("all candidates", np.arange(len(rows)))
    chosen = scores.choose([best], epoch=0).plan.indices
    add("chosen: lowest RSR of each problem", chosen)
    correct_first = [KeepCorrect("correct", if_none="drop"), best]
    add("KeepCorrect, then lowest RSR", scores.choose(correct_first, epoch=0).plan.indices)
    drawn = [scores.choose([control], seed=seed, epoch=0).plan.indices for seed in range(DRAWS)]
    shares = np.array([right[indices].mean() for indices in drawn])
    low, high = np.quantile(shares, [0.05, 0.95])
    table.add_row(
        "control: random, same teachers",
        str(len(chosen)),
        f"{shares.mean():.0%} ({low:.0%} to {high:.0%})",
        f"{np.mean([first[indices].mean() for indices in drawn]):.2f}",
    )
    say.print(table)
    wrong, read = experts_on_right_answers()
    say.print(
        f"No score knows whether an answer is right. The control drew {DRAWS} times (90 % of the draws in brackets), "
        f"and {len(chosen)} problems are far too few to tell the choice from it. Right means that the trace's summary "
        f"gives the problem's answer; in this data set, experts saw a wrong step in {wrong} of the {read} traces with "
        "a right answer that they read.\n"
    )
    _show_problem(say, rows, scores, chosen, first)


def _show_problem(say: Console, rows: Dataset, scores: Scores, chosen: IntArray, first: Any) -> None:
    """Print the chosen and the last trace of one problem: where a right one was chosen over a wrong one, if any."""
    groups: dict[str, list[int]] = {}
    for index, prompt_id in enumerate(rows["prompt_id"]):
        groups.setdefault(prompt_id, []).append(index)

    def telling(group: list[int]) -> tuple[bool, float]:
        best, *_, last = sorted(group, key=lambda index: float(first[index]))
        contrast = bool(rows[best]["correct"] and not rows[last]["correct"])
        return contrast, float(first[last] - first[best])

    group = max(groups.values(), key=telling)
    order = sorted(group, key=lambda index: float(first[index]))
    numbers = scores.numbers(epoch=0)
    tokens = scores.integers("num_tokens", epoch=0)
    assert tokens is not None
    problem = rows[order[0]]["prompt"][1]["content"].split("\n\n", 1)[-1]
    say.print(Panel(Text(textwrap.shorten(problem, 400)), title="one problem, and what the student makes of it"))
    for index, place in ((order[0], "chosen: lowest RSR of the four"), (order[-1], "last of the four")):
        row = rows[index]
        figures = (
            f"RSR {first[index]:.2f} = mean clipped rank {numbers['mean_rank'][index]:.2f} / "
            f"mean surprisal {numbers['mean_surprisal'][index]:.2f} nats, {tokens[index]} tokens"
        )
        judged = "right answer" if row["correct"] else "wrong answer"
        if row["wrong_step"] is not None:
            judged += ", and no wrong step" if row["wrong_step"] < 0 else ", and a wrong step"
            judged += " (an expert read it)"
        excerpt = textwrap.shorten(row["completion"][0]["content"], 420)
        say.print(Panel(Text(excerpt), title=f"{row['teacher']}, {place}; {judged}", subtitle=figures))
    say.print(
        "A low ratio means that the student did not expect the tokens (high surprisal: there is something to learn), "
        "but ranked them near the top (low rank: they are within reach).\n"
    )


def show_losses(say: Console, losses: Mapping[str, float]) -> None:
    """Print the held-out losses."""
    if any(math.isnan(loss) for loss in losses.values()):
        return
    told = "; ".join(f"{loss:.3f} {when}" for when, loss in losses.items())
    say.print(f"Held-out right traces, mean NLL in nats a token: {told}.")
    if len(losses) == 2:
        say.print("[dim]--control trains a second student on the control's traces, to compare.[/]")
    say.print()
