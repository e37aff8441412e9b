"""`distill-sampler score`: scores a data set with a student, and writes one row of numbers for each candidate.

The data is split into chunks (`rows/chunks.py`). Each chunk is scored (`rows/job.py`), becomes a table
(`rows/tables.py`) and is saved; at the end the tables are joined into one file (`artifacts/score_output.py`). What can
be refused without the model is refused before it is loaded.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from distill_sampler.artifacts.score_output import Origin, ScoreOutput
from distill_sampler.contract import checked_metrics
from distill_sampler.distributed import Ranks
from distill_sampler.integrations.loading import pick_device, pick_dtype
from distill_sampler.integrations.rows import RowScorer, intake_of
from distill_sampler.integrations.student import RowOptions, Student
from distill_sampler.reading.reduce import extras_of
from distill_sampler.serialize import require_writable
from distill_sampler.sources.files import Sources
from distill_sampler.specs import parse_metrics

SUMMARY_ROWS = 200_000
"""How many rows the final summary ranks at most. Ranking keeps all scores in memory; `teachers` ranks longer files."""


def run(
    data: Sequence[str],
    *,
    model: str,
    output: Path,
    metrics: str,
    options: RowOptions,
    split: str = "train",
    subset: str | None = None,
    rank_clip: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score the data, and write the scores to a file. Returns the counts.

    Args:
        data: paths, and names of data sets on the hub.
        model: the student: a folder, or the name of a model on the hub.
        output: Parquet file for the scores. A shard's file has its number in the name.
        metrics: metrics as users type them.
        options: how rows are read and scored.
        split: split of a saved data set, or of one on the hub.
        subset: subset of a data set on the hub.
        rank_clip: the largest rank that Rank-Surprisal Ratio counts; None: its default.
        overwrite: discard scores that the output holds already.

    Raises:
        ValueError: an option, the data or the model cannot be used; the message names it and the cure.
    """
    quiet()
    device = pick_device(options.device)
    ranks = join(device)
    say = Console(stderr=True, quiet=ranks.rank > 0, soft_wrap=True)
    # first, everything that can be refused without the model
    sources = Sources(data, split=split, subset=subset)
    found = list(checked_metrics(parse_metrics(metrics, rank_clip=rank_clip)).values())
    extras_of(found)
    require_writable(output, ".parquet")
    if options.shard is not None:
        output = shard_file(output, *options.shard)
    pick_dtype(options.dtype, device)
    intake = intake_of(sources, found, options, say=say, kept="The scores so far are kept.")
    kept: list[ScoreOutput] = []

    def opened(origin: Callable[[], Origin]) -> ScoreOutput:
        kept.append(ScoreOutput(output, origin, overwrite=overwrite, ranks=ranks))
        return kept[0]

    job = RowScorer(Student(model, None, options), found, options, say=say).job(
        intake,
        opened,
        split=split,
        subset=subset,
        paths=[str(Path(name).resolve()) if Path(name).exists() else name for name in data],
    )
    if kept[0].complete:
        say.print(f"{output} already holds this model's scores of this data; nothing to do.")
        if ranks.rank == 0 and not kept[0].origin.sure_of_data:
            say.print("  The hub did not say whether the data has changed since. To score it again, use --overwrite.")
    else:
        job.run()
    if options.shard is not None:
        say.print(f"The scores of this shard are in {output}. Join all shards with `distill-sampler merge`.")
    elif ranks.rank == 0:
        _show(output, say)
    return {"output": output, "model": model, "metrics": [metric.name for metric in found], **job.counts()}


def shard_file(output: Path, number: int, of: int) -> Path:
    """The file of a shard: `scores-03-of-64.parquet` for `scores.parquet`."""
    return output.with_name(f"{output.stem}-{number:0{len(str(of))}d}-of-{of}{output.suffix}")


def quiet() -> None:
    """Silence what libraries say about one another and about loading a model."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def join(device: torch.device) -> Ranks:
    """Join the processes of `accelerate launch`, if there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState  # type: ignore[import-untyped]

        PartialState(cpu=device.type == "cpu")
    return Ranks.current(device)


def _show(output: Path, say: Console) -> None:
    from distill_sampler.cli.teachers import summary

    summary(output, say, ranked=pq.read_metadata(output).num_rows <= SUMMARY_ROWS)
