"""The scoring passes of a run: which samples to score and when, what a pass cost, and the latest scores."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distill_sampler.artifacts.given_scores import Found, find_scores
from distill_sampler.artifacts.kept_readings import load_readings, save_readings
from distill_sampler.artifacts.passes import score_with_parts
from distill_sampler.dataset import ScoredDataset
from distill_sampler.distributed import Ranks
from distill_sampler.planning.rescore import Clock, Rescore, candidates_to_score
from distill_sampler.planning.summary import ScoringSummary
from distill_sampler.protocols import Metric
from distill_sampler.reading.model_reader import ModelReader
from distill_sampler.reading.readings import Readings
from distill_sampler.reading.reduce import columns_of, data_columns_of
from distill_sampler.reading.scorer import Scorer
from distill_sampler.reading.weights import content_of_weights
from distill_sampler.serialize import described, differences, hash_of
from distill_sampler.store import ScoreStore, ScoringPass
from distill_sampler.types import IntArray, Missing

logger = logging.getLogger(__name__)


class PassRunner:
    """Runs the scoring passes of a run and keeps the latest scores in `store`.

    Args:
        dataset: the data set.
        metrics: the metrics to score, by name.
        candidates: samples that can be scored.
        origin: what the scores belong to.
        rescore: the budget.
        scorer: how the student reads.
        seed: for choosing which samples to score.
        given: a file of scores that were computed before, for the first pass; None: there is none.
    """

    def __init__(
        self,
        dataset: ScoredDataset,
        metrics: Mapping[str, Metric],
        candidates: IntArray,
        origin: Mapping[str, Any],
        *,
        rescore: Rescore,
        scorer: Scorer,
        seed: int,
        given: Path | None = None,
    ) -> None:
        self.dataset = dataset
        self.metrics = metrics
        self.candidates = candidates
        self.rescore = rescore
        self.scorer = scorer
        self.seed = seed
        self.given = given
        self.parts: Path | None = None
        """Folder that keeps the finished blocks of a pass, in case it is interrupted; None: keep nothing."""
        self.readings: Path | None = None
        """Folder that keeps what frozen readers gave, for a resume in another process; None: it is kept in memory."""
        self._readings = Readings()
        self._readings_from: Path | None = None
        """The folder whose readings are in memory."""
        self._reader: ModelReader | None = None
        self.clock = Clock()
        self.store = ScoreStore(
            len(dataset),
            columns_of(metrics.values()),
            origin,
            metrics=list(metrics),
            watched=next(iter(metrics), None),
        )

    def __getstate__(self) -> dict[str, Any]:
        """The attributes to pickle: all but the student."""
        return {**self.__dict__, "_reader": None}

    def without_scores(self) -> PassRunner:
        """A runner with the same settings and no scores. What frozen readers returned is kept."""
        fresh = PassRunner(
            self.dataset,
            self.metrics,
            self.candidates,
            self.store.origin,
            rescore=self.rescore,
            scorer=self.scorer,
            seed=self.seed,
            given=self.given,
        )
        fresh.parts, fresh._reader = self.parts, self._reader
        fresh.readings, fresh._readings, fresh._readings_from = self.readings, self._readings, self._readings_from
        return fresh

    def score(
        self, model: nn.Module, *, epoch: int, step: int, indices: IntArray | None = None
    ) -> tuple[ScoringSummary, ScoringPass | None]:
        """Run one pass; see `Curriculum.score`. Returns its summary, and the pass if anything was measured."""
        reader = self._reader_of(model)
        indices = self.candidates if indices is None else indices
        scoring_pass: ScoringPass | None = None
        first = not self.store.passes
        if self.metrics:
            numerics = self._numerics(reader)
            if not first and self.store.numerics != numerics:
                logger.warning(
                    "The student now computes scores differently (%s), so every candidate is scored again.",
                    differences(self.store.numerics, numerics),
                )
                indices = self.candidates
            self.store.numerics = numerics
        else:
            indices = indices[:0]
        self.store.observed.merge(reader.ranks)
        observed = int((self.store.observed.step >= 0).sum())
        tokens, from_file, seconds = 0, 0, 0.0
        tokens_of: Counter[str] = Counter()
        if len(indices) or observed:
            started = self.clock.tick()
            found = self._from_file(reader, indices) if first and self.given is not None else None
            self.store.begin(epoch=epoch, step=step)
            if found is not None:
                self.store.write(found.indices, found.columns, found.missing)
                indices = np.setdiff1d(indices, found.indices)
                from_file = len(found.indices)
            frozen = {one.identity for metric in self.metrics.values() for one in metric.readers.values() if one.frozen}
            if frozen and self.readings is not None and self.readings != self._readings_from:
                load_readings(self._readings, self.readings, frozen)
                self._readings_from = self.readings
            for scored in score_with_parts(
                self.scorer,
                reader,
                self.dataset,
                list(self.metrics.values()),
                indices,
                folder=self.parts,
                identity=self._identity_of_pass(reader, epoch, step, indices) if self.parts else {},
                kept=self._readings,
            ):
                self.store.write(scored.indices, scored.columns, scored.missing)
                tokens += scored.tokens
                tokens_of.update(scored.tokens_of)
            if frozen and self.readings is not None and reader.ranks.rank == 0:
                save_readings(self._readings, self.readings)
            scoring_pass = self.store.end()
            seconds = self.clock.tick() - started
            self.clock.add_pass(seconds, int(self.dataset.lengths[indices].sum()) if tokens else 0, first=first)
        summary = self._summary(len(indices), observed, from_file, tokens, tokens_of, seconds, step)
        if scoring_pass is not None and len(summary.non_finite):
            weights = non_finite_weights(model, reader.ranks)
            if weights and len(summary.non_finite) == len(self.candidates):
                raise ValueError(
                    f"The student's weights are NaN or infinite ({weights}), so no sample has a score at step {step}. "
                    "Resume from an earlier checkpoint with a lower learning rate or max_grad_norm."
                )
            summary = dataclasses.replace(summary, non_finite_weights=weights)
        return summary, scoring_pass

    def _from_file(self, reader: ModelReader, indices: IntArray) -> Found:
        """The scores in the given file. The first process reads it. Every process has a part in the hash."""
        assert self.given is not None
        weights, numerics = content_of_weights(reader.model), reader.numerics
        found: Found | str | None = None
        if reader.ranks.rank == 0:
            metrics = list(self.metrics.values())
            try:
                found = find_scores(self.given, self.dataset, indices, metrics, weights=weights, numerics=numerics)
            except (ValueError, OSError) as error:
                found = str(error)
        found = reader.ranks.gather(found)[0]
        if isinstance(found, str):
            raise ValueError(found)
        assert found is not None
        return found

    def _summary(
        self,
        samples: int,
        observed: int,
        from_file: int,
        tokens: int,
        tokens_of: Mapping[str, int],
        seconds: float,
        step: int,
    ) -> ScoringSummary:
        candidates = self.candidates
        codes = {name: missing[candidates] for name, missing in self.store.missing.items()}

        def without_score(reason: Missing) -> IntArray:
            return candidates[np.any([each == reason for each in codes.values()], axis=0)] if codes else candidates[:0]

        age = step - self.store.step[candidates]
        return ScoringSummary(
            samples=samples,
            observed=observed,
            from_file=from_file,
            estimated=int(self.store.estimated[candidates].sum()),
            tokens=tokens,
            tokens_of=tokens_of,
            seconds=seconds,
            share=self.clock.share,
            age_median=float(np.median(age)) if self.metrics else 0.0,
            age_max=int(age.max()) if self.metrics else 0,
            non_finite=without_score(Missing.NON_FINITE),
            too_long=without_score(Missing.TOO_LONG),
            not_applicable={
                name: number for name, each in codes.items() if (number := int((each == Missing.NOT_APPLICABLE).sum()))
            },
        )

    def _reader_of(self, model: nn.Module) -> ModelReader:
        """The student as a reader. All passes of a model use the same one."""
        if self._reader is None or self._reader.model is not model:
            self._reader = self.scorer.reader(model)
        return self._reader

    def _numerics(self, reader: ModelReader) -> dict[str, str]:
        """The numerics of the student, and of all other readers by metric and name."""
        found = dict(reader.numerics)
        for metric in self.metrics.values():
            for name, other in metric.readers.items():
                found |= {f"{key} of {metric.name}'s {name}": value for key, value in other.numerics.items()}
        return found

    def _identity_of_pass(self, reader: ModelReader, epoch: int, step: int, indices: IntArray) -> dict[str, Any]:
        """The identity of a pass: everything that its numbers depend on, to the last bit."""
        return {
            "dataset": self.store.origin["dataset"],
            "metrics": self.store.origin["metrics"],
            "columns": [self.dataset.column_fingerprint(name) for name in data_columns_of(self.metrics.values())],
            "samples": hash_of(indices.tobytes()),
            "epoch": epoch,
            "step": step,
            "weights": reader.weights,
            # other batches and other kernels change the last digits
            "scorer": described(dataclasses.replace(self.scorer, progress=False)),
            "world_size": reader.ranks.world_size,
            "device": reader.device.type,
            "numerics": self.store.numerics,
            "torch": torch.__version__,
        }

    def due(self, ranks: Ranks, *, epoch: int, into_epoch: int = 0) -> IntArray:
        """The samples to score now, within the budget."""
        candidates = self.candidates
        if not self.store.passes:
            return candidates
        if not self.rescore.due(epoch=epoch, into_epoch=into_epoch):
            return candidates[:0]
        self.store.observed.merge(ranks)  # observed samples need no scoring
        seed = np.random.default_rng([self.seed, len(self.store.passes)]).integers(2**63)
        indices = candidates_to_score(self.rescore, self.store, candidates, self.dataset.content_hash, seed=int(seed))
        if self.rescore.max_share is not None:
            self.clock.tick()
            affordable = -ranks.max_over_ranks(
                -self.clock.affordable_tokens(self.rescore.max_share)
            )  # the smallest number of all processes
            indices = indices[np.cumsum(self.dataset.lengths[indices]) <= affordable]
        return np.sort(indices)


def non_finite_weights(model: nn.Module, ranks: Ranks) -> str:
    """The parameters that have NaN or infinite values, in words; empty if there are none. All processes take part."""
    found = []
    for name, parameter in model.named_parameters():
        local = parameter.detach()
        if isinstance(local, DTensor):
            local = local.to_local()
        elif not local.numel():
            local = getattr(parameter, "ds_tensor", local)  # where ZeRO-3 keeps this process's share
        if local.is_floating_point() and not bool(torch.isfinite(local).all()):
            found.append(name.removeprefix("module."))
    names = list(dict.fromkeys(name for of_rank in ranks.gather(found) for name in of_rank))
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names)
