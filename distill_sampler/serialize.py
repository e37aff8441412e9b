"""Arrays and values as JSON and files, and configurations as text that can be compared."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_sampler.protocols import Reader

# ---- Values ----


def described(value: Any) -> str:
    """A metric, a policy or any other configuration as text that is the same in every process.

    Configurations with the same text give the same numbers. A dataclass is written as a user would type it, without
    fields that do not take part in comparisons (a tokenizer, say): `BestOf(metric='rank_surprisal_ratio', …)`. A
    function is written as its name; a lambda or a nested function as its name and a hash of its code. A reader is
    written as its identity, so that two teachers never have the same text.
    """
    if isinstance(value, Reader):
        return f"<{value.identity}>"
    if is_dataclass(value) and not isinstance(value, type):
        given = (f"{each.name}={described(getattr(value, each.name))}" for each in fields(value) if each.compare)
        return f"{type(value).__name__}({', '.join(given)})"
    if isinstance(value, functools.partial):
        return f"partial({described(value.func)}, {described(value.args)}, {described(value.keywords)})"
    if callable(value):
        return _described_function(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{described(key)}: {described(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(described, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    return repr(plain(value))


def plain(value: Any) -> Any:
    """A number of numpy as one of Python."""
    return value.item() if isinstance(value, np.generic) else value


def as_typed(value: Any) -> str:
    """A policy or metric as one would type it, without defaults: `BestOf('rank_surprisal_ratio', per='prompt_id')`.

    A reader among its fields is written by its identity, and what has no text that can be typed, in quotes.
    """
    if not is_dataclass(value) or isinstance(value, type):
        return f"{type(value).__name__}()"
    given = []
    for place, each in enumerate(fields(value)):
        content = plain(getattr(value, each.name))
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if each.compare and (default is MISSING or content != default):
            text = getattr(content, "__qualname__", None) or repr(content)
            if isinstance(content, Reader):
                text = repr(content.identity)
            elif text.startswith("<"):
                text = repr(text)
            given.append(text if place == 0 and not each.kw_only else f"{each.name}={text}")
    return f"{type(value).__name__}({', '.join(given)})"


def _described_function(function: Any) -> str:
    name = str(getattr(function, "__qualname__", None) or type(function).__qualname__)
    code = getattr(function, "__code__", None)
    if code is None or "<" not in name:  # neither a lambda nor a nested function
        return name
    kept = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    content = repr((code.co_code, [c for c in code.co_consts if not hasattr(c, "co_code")], code.co_names, kept))
    return f"{name}#{hashlib.blake2b(content.encode(), digest_size=4).hexdigest()}"


def differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two configurations, in words: `seed: was 0, is now 1`. Empty if nothing differs."""
    return "; ".join(
        f"{name}: was {saved.get(name)!r}, is now {here.get(name)!r}"
        for name in sorted(saved.keys() | here.keys())
        if saved.get(name) != here.get(name)
    )


def digest(state: Mapping[str, Any]) -> str:
    """A hash, 16 hex digits, of JSON values. An entry called `digest` is left out."""
    content = {name: value for name, value in state.items() if name != "digest"}
    return hash_of(json.dumps(content, sort_keys=True).encode())


def hash_of(*contents: bytes | memoryview) -> str:
    """A hash, 16 hex digits, of some bytes."""
    result = hashlib.blake2b(digest_size=8)
    for content in contents:
        result.update(content)
    return result.hexdigest()


# ---- Arrays ----


def packed(value: Any, apart: dict[str, npt.NDArray[Any]] | None = None, name: str = "") -> Any:
    """A tree of JSON values and arrays as JSON.

    Args:
        value: the tree: an array, a JSON value, or a dictionary of trees.
        apart: where to put copies of the arrays, by name. The JSON then has the name and a hash of each. None: the JSON
            holds the arrays, compressed (`pack`), which takes a second and 30 MB for ten million numbers.
        name: prefix of the names.
    """
    if isinstance(value, np.ndarray):
        if apart is None:
            return pack(value)
        apart[name] = narrowed(value)
        return {"array": name, "hash": _hash_of_array(apart[name])}
    if isinstance(value, Mapping):
        return {key: packed(item, apart, f"{name}.{key}" if name else key) for key, item in value.items()}
    return value


def unpacked(value: Any, arrays: Mapping[str, npt.NDArray[Any]] | None = None) -> Any:
    """The tree that `packed` was given. Integers come back with the smallest type that holds them.

    Args:
        value: the JSON.
        arrays: the arrays that it names.

    Raises:
        ValueError: an array is missing or damaged.
    """
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"dtype", "data"}:
        return unpack(value)
    if value.keys() == {"array", "hash"}:
        array = (arrays or {}).get(value["array"])
        if array is None or _hash_of_array(array) != value["hash"]:
            raise ValueError(f"The array '{value['array']}' is {'missing' if array is None else 'damaged'}.")
        return array
    return {key: unpacked(item, arrays) for key, item in value.items()}


def _hash_of_array(array: npt.NDArray[Any]) -> str:
    return hash_of(f"{array.dtype.str} {array.shape}".encode(), np.ascontiguousarray(array).view(np.uint8).data)


def narrowed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy, little-endian, of integers with the smallest type that holds them."""
    dtype = array.dtype
    if dtype.kind == "i":  # indices and steps are mostly small numbers
        low, high = array.min(initial=0), array.max(initial=0)
        kinds = (np.iinfo(kind) for kind in (np.int8, np.int16, np.int32, np.int64))
        dtype = next(kind.dtype for kind in kinds if kind.min <= low and high <= kind.max)
    return array.astype(dtype.newbyteorder("<"))


def pack(array: npt.NDArray[Any]) -> dict[str, str]:
    """An array of numbers as JSON, compressed with zlib.

    The first bytes of all numbers come first, then all second bytes and so on, which compresses better. A plan or the
    scores of a million samples take 3 to 5 MB and a tenth of a second; a constant takes almost nothing.
    """
    array = narrowed(array)
    bytes_in_columns = np.frombuffer(array.tobytes(), np.uint8).reshape(-1, array.itemsize).T.tobytes()
    return {"dtype": array.dtype.str, "data": base64.b64encode(zlib.compress(bytes_in_columns, 1)).decode()}


def unpack(packed: Mapping[str, str]) -> npt.NDArray[Any]:
    """The array that `pack` was given. Integers come back with the smallest type that holds them."""
    dtype = np.dtype(packed["dtype"])
    bytes_in_columns = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), np.uint8)
    return np.frombuffer(bytes_in_columns.reshape(dtype.itemsize, -1).T.tobytes(), dtype).copy()


# ---- Files ----

PREFIX = b"distill_sampler."
"""Prefix of the library's entries in a file's metadata."""


def encode_facts(facts: Mapping[str, Any]) -> dict[bytes, bytes]:
    """Facts as metadata of a file, each as JSON."""
    return {PREFIX + name.encode(): json.dumps(value, default=str).encode() for name, value in facts.items()}


def decode_facts(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The facts in a file's metadata. An entry that is not JSON stays text."""
    facts: dict[str, Any] = {}
    for key, value in (metadata or {}).items():
        if key.startswith(PREFIX):
            text = value.decode(errors="replace")
            try:
                facts[key.removeprefix(PREFIX).decode()] = json.loads(text)
            except ValueError:
                facts[key.removeprefix(PREFIX).decode()] = text
    return facts


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it: readers see all of it or nothing."""
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def require_writable(output: Path, *endings: str) -> None:
    """Check that an output file can be written, before the work and not after it. Creates the file's folder.

    Args:
        output: the file.
        endings: allowed endings of its name.

    Raises:
        ValueError: the name has another ending, is that of a folder, or the file cannot be written.
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
        raise ValueError(f"--output {output} cannot be written ({error.strerror}). Choose another folder.") from None
