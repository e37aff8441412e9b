"""A tap that scores samples from the forward passes of training. The scores wait in the store for the next pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch import nn

from distill_sampler.curriculum import Curriculum
from distill_sampler.integrations.sharding import whole_head
from distill_sampler.objectives.live import LiveTeacher
from distill_sampler.planning.summary import PREFIX
from distill_sampler.protocols import ObjectiveTap, Tap
from distill_sampler.reading.model_reader import ModelReader
from distill_sampler.reading.observer import Observer
from distill_sampler.reading.reduce import extras_of
from distill_sampler.types import Batch

_MOST_VALUES = 100
"""A column with more values than that names no teachers or domains whose losses anybody reads in a log."""


class ObservedScores(Tap):
    """Scores the samples that are trained on, from the forward passes of training, and tells their loss by teacher.

    Args:
        curriculum: provides the metrics, and its store receives the scores.
        objectives: the taps of the run's objectives. Those of live teachers read the batches too.
    """

    def __init__(self, curriculum: Curriculum, objectives: Sequence[ObjectiveTap] = ()) -> None:
        self._curriculum = curriculum
        self._teachers = [tap for tap in objectives if isinstance(tap, LiveTeacher)]
        self._observer: Observer | None = None
        dataset = curriculum.dataset
        named = [name for name in (curriculum.teacher, curriculum.domain) if name in dataset.column_names]
        self._columns = {name: column for name in named if len((column := dataset.column(name)).values) <= _MOST_VALUES}
        """By name, the columns that the loss is told by."""
        self._losses = {name: np.zeros((len(column.values), 2)) for name, column in self._columns.items()}
        """By column, for each of its values: the sum of the surprisals since the last log, and the tokens."""

    @contextmanager
    def open(self, model: nn.Module, *, step: int) -> Iterator[None]:
        metrics = list(self._curriculum.cycle.metrics.values())
        extras = extras_of(metrics)
        observer = Observer(
            model,
            self._curriculum.dataset,
            metrics,
            ties=self._curriculum.scorer.ties,
            whole=whole_head,
            along={id(each.model): each.reads_along(extras) for each in self._teachers if self._reads(each)},
        )
        with observer:
            self._observer = observer
            yield
        self._observer = None

    def _reads(self, teacher: LiveTeacher) -> bool:
        """Whether a teacher reads for a metric."""
        readers = [reader for each in self._curriculum.cycle.metrics.values() for reader in each.readers.values()]
        return any(isinstance(reader, ModelReader) and reader.model is teacher.model for reader in readers)

    def before(self, batch: Batch) -> None:
        assert self._observer is not None
        self._observer.expect(batch)

    def after(self, batch: Batch) -> None:
        assert self._observer is not None
        self._curriculum.store.observed.write(*self._observer.take(), step=batch.step)
        for sample, total, tokens in self._observer.losses:
            for name, column in self._columns.items():
                self._losses[name][column.codes[sample]] += total, tokens

    def sums(self) -> dict[str, tuple[float, float]]:
        """The training loss by teacher and by domain: mean surprisal (nats) of the response tokens, unweighted."""
        found = {
            f"{PREFIX}loss/{name}/{value}": (float(total), float(tokens))
            for name, column in self._columns.items()
            for value, (total, tokens) in zip(column.values, self._losses[name], strict=True)
        }
        for sums in self._losses.values():
            sums[:] = 0
        return found
