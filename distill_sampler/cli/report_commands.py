"""The options of `distill-sampler teachers` and `report`; the work is in `teachers.py`, `students.py` and `report/`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill_sampler.cli.options import (
    Config,
    CorrectColumn,
    DomainColumn,
    GroupColumn,
    Json,
    TeacherColumn,
    complete_policies,
    refusals,
)

Scored = Annotated[
    list[Path],
    typer.Argument(help="File that `score` wrote, or the output folder of a run; several to compare students."),
]
Metric = Annotated[str | None, typer.Option(help="Metric to rank by, by its name or a short one (rsr, ln, gn, ifd).")]


def teachers(
    scores: Scored,
    metric: Metric = None,
    teacher_column: TeacherColumn = None,
    group_column: GroupColumn = None,
    domain_column: DomainColumn = None,
    correct_column: CorrectColumn = None,
    epoch: Annotated[
        int | None, typer.Option(help="Epoch of a run whose scores count. By default the last one.")
    ] = None,
    shared_prompts: Annotated[
        bool, typer.Option("--shared-prompts", help="Compare only on prompts that all teachers answered.")
    ] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Rank teachers by the student's scores of their responses; for several students, side by side."""
    with refusals(as_json) as result:
        from rich.console import Console

        from distill_sampler.cli.students import compare
        from distill_sampler.cli.teachers import run

        columns = {"teacher": teacher_column, "group": group_column, "domain": domain_column, "correct": correct_column}
        say = Console(stderr=as_json)
        if len(scores) == 1:
            result.update(run(scores[0], metric=metric, epoch=epoch, shared=shared_prompts, say=say, **columns))
        else:
            result.update(compare(scores, metric=metric, epoch=epoch, shared=shared_prompts, say=say, **columns))


def report(
    source: Scored,
    output: Annotated[Path, typer.Option(help="HTML file to write; it needs no network.")] = Path("report.html"),
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Policy whose choice is shown. By default the run's, or the best of each prompt.",
            autocompletion=complete_policies,
        ),
    ] = None,
    metric: Metric = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    teacher_column: TeacherColumn = None,
    group_column: GroupColumn = None,
    domain_column: DomainColumn = None,
    correct_column: CorrectColumn = None,
    seed: Annotated[int, typer.Option(help="Seed of the policies.")] = 0,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Draw the scores as one HTML page: teachers, distributions, what was chosen, and traces token by token.

    For several students, each gets a page of its own, and the output compares them and links to these.
    """
    with refusals(as_json) as result:
        from distill_sampler.artifacts.scorefile import Scores
        from distill_sampler.report.page import write_report
        from distill_sampler.report.students import named_pages, write_comparison
        from distill_sampler.specs import parse_policies

        columns = {"teacher": teacher_column, "group": group_column, "domain": domain_column, "correct": correct_column}
        pages = [output] if len(source) == 1 else named_pages(source, output)
        for path, page in zip(source, pages, strict=True):
            scores = Scores.open(path, **columns)
            chosen = parse_policies(policy or [], scores.metrics)
            write_report(scores, page, title=title, policies=chosen, seed=seed, metric=metric)
        if len(source) > 1:
            write_comparison(source, pages, output, title=title, metric=metric, **columns)
        result.update(output=output, bytes=output.stat().st_size, pages=pages)
        typer.echo(f"Wrote {output} ({output.stat().st_size / 1e6:.1f} MB). Open it in a browser.", err=as_json)
