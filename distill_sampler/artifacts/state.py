"""The curriculum's state in a checkpoint: JSON with a version and a hash, and its arrays in a file beside it.

The JSON has a hash of each array. So JSON and file may be written one after the other: without the other, or with that
of another checkpoint, neither is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
from safetensors.numpy import load, save

from distill_sampler.serialize import digest, packed, unpacked, write_atomically

STATE_VERSION = 6

ARRAYS = "distill_sampler.safetensors"
"""The file in a checkpoint folder that has the arrays."""

Arrays = Mapping[str, npt.NDArray[Any]]


def as_state(content: Mapping[str, Any], arrays: dict[str, npt.NDArray[Any]] | None = None) -> dict[str, Any]:
    """A state as JSON, with version and hash.

    Args:
        content: JSON values and arrays, in dictionaries.
        arrays: where to put the arrays. None: into the JSON, compressed.
    """
    state = packed({"version": STATE_VERSION, **content}, arrays)
    return {**state, "digest": digest(state)}


def content_of(state: Mapping[str, Any], arrays: Arrays | None = None) -> dict[str, Any]:
    """What `as_state` was given, once it is known to be whole.

    Raises:
        ValueError: the state or an array is damaged, or the state has another version.
    """
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"The curriculum's state has version {state.get('version')}, but this distill_sampler reads version "
            f"{STATE_VERSION}. Resume with the distill_sampler that wrote it."
        )
    damage = "Its content does not match its hash." if state.get("digest") != digest(state) else ""
    try:
        content: dict[str, Any] = {} if damage else unpacked(state, arrays)
    except ValueError as error:
        damage = str(error)
    if damage:
        raise ValueError(f"The curriculum's state is damaged. {damage} Resume from another checkpoint.")
    return content


def write_arrays(arrays: dict[str, npt.NDArray[Any]], folder: Path) -> None:
    """Write the arrays of a state beside it.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ARRAYS, save(arrays))


def read_arrays(folder: Path) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays beside a state; none if there is no file.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return load((folder / ARRAYS).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, safetensors.SafetensorError, KeyError) as error:  # KeyError: a type that numpy does not have
        raise ValueError(f"{ARRAYS} cannot be read ({error}).") from None
