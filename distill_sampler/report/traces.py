"""Responses token by token, for reading: prompts where the choice tells most come first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_sampler.artifacts.schema import TRACE_COLUMNS
from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.report.text import rounded, visible
from distill_sampler.types import BoolArray, FloatArray, IntArray

MAX_TRACES = 300
MAX_TRACE_TOKENS = 2000
MAX_TOKENS = 200_000
"""At most this many tokens in all traces together: what a phone can hold."""


def traces(
    scores: Scores,
    columns: Sequence[str],
    numbers: dict[str, FloatArray],
    *,
    chosen: BoolArray,
    reason: Callable[[int], str],
    teachers: IntArray,
    domains: IntArray,
    correct: IntArray,
) -> list[dict[str, Any]]:
    """Prompts with their responses token by token, as many as fit, the most telling first.

    Args:
        scores: the scores; those with tokens have traces.
        columns: the ranking metric's columns, the metric itself last.
        numbers: every number of the metrics, `[samples]` each.
        chosen: `[samples]` whether the choice has it.
        reason: why a row is chosen or not.
        teachers: `[samples]` codes.
        domains: `[samples]` codes.
        correct: `[samples]` 1: correct, 0: incorrect, -1: unknown.
    """
    if not set(TRACE_COLUMNS) <= set(scores.names):
        return []
    prompts: dict[str, dict[str, Any]] = {}
    position, budget, count = 0, MAX_TOKENS, 0
    names = [*TRACE_COLUMNS, *([scores.group] if scores.group else [])]
    with pq.ParquetFile(scores.path) as file:
        for batch in file.iter_batches(batch_size=512, columns=names):
            begin, position = position, position + batch.num_rows
            kept = np.flatnonzero(np.asarray(pc.is_valid(batch["tokens"])))
            for offset in kept.tolist():
                row = begin + offset
                texts = batch["tokens"][offset]
                length = len(texts)
                stop = min(length, MAX_TRACE_TOKENS, budget)
                if stop == 0 or count == MAX_TRACES:
                    break
                budget, count = budget - stop, count + 1
                group = str(batch[scores.group][offset].as_py()) if scores.group else str(row)
                text = visible(batch["prompt_text"][offset].as_py() or "")
                prompt = prompts.setdefault(group, {"group": visible(group, 60), "prompt": text, "items": []})
                prompt["items"].append(
                    {
                        "sample": row,
                        "teacher": int(teachers[row]),
                        "domain": int(domains[row]),
                        "correct": int(correct[row]),
                        "chosen": int(chosen[row]),
                        "reason": reason(row),
                        "scores": {name: rounded(numbers[name][row : row + 1])[0] for name in columns},
                        "tokens": [visible(text or "", 400) for text in _first(texts, stop)],
                        "ranks": _first(batch["token_ranks"][offset], stop),
                        "surprisals": [
                            round(value, 3) if math.isfinite(value) else None
                            for value in _first(batch["token_surprisals"][offset], stop)
                        ],
                        "more": length - stop,
                    }
                )
    metric = columns[-1]
    sign = -1 if scores.metrics[metric].higher_is_better else 1
    for prompt in prompts.values():
        prompt["items"].sort(key=lambda item: sign * (item["scores"][metric] or math.inf * sign))
    return sorted(prompts.values(), key=lambda prompt: _telling(prompt["items"], metric))


def _telling(items: Sequence[dict[str, Any]], metric: str) -> tuple[int, float]:
    """How much a prompt shows of the choice; smaller is more.

    First come prompts where a correct response was chosen over a wrong one, last those where a wrong one was chosen.
    Among equals, those come first whose scores differ most.
    """
    found = [item["scores"][metric] for item in items if item["scores"][metric] is not None]
    gap = max(found) - min(found) if found else 0.0
    chosen = {item["correct"] for item in items if item["chosen"]}
    others = {item["correct"] for item in items if not item["chosen"]}
    if 1 in chosen and 0 in others:
        return 0, -gap
    return (2 if 0 in chosen else 1), -gap


def _first(values: pa.ListScalar, stop: int) -> list[Any]:
    """The first elements, without creating Python objects for the others."""
    found: list[Any] = values.values.slice(0, stop).to_pylist()
    return found
