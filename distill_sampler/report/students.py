"""Several students beside one another: which teacher suits which student, as data and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.report.leaderboard import Leaderboard, rank_teachers
from distill_sampler.serialize import require_writable


@dataclass(frozen=True, kw_only=True)
class Student:
    """A student and its ranking of the teachers."""

    name: str
    path: Path
    board: Leaderboard
    content: frozenset[int]
    """The content hashes of the samples that it scored."""


def students_of(
    paths: Sequence[Path],
    *,
    metric: str | None = None,
    epoch: int | None = None,
    shared: bool = False,
    **columns: str | None,
) -> list[Student]:
    """Open files of scores, one for each student, and rank the teachers for each.

    Args:
        paths: files of `score`, or folders of runs.
        metric: the metric to rank by; None: the first file's default.
        epoch: the epoch of runs whose scores count; None: the last.
        shared: compare only on prompts that every teacher answered.
        columns: the names of the user's columns, as for `Scores.open`.

    Raises:
        ValueError: a file has no scores, does not name teachers, or lacks the metric.
    """
    opened = [Scores.open(path, **columns) for path in paths]
    metric = opened[0].metric(metric).name
    found = []
    for path, scores, name in zip(paths, opened, _names(paths, opened), strict=True):
        board = rank_teachers(scores, metric=metric, epoch=epoch, shared=shared)
        if board is None:
            raise ValueError(f"No column of {path} names the teachers. Give its name with --teacher-column.")
        content = frozenset(scores.hashes(epoch=epoch).tolist())
        found.append(Student(name=name, path=path, board=board, content=content))
    return found


def _names(paths: Sequence[Path], opened: Sequence[Scores]) -> list[str]:
    """The students' names: their models', with the files' names where several have the same."""
    models = [str(scores.about()["model"] or path.stem) for scores, path in zip(opened, paths, strict=True)]
    names = [
        model if models.count(model) == 1 else f"{model} ({path})" for model, path in zip(models, paths, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{name} {place}" for place, name in enumerate(names, 1)]


def notes_of(students: Sequence[Student]) -> list[str]:
    """What the reader of a comparison must know."""
    first, *others = students
    notes = [
        f"{other.name} scored other samples than {first.name} "
        f"({len(first.content & other.content):,} of {len(first.content | other.content):,} are the same), so a "
        "difference between the two may come from the data."
        for other in others
        if other.content != first.content
    ]
    firsts = {student.name: student.board.lines[0].teacher for student in students}
    if len(set(firsts.values())) == 1:
        notes.insert(0, f"{firsts[first.name]} is first for each of the {len(students)} students.")
    else:
        each = ", ".join(f"{teacher} for {name}" for name, teacher in firsts.items())
        notes.insert(0, f"The first teacher depends on the student: {each}.")
    return notes


def teachers_of(students: Sequence[Student]) -> list[str]:
    """All teachers, those that suit the first student first."""
    return list(dict.fromkeys(line.teacher for student in students for line in student.board.lines))


def board_facts(board: Leaderboard) -> dict[str, Any]:
    """A leaderboard as data for other programs. Intervals cover 95 %."""
    return {
        "metric": board.metric,
        "higher_is_better": board.higher_is_better,
        "prompts": board.prompts,
        "teachers": [
            {
                "teacher": line.teacher,
                "responses": line.samples,
                "prompts": line.prompts,
                "tokens": line.tokens,
                "scores": {name: vars(estimate) for name, estimate in {**line.parts, **line.scores}.items()},
                "best_share": vars(line.chosen),
                "correct": line.correct,
                "tied_with_first": line.tied,
            }
            for line in board.lines
        ],
        "verdict": list(board.verdict),
        "warnings": list(board.warnings),
    }


def named_pages(sources: Sequence[Path], output: Path) -> list[Path]:
    """The file of each student's own page beside the output: `report-1-scores.html` for `report.html`."""
    return [
        output.with_name(f"{output.stem}-{number}-{path.resolve().stem}{output.suffix}")
        for number, path in enumerate(sources, 1)
    ]


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
.first { font-weight: 700; }
small { opacity: .7; }
"""


def write_comparison(
    sources: Sequence[Path], pages: Sequence[Path], output: Path, *, title: str | None = None, **how: Any
) -> Path:
    """Write a page that compares students and links to the page of each. It runs no script.

    Args:
        sources: files of `score`, or folders of runs.
        pages: the page of each, in the output's folder.
        output: the HTML file to write.
        title: title of the page.
        how: metric and columns, as for `students_of`.

    Raises:
        ValueError: the students cannot be compared, or the page cannot be written.
    """
    require_writable(output, ".html", ".htm")
    students = students_of(sources, **how)
    board = students[0].board
    heads = "".join(
        f'<th><a href="{escape(page.name)}">{escape(student.name)}</a></th>'
        for student, page in zip(students, pages, strict=True)
    )
    rows = "".join(
        f"<tr><td>{escape(teacher)}</td>{''.join(_cell(student, teacher) for student in students)}</tr>"
        for teacher in teachers_of(students)
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in notes_of(students))
    what = f"{board.metric.replace('_', ' ')}, {'higher' if board.higher_is_better else 'lower'} is better"
    heading = escape(title or f"{len(students)} students read {len(teachers_of(students))} teachers")
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{_STYLE}</style></head><body>
<h1>{heading}</h1>{notes}
<div><table><thead><tr><th>{escape(what)}</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>
<p><small>±: half of the 95 % interval over prompts. Bold: the first teacher of a student; =: cannot be told apart from
it. A student's name leads to its own page.</small></p>
</body></html>
"""
    output.write_text(page, encoding="utf-8")
    return output


def _cell(student: Student, teacher: str) -> str:
    shown, first = shown_in(student, teacher)
    return f'<td class="first">{shown}</td>' if first else f"<td>{shown}</td>"


def shown_in(student: Student, teacher: str) -> tuple[str, bool]:
    """A teacher's score for a student with its interval, and whether that teacher is the first."""
    for place, line in enumerate(student.board.lines):
        if line.teacher == teacher:
            estimate = line.scores[student.board.metric]
            return f"{'=' if line.tied else ''}{estimate.value:.3f} ±{estimate.half:.3f}", place == 0
    return "–", False
