"""`distill-sampler teachers`: the leaderboard in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.report.leaderboard import Leaderboard, cut_note, domain_sentence, rank_domains, rank_teachers
from distill_sampler.report.students import board_facts
from distill_sampler.report.verdict import Estimate


def run(
    path: Path, *, metric: str | None, epoch: int | None, shared: bool, say: Console, **columns: str | None
) -> dict[str, Any]:
    """Print the leaderboard. Returns it as data.

    Args:
        path: a file of `score`, or a run's folder.
        metric: the metric to rank by.
        epoch: the epoch of a run whose scores count; None: the last.
        shared: compare only on prompts that every teacher answered.
        say: where to print.
        columns: the names of the user's columns, as for `Scores.open`.

    Raises:
        ValueError: there is no such file, or no column names the teachers.
    """
    scores = Scores.open(path, **columns)
    board = rank_teachers(scores, metric=metric, epoch=epoch, shared=shared)
    if board is None:
        raise ValueError(
            f"No column of {scores.path} names the teachers. If one does under another name, give it with "
            "--teacher-column; otherwise score again with --teacher-column."
        )
    say.print(_table(board, wide=say.width >= 110), _sentences(board), sep="\n")
    by_domain = rank_domains(scores, metric=metric, epoch=epoch, shared=shared)
    if by_domain:
        say.print(f"\n{domain_sentence(board, by_domain)}\n", markup=False, highlight=False)
        say.print(_domains(board, by_domain))
    domains = {domain: board_facts(own) for domain, own in by_domain.items()}
    return {"scores": scores.path, **board_facts(board), **({"domains": domains} if domains else {})}


def summary(path: Path, say: Console, *, ranked: bool) -> None:
    """Print the end of `score`: the leaderboard without intervals, if `ranked`, and what to run next."""
    try:
        board = rank_teachers(Scores.open(path), draws=0) if ranked else None
    except ValueError as error:  # the scores are written all the same
        say.print(f"[yellow]note:[/] {error}")
        board = None
    if cut := cut_note(Scores.open(path)):
        say.print(f"[yellow]note:[/] {escape(cut)}")
    if board is not None and len(board.lines) > 1:
        say.print(_table(board, wide=say.width >= 110), soft_wrap=False)
    say.print(
        f"\nThe scores are in {path}. Next:\n  distill-sampler teachers {path}\n  distill-sampler report {path}",
        markup=False,
        highlight=False,
    )


def _table(board: Leaderboard, *, wide: bool) -> Table:
    """The leaderboard; on a narrow terminal only the ranking metric shows its interval."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("teacher", overflow="fold", min_width=12)
    first = board.lines[0]
    # the mean surprisal already shows the mean log-probability, with the opposite sign
    others = [name for name in first.scores if name != "global_naturalness" or "mean_surprisal" not in first.parts]
    with_verdict = any(line.correct is not None for line in board.lines)
    headings = [
        "prompts" if wide else "n",
        "tokens",
        *first.parts,
        *others,
        "best",
        *(["correct"] if with_verdict else []),
    ]
    estimated = {*first.parts, *others}
    for heading in headings:
        # headings may wrap, but the numbers under them must not
        table.add_column(
            _heading(heading, wide=wide),
            justify="right",
            overflow="fold",
            min_width=6 if heading in estimated else None,
        )
    for place, line in enumerate(board.lines, 1):
        estimates = {**line.parts, **{name: line.scores[name] for name in others}}
        table.add_row(
            f"{'=' if line.tied else ''}{place}",
            Text(line.teacher, style="bold" if place == 1 else ""),
            f"{line.prompts:,}",
            f"{line.tokens:,.0f}",
            *(_shown(e, board.draws > 0 and (wide or name == board.metric)) for name, e in estimates.items()),
            f"{100 * line.chosen.value:.0f}"
            + (f" ±{100 * line.chosen.half:.0f}" if board.draws and wide else "")
            + " %",
            *(["" if line.correct is None else f"{line.correct:.0%}"] if with_verdict else []),
        )
    return table


def _domains(board: Leaderboard, by_domain: Mapping[str, Leaderboard]) -> Table:
    """The ranking metric of each teacher in each domain, with the best of each domain in bold."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("teacher", overflow="fold", min_width=12)
    cells: dict[str, list[Text]] = {line.teacher: [] for line in board.lines}
    for domain, own in by_domain.items():
        table.add_column(Text(domain), justify="right", overflow="fold", min_width=6)
        found = {line.teacher: line for line in own.lines}
        for teacher, row in cells.items():
            line = found.get(teacher)
            shown = "" if line is None else _shown(line.scores[board.metric], interval=True)
            row.append(Text(shown, style="bold" if line is own.lines[0] else ""))
    for teacher, row in cells.items():
        table.add_row(Text(teacher), *row)
    return table


def _shown(estimate: Estimate, interval: bool) -> str:
    if math.isnan(estimate.value):
        return "–"
    return f"{estimate.value:.3f}" + (f" ±{estimate.half:.3f}" if interval else "")


def _heading(name: str, *, wide: bool) -> str:
    return {
        "mean_rank": "rank",
        "mean_surprisal": "surprisal" if wide else "nats",
        "rank_surprisal_ratio": "RSR ↓",
        "global_naturalness": "global nat. ↑",
        "local_naturalness": "local nat. ↑",
    }.get(name, name.replace("_", " "))


def _sentences(board: Leaderboard) -> Text:
    better = "higher" if board.higher_is_better else "lower"
    text = Text(f"Ranked by {board.metric.replace('_', ' ')}; {better} is better. ±: half of the 95 % interval over ")
    text.append(
        f"prompts ({board.draws} bootstrap draws). =: cannot be told apart from the first. "
        "n: prompts. rank: mean clipped rank of the teacher's tokens. nats: their mean surprisal. best: share of the "
        "prompts for which the teacher has the best response.\n"
    )
    text.stylize("dim")
    for sentence in board.verdict:
        text.append(f"\n{sentence}")
    for sentence in board.warnings:
        text.append(f"\nwarning: {sentence}", style="yellow")
    return text
