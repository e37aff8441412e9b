"""Soft targets from a store: the most probable tokens of a teacher that was read once, before training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from distill_sampler.dataset import ScoredDataset
from distill_sampler.engines.stored_teacher import StoredTeacher
from distill_sampler.metrics.second_model import response_text
from distill_sampler.objectives.divergence import Cells, Targets
from distill_sampler.types import Batch, FloatArray, IntArray, Sample

logger = logging.getLogger(__name__)

Tail = Literal["renormalise", "bucket"]


class StoredTargets:
    """The stored predictions of a teacher for the response tokens of a batch.

    Args:
        store: the teacher's log-probabilities, with the most probable tokens at each position.
        dataset: the data set that is trained on.
        tokenizer: the student's.
        temperature: the temperature of the soft targets.
        tail: what becomes of the probability of all other tokens; see `SoftTargets.tail`.

    Raises:
        ValueError: the store has no most probable tokens, or its temperature does not allow this tail.
    """

    def __init__(
        self, store: StoredTeacher, dataset: ScoredDataset, tokenizer: object, *, temperature: float, tail: Tail
    ) -> None:
        if not store.top_k:
            raise ValueError(
                f"SoftTargets(teacher='{store.path}'): the store has no most probable tokens. Make it again with "
                "distill-sampler teacher-logprobs --top-k 32."
            )
        self.stored_at = float(store.facts.get("temperature") or 1.0)
        """The temperature of the stored log-probabilities."""
        if tail == "bucket" and self.stored_at != temperature:
            raise ValueError(
                f"SoftTargets(temperature={temperature}, tail='bucket'): the store has probabilities at temperature "
                f"{self.stored_at}, which do not say how much all other tokens have at another one. Use temperature="
                f"{self.stored_at}, or tail='renormalise'."
            )
        self._store = store
        self._dataset = dataset
        self._tokenizer = tokenizer
        self._temperature = temperature
        self._tail = tail
        self._covered = np.zeros(2)
        """The probability of the stored tokens, summed over positions, and the positions, since the last report."""

    def check(self, candidates: IntArray, columns: int) -> None:
        """Look up every candidate once, before training.

        Args:
            candidates: samples that may be trained on.
            columns: how many columns the student's output head has.

        Raises:
            ValueError: a candidate has no targets in the store, or the teacher has another vocabulary.
        """
        missing, highest = [], -1
        for sample in self._samples(candidates):
            found = self._find(sample)
            if found is None:
                missing.append(sample.index)
            else:
                highest = max(highest, int(found[0].max(initial=-1)))
        if missing:
            raise ValueError(
                f"SoftTargets(teacher='{self._store.path}'): {len(missing)} of {len(candidates)} samples (first: "
                f"sample {missing[0]}) have no targets, because the store lacks the response or has other tokens for "
                "it than the student. Make the store from this data with a teacher that has the student's tokenizer, "
                "or leave these samples out of the data set."
            )
        if highest >= columns:
            raise ValueError(
                f"SoftTargets(teacher='{self._store.path}'): the teacher predicts tokens beyond the student's "
                f"{columns}, so it has another vocabulary. Use a store of a teacher with the student's tokenizer."
            )

    def of(self, batch: Batch, device: torch.device) -> tuple[IntArray, Targets]:
        """The flat positions that predict a batch's response tokens, ascending, and the teacher's predictions there."""
        places, ids, log_probs = [], [], []
        for start, sample in zip(batch.starts, self._samples(batch.samples), strict=True):
            found = self._find(sample)
            assert found is not None, "every candidate was looked up before training"
            places.append(start + np.flatnonzero(sample.scored) - 1)
            ids.append(found[0])
            log_probs.append(found[1])
        stored = np.concatenate(log_probs)
        self._covered += np.exp(stored).sum(dtype=np.float64), len(stored)
        cells = self._cells(torch.from_numpy(stored).to(device))
        tokens = torch.from_numpy(np.concatenate(ids)).to(device)

        def targets(start: int, stop: int) -> Cells:
            return Cells(log_probs=cells[start:stop], ids=tokens[start:stop])

        return np.concatenate(places), targets

    def coverage(self) -> tuple[float, float]:
        """Of the positions since the last call: the summed share of the teacher's probability that is stored, and their
        number."""
        share, positions = self._covered.tolist()
        self._covered[:] = 0
        return share, positions

    def _cells(self, log_probs: Tensor) -> Tensor:
        """`[positions, k + 1]` log-probabilities of the stored tokens and all others, at the targets' temperature."""
        if self._tail == "bucket":
            rest = torch.log1p(-log_probs.exp().sum(1, keepdim=True).clamp(max=1 - 1e-6))
            return torch.log_softmax(torch.cat([log_probs, rest], 1), 1)
        tempered = torch.log_softmax(log_probs * (self.stored_at / self._temperature), 1)
        return torch.cat([tempered, torch.full_like(tempered[:, :1], -torch.inf)], 1)

    def _samples(self, indices: IntArray) -> Sequence[Sample]:
        key = self._store.key_column
        return self._dataset.samples(indices, [] if key is None else [key])

    def _find(self, sample: Sample) -> tuple[IntArray, FloatArray] | None:
        """`[tokens, k]` the most probable tokens at the sample's response tokens and their log-probabilities."""
        key = self._store.key_column
        text = "".join(response_text(sample, self._tokenizer).turns)
        found = self._store.find(text, None if key is None else sample.columns[key])
        if found is None or found.top_ids is None or found.top_logprobs is None:
            return None
        if not np.array_equal(found.token_ids, sample.input_ids[sample.scored]):
            return None
        return found.top_ids, found.top_logprobs
