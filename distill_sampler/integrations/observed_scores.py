"""A tap that scores samples from the forward passes of training. The scores wait in the store for the next pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from distill_sampler.curriculum import Curriculum
from distill_sampler.integrations.sharding import whole_head
from distill_sampler.protocols import Tap
from distill_sampler.reading.observer import Observer
from distill_sampler.types import Batch


class ObservedScores(Tap):
    """Scores the samples that are trained on, from the forward passes of training.

    Args:
        curriculum: provides the metrics, and its store receives the scores.
    """

    def __init__(self, curriculum: Curriculum) -> None:
        self._curriculum = curriculum
        self._observer: Observer | None = None

    @contextmanager
    def open(self, model: nn.Module, *, step: int) -> Iterator[None]:
        observer = Observer(
            model,
            self._curriculum.dataset,
            list(self._curriculum.cycle.metrics.values()),
            ties=self._curriculum.scorer.ties,
            whole=whole_head,
        )
        with observer:
            self._observer = observer
            yield
        self._observer = None

    def before(self, batch: Batch) -> None:
        assert self._observer is not None
        self._observer.expect(batch)

    def after(self, batch: Batch) -> None:
        assert self._observer is not None
        self._curriculum.store.observed.write(*self._observer.take(), step=batch.step)
