"""The command line, `distill-sampler`. Heavy imports wait until a command runs, so that `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Train a student on the traces that it can learn from.",
)


@app.callback()
def main() -> None:
    """Train a student on the traces that it can learn from."""


@app.command()
def demo(
    prompts: Annotated[int, typer.Option(min=1, help="Competition problems, four teachers' traces each.")] = 12,
    max_length: Annotated[
        int, typer.Option(min=64, help="Tokens of prompt and trace; problems with longer traces are left out.")
    ] = 640,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs; the student scores all traces before each.")] = 2,
    output: Annotated[Path, typer.Option(help="Folder for the model, scores, plans and picture.")] = Path(
        "distill-sampler-demo"
    ),
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of a LoRA.")] = False,
    seed: Annotated[int, typer.Option(help="Of the plans and the training.")] = 0,
) -> None:
    """Fine-tune a small student on real traces of four teachers, choosing anew before each epoch.

    Real input, small enough for two CPU cores: SmolLM2-135M-Instruct learns competition mathematics from GPT-3.5,
    GPT-4, GPT-4 Turbo and PaLM 2. For each problem it trains on the trace with the best Rank-Surprisal Ratio.
    """
    from distill_sampler.cli.demo import run

    try:
        run(prompts=prompts, max_length=max_length, epochs=epochs, output=output, full=full, seed=seed)
    except ValueError as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
