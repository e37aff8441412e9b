"""`distill-sampler teachers` for several students: their rankings of the same teachers in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill_sampler.report.students import board_facts, notes_of, shown_in, students_of, teachers_of


def compare(paths: Sequence[Path], *, say: Console, **how: Any) -> dict[str, Any]:
    """Print a line for each teacher with a column for each student. Returns the rankings as data.

    Args:
        paths: files of `score`, or folders of runs.
        say: where to print.
        how: metric, epoch, shared and columns, as for `students_of`.

    Raises:
        ValueError: a file has no scores, does not name teachers, or lacks the metric.
    """
    students = students_of(paths, **how)
    board = students[0].board
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("teacher", overflow="fold", min_width=12)
    for student in students:
        table.add_column(Text(student.name), justify="right", overflow="fold", min_width=12)
    for teacher in teachers_of(students):
        cells = (shown_in(student, teacher) for student in students)
        table.add_row(Text(teacher), *(Text(shown, style="bold" if first else "") for shown, first in cells))
    say.print(table)
    better = "higher" if board.higher_is_better else "lower"
    say.print(
        f"By {board.metric.replace('_', ' ')}; {better} is better. ±: half of the 95 % interval over prompts. Bold: "
        "the first for a student. =: cannot be told apart from it.",
        style="dim",
    )
    for note in notes_of(students):
        say.print(f"\n{note}", markup=False, highlight=False)
    facts = [{"student": each.name, "scores": each.path, **board_facts(each.board)} for each in students]
    return {"students": facts, "notes": notes_of(students)}
