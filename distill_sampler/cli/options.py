"""What the commands share: common options, error messages instead of tracebacks, and options from a file."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class OnError(StrEnum):
    """What to do with a row that cannot be used."""

    stop = "stop"
    skip = "skip"


@contextmanager
def refusals() -> Iterator[None]:
    """End a command with the error's message and exit code 1, not a traceback, where the user can correct the error."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Read a command's options from a YAML file. Options on the command line take precedence.

    Raises:
        typer.BadParameter: the file cannot be read, or names an option that the command does not have.
    """
    if path is None:
        return None
    import yaml  # type: ignore[import-untyped]

    try:
        options: Any = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(options, dict):
        raise typer.BadParameter(f"{path} must hold lines of the form 'option: value'.")
    known = {parameter.name for parameter in context.command.params}
    settings = {str(name).replace("-", "_"): value for name, value in options.items()}
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
TeacherColumn = Annotated[str | None, typer.Option(help="Column with the teacher who wrote each response.")]
GroupColumn = Annotated[str | None, typer.Option(help="Column that is equal for rows that answer the same prompt.")]
DomainColumn = Annotated[str | None, typer.Option(help="Column with the kind of task of each prompt.")]
CorrectColumn = Annotated[str | None, typer.Option(help="Column that tells whether each response is correct.")]


TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model, with your permissions. Read the code first.",
    ),
]


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """`"3/64"` as `(3, 64)`.

    Raises:
        ValueError: it is not of this form.
    """
    if text is None:
        return None
    number, slash, of = text.partition("/")
    if not (slash and number.strip().isdecimal() and of.strip().isdecimal()):
        raise ValueError(f"--shard {text}: give the number of the shard and how many there are, such as 3/64.")
    return int(number), int(of)
