"""`distill-sampler merge`: joins files of scores into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from distill_sampler.artifacts.merging import merge_scores
from distill_sampler.serialize import require_writable


def run(files: Sequence[Path], output: Path, *, overwrite: bool) -> int:
    """Join files of scores.

    Args:
        files: the files, or folders of them.
        output: the file to write.
        overwrite: replace the output if it exists.

    Returns:
        How many rows it has.

    Raises:
        ValueError: a file cannot be read, the files do not fit together, or the output exists.
    """
    require_writable(output, ".parquet")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists. Give another --output, or --overwrite.")
    rows = merge_scores(files, output)
    Console(stderr=True, soft_wrap=True).print(f"Wrote {output} with the scores of {rows:,} candidates.", markup=False)
    return rows
