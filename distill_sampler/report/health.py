"""Is the data healthy: truncated, empty, repeated, looping and extreme responses and their scripts, by teacher."""

from __future__ import annotations

import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_sampler.artifacts.schema import TRACE_COLUMNS
from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.types import BoolArray, FloatArray, IntArray

LOOP_RATIO = 0.08
"""Text that compresses below this share of its size is a loop: the limit of `DropDegenerate`."""
EXTREME = 6.0
"""A number is extreme if it is so many robust standard deviations (1.48 × the median absolute deviation) away from the
median of all responses."""
MAX_TEXTS = 20_000
"""At most this many responses are looked at as text, drawn at random."""
_LETTERS = 400
"""The first letters of a response show its script."""

CHECKS = {
    "empty": "no token to score",
    "cut off": "cut off by truncation",
    "loops": f"repeat themselves: the text compresses to less than {LOOP_RATIO:.0%} of its size",
    "duplicates": "have the same tokens as another response, prompt included",
    "extreme": f"score or length is more than {EXTREME:.0f} robust standard deviations from the median",
}
"""What is counted, in words. A check that the file has no numbers for is left out."""


def health(
    scores: Scores, metric: str, numbers: dict[str, FloatArray], teachers: IntArray, names: Sequence[str], seed: int
) -> dict[str, Any]:
    """Counts by teacher, ready for JSON.

    Args:
        scores: the scores.
        metric: the metric that ranks.
        numbers: every number of the metrics, `[samples]` each.
        teachers: `[samples]` codes of the teachers.
        names: their names; empty if the file names none.
        seed: draws the responses whose text is read, if there are more than `MAX_TEXTS`.

    Returns:
        `checks`: by name, what is counted; `flags`: by name, `[samples]` booleans; `rows`: by teacher, the counts;
        `scripts`: by teacher, the scripts of the texts; `read`: how many texts were read; `unknown`: checks that the
        file has no numbers for.
    """
    flags: dict[str, BoolArray] = {}
    tokens, cut = scores.integers("num_tokens"), scores.cut()
    if tokens is not None:
        flags["empty"] = tokens == 0
    if cut is not None:
        flags["cut off"] = cut
    read, loops, scripts = _texts(scores, len(teachers), seed)
    if "compression_ratio" in numbers:
        flags["loops"] = numbers["compression_ratio"] < LOOP_RATIO
    elif len(read):
        flags["loops"] = loops
    if "content_hash" in scores.names:
        _, inverse, counts = np.unique(scores.hashes(), return_inverse=True, return_counts=True)
        flags["duplicates"] = counts[inverse] > 1
    extreme = _extreme(numbers[metric])
    if tokens is not None:
        extreme |= _extreme(np.log(np.maximum(tokens, 1)).astype(np.float32))
    flags["extreme"] = extreme
    told = {check: CHECKS[check] for check in flags}
    if "loops" in flags and "compression_ratio" not in numbers and len(read) < len(teachers):
        told["loops"] += f" (looked for in the {len(read):,} responses whose text is in the file)"
    groups = [(name, teachers == code) for code, name in enumerate(names)] if len(names) > 1 else []
    rows = [
        {
            "teacher": name,
            "responses": int(own.sum()),
            "counts": {check: int((flag & own).sum()) for check, flag in flags.items()},
            "scripts": _shares(scripts, [place for place, row in enumerate(read.tolist()) if own[row]]),
        }
        for name, own in [*groups, ("all", np.ones(len(teachers), bool))]
    ]
    return {
        "checks": told,
        "flags": flags,
        "rows": rows,
        "read": len(read),
        "unknown": [check for check in CHECKS if check not in flags],
    }


def _extreme(values: FloatArray) -> BoolArray:
    """`[samples]` whether a value is far from the median, measured in robust standard deviations."""
    finite = values[np.isfinite(values)]
    if len(finite) < 8:
        return np.zeros(len(values), bool)
    middle = np.median(finite)
    spread = 1.4826 * float(np.median(np.abs(finite - middle)))
    if spread == 0:
        return np.zeros(len(values), bool)
    far: BoolArray = np.nan_to_num(np.abs(values - middle), nan=0.0) > EXTREME * spread
    return far


def _texts(scores: Scores, size: int, seed: int) -> tuple[IntArray, BoolArray, list[str]]:
    """The responses that were read as text, `[samples]` which of them loop, and the script of each that was read."""
    loops = np.zeros(size, bool)
    if not set(TRACE_COLUMNS) <= set(scores.names) or scores.record is not None:
        return np.zeros(0, np.int64), loops, []
    wanted = np.ones(size, bool)
    if size > MAX_TEXTS:
        wanted[:] = False
        wanted[np.random.default_rng(seed).choice(size, MAX_TEXTS, replace=False)] = True
    read: list[int] = []
    scripts: list[str] = []
    position = 0
    with pq.ParquetFile(scores.path) as file:
        for batch in file.iter_batches(batch_size=512, columns=["tokens"]):
            present = np.asarray(pc.is_valid(batch["tokens"]))
            for offset in np.flatnonzero(present & wanted[position : position + batch.num_rows]).tolist():
                text = _joined(batch["tokens"][offset])
                content = text.encode(errors="replace")
                loops[position + offset] = len(content) > 0 and len(zlib.compress(content)) / len(content) < LOOP_RATIO
                read.append(position + offset)
                scripts.append(script_of(text))
            position += batch.num_rows
    return np.array(read, np.int64), loops, scripts


def _joined(tokens: pa.ListScalar) -> str:
    return "".join(text or "" for text in tokens.values.slice(0, 20_000).to_pylist())


def script_of(text: str) -> str:
    """The script that most of the first letters of a text are written in, such as `Latin`; empty without letters."""
    letters = [character for character in text[: 8 * _LETTERS] if character.isalpha()][:_LETTERS]
    found = Counter(unicodedata.name(letter, "OTHER").split()[0] for letter in letters)
    name = found.most_common(1)[0][0].capitalize() if found else ""
    return "Han" if name == "Cjk" else name


def _shares(scripts: Sequence[str], places: Sequence[int]) -> dict[str, float]:
    """The share of each script among some of the texts, the most frequent first."""
    counts = Counter(scripts[place] for place in places if scripts[place])
    total = counts.total()
    return {name: count / total for name, count in counts.most_common(4)}
