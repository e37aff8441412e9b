"""What the commands share: common options, error messages instead of tracebacks, and options from a file."""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from distill_sampler import _HOME_OF


class OnError(StrEnum):
    """What to do with a row that cannot be used."""

    stop = "stop"
    skip = "skip"


@contextmanager
def refusals(as_json: bool = False, *, code: int = 1) -> Iterator[dict[str, Any]]:
    """End a command with the error's message and an exit code, not a traceback, where the user can correct the error.

    Gives a dictionary for the command's result. With `--json` it is printed at the end, as one JSON object on stdout;
    after an error, that object has only `"error"`.

    Args:
        as_json: the command's `--json`.
        code: the exit code after an error.
    """
    result: dict[str, Any] = {}
    try:
        # what libraries print on stdout goes to stderr, so that the object is all there is
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            yield result
    except (ValueError, OSError) as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        if as_json:
            _print_json({"error": str(error)})
        raise typer.Exit(code) from error
    if as_json:
        _print_json(result)


def _print_json(result: Any) -> None:
    if os.environ.get("RANK", "0") == "0":  # under `accelerate launch`, the first process speaks
        typer.echo(json.dumps(_plain(result), ensure_ascii=False, indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """The value as JSON can have it: paths as text, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


def complete_metrics(incomplete: str) -> list[str]:
    """What may follow in a list of metrics, for the shell's completion. Loads none of them."""
    *before, last = incomplete.split(",")
    beginning = "".join(f"{each}," for each in before)
    return [beginning + name for name in [*_public("metrics"), "rsr", "ln", "gn", "ifd"] if name.startswith(last)]


def complete_policies(incomplete: str) -> list[str]:
    """The policies that a word may become, for the shell's completion."""
    return [name for name in _public("policies") if name.startswith(incomplete)]


def _public(package: str) -> list[str]:
    """The public names that a package of the library offers."""
    return sorted(name for name, module in _HOME_OF.items() if module.partition(".")[0] == package)


Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one JSON object on stdout. Messages go to stderr."),
]


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
