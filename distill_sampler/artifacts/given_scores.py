"""Scores that were computed before training, by `distill-sampler score` or `score_rows`: a run's first pass.

They are taken only if the student would give the same numbers now: if the file was made with the same weights, the same
numerics and the same metrics. Samples are found by a hash of their tokens, so the order of the data and rows that were
left out do not matter.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from distill_sampler.artifacts.passes import missing_column
from distill_sampler.artifacts.run_folder import schema_of
from distill_sampler.dataset import ScoredDataset
from distill_sampler.policies.keys import first_of_each
from distill_sampler.protocols import Metric
from distill_sampler.reading.reduce import columns_of
from distill_sampler.serialize import decode_facts, described, differences
from distill_sampler.types import FloatArray, IntArray

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """The scores of some samples."""

    indices: IntArray
    """`[n]` the samples."""
    columns: Mapping[str, FloatArray]
    """By column, `[n]` float32."""
    missing: Mapping[str, IntArray]
    """By metric, `[n]` why a sample has no score (`Missing`)."""


def find_scores(
    path: Path,
    dataset: ScoredDataset,
    indices: IntArray,
    metrics: Sequence[Metric],
    *,
    weights: str,
    numerics: Mapping[str, str],
) -> Found:
    """The scores of a file that belong to these samples. Logs how many samples have none.

    Args:
        path: the file.
        dataset: the data set.
        indices: `[n]` the samples that need scores.
        metrics: the metrics whose scores are needed.
        weights: the hash of the student's weights now (`content_of_weights`).
        numerics: how the student computes now.

    Raises:
        ValueError: the file does not exist, or its scores are not those that the student would give now; the message
            says which part does not fit: the metrics, the weights, the numerics or the data.
    """
    schema = schema_of(path)
    identity = decode_facts(schema.metadata).get("identity")
    if not isinstance(identity, dict) or "scoring_hash" not in schema.names:
        raise ValueError(
            f"scores={path} does not say which student scored it and how. Give a file that `distill-sampler score`, "
            "`score_rows` or `distill-sampler merge` of this version wrote."
        )
    cure = "Score the data again with this student and these settings, or leave scores= out."
    if unknown := [described(metric) for metric in metrics if described(metric) not in identity["metrics"]]:
        raise ValueError(
            f"scores={path} has no {unknown[0]}. Its metrics are {', '.join(identity['metrics'])}. Score with "
            "--metrics as in the curriculum, or leave scores= out."
        )
    if differing := differences(_comparable(identity["numerics"]), _comparable(numerics)):
        raise ValueError(f"scores={path}: the student computes differently now ({differing}). {cure}")
    if identity["weights"] != weights:
        raise ValueError(
            f"scores={path}: the student that scored it had other weights ({identity['weights']}) than the one that is "
            f"trained here ({weights}). {cure}"
        )
    read = [str(name) for name in identity["read"]]
    if lacking := [name for name in read if name not in dataset.column_names]:
        raise ValueError(
            f"scores={path}: its metrics read the column '{lacking[0]}', which the data set does not have, so the "
            f"samples cannot be found in it. {cure}"
        )
    names = columns_of(metrics)
    missing = {metric.name: missing_column(metric.name) for metric in metrics}
    table = pq.read_table(path, columns=["scoring_hash", *names, *missing.values()])
    hashes = table["scoring_hash"].to_numpy()
    order = np.argsort(hashes, kind="stable")
    order = order[first_of_each(hashes[order])]
    wanted = dataset.scoring_hash(read)[indices]
    at = np.minimum(np.searchsorted(hashes[order], wanted), len(order) - 1)
    there = hashes[order[at]] == wanted if len(order) else np.zeros(len(wanted), bool)
    if not there.any():
        raise ValueError(
            f"scores={path}: none of the {len(indices)} samples is in it. It was made from other data, or the same "
            f"data was tokenised differently: there with {_in_words(identity)}. Score what you train on, with the "
            "trainer's max_length as --max-length, or leave scores= out."
        )
    if not there.all():
        logger.warning(
            "%d of %d samples (first: sample %d) are not in %s, which was made with %s. The student scores them now.",
            np.count_nonzero(~there),
            len(indices),
            indices[~there][0],
            path,
            _in_words(identity),
        )
    rows = order[at[there]]
    return Found(
        indices=indices[there],
        columns={name: table[name].to_numpy()[rows] for name in names},
        missing={name: table[column].to_numpy()[rows].astype(np.int64) for name, column in missing.items()},
    )


def _comparable(numerics: Mapping[str, str]) -> dict[str, str]:
    """Numerics without what makes no difference: products in float32 are the same whether the model's own head computes
    them (under FSDP, its shards) or the library."""
    kept = dict(numerics)
    if kept.get("dtype") == "float32" and kept.get("operands") in (None, "float32 × float32"):
        kept.pop("operands", None)
        if kept["head"].startswith("product of"):
            kept["head"] = "float32 product"
    return kept


def _in_words(identity: Mapping[str, Any]) -> str:
    template = "no chat template" if identity["template"] == "plain" else "the model's chat template"
    length = identity["max_length"]
    return f"{template} and {'no max_length' if length is None else f'max_length {length}'}"
