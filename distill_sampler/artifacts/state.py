"""The curriculum's state in a checkpoint: JSON with a version and a hash, and a file beside it with the arrays.

The JSON has a hash of each array, so the two files need not be written at the same moment. If one of them is missing or
belongs to another checkpoint, both are refused.
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
"""Name of the file in a checkpoint folder that holds the arrays."""

Arrays = Mapping[str, npt.NDArray[Any]]


def as_state(content: Mapping[str, Any], arrays: dict[str, npt.NDArray[Any]] | None = None) -> dict[str, Any]:
    """A state as JSON, with its version and hash.

    Args:
        content: dictionaries of JSON values and arrays.
        arrays: a dictionary that the arrays are added to. None: they are compressed into the JSON.
    """
    state = packed({"version": STATE_VERSION, **content}, arrays)
    return {**state, "digest": digest(state)}


def content_of(state: Mapping[str, Any], arrays: Arrays | None = None) -> dict[str, Any]:
    """The content that was given to `as_state`, after the hashes have been checked.

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
    """Write the arrays of a state into the checkpoint folder.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ARRAYS, save(arrays))


def read_arrays(folder: Path) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays of a state from the checkpoint folder; empty if there is no file.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return load((folder / ARRAYS).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, safetensors.SafetensorError, KeyError) as error:  # KeyError: a dtype that NumPy lacks
        raise ValueError(f"{ARRAYS} cannot be read ({error}).") from None
