"""What the commands have in common: options that several take, refusals in one sentence, options from a file."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class OnError(StrEnum):
    """What to do about a row that cannot be used."""

    stop = "stop"
    skip = "skip"


@contextmanager
def refusals() -> Iterator[None]:
    """What users can put right ends a command with one sentence and exit code 1, not with a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take a command's options from a YAML file; what is typed wins.

    Raises:
        typer.BadParameter: it is no such file, or has names that the command does not know.
    """
    if path is None:
        return None
    import yaml  # type: ignore[import-untyped]

    try:
        told: Any = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(told, dict):
        raise typer.BadParameter(f"{path} must hold 'name: value' lines, with the names of the options.")
    known = {parameter.name for parameter in context.command.params}
    settings = {str(name).replace("-", "_"): value for name, value in told.items()}
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, [str(other) for other in known], n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise typer.BadParameter(f"{path}: there is no option '{name}'.{hint}")
    context.default_map = {**(context.default_map or {}), **settings}
    return path


Config = Annotated[
    Path | None,
    typer.Option("--config", is_eager=True, callback=_read_config, help="YAML file with options, by the same names."),
]
TeacherColumn = Annotated[str | None, typer.Option(help="Column that says who wrote a response.")]
GroupColumn = Annotated[str | None, typer.Option(help="Column that says which rows answer the same prompt.")]
DomainColumn = Annotated[str | None, typer.Option(help="Column that says what kind of task a prompt is.")]
CorrectColumn = Annotated[str | None, typer.Option(help="Column that says whether a response is correct.")]


TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the Python code that the model brings, with your rights. Read it first."
    ),
]
