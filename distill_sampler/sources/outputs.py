"""Where results go: a place that cannot be written is refused before the work, not after it."""

from __future__ import annotations

import os
from pathlib import Path


def require_writable(output: Path, *endings: str) -> None:
    """Make the folder of a file that is about to be written, and try to write there.

    Args:
        output: the file.
        endings: what its name may end in.

    Raises:
        ValueError: it has another ending, is a folder, or cannot be written.
    """
    if output.is_dir():
        example = output / f"{output.name}{endings[0]}"
        raise ValueError(f"--output {output} is a folder; give the name of a file in it, such as {example}.")
    if not output.name.endswith(endings):
        raise ValueError(f"--output {output}: give a name that ends in {' or '.join(endings)}.")
    probe = output.with_name(f".{output.name}.{os.getpid()}.probe")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output {output} cannot be written ({error.strerror}); choose another place.") from None
