"""The views that the metrics need for a block of samples, each of them once, and the statistics that readers gave."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from distill_sampler.metrics.response import response_view
from distill_sampler.protocols import Metric, Read, Reader
from distill_sampler.reading.model_reader import ModelReader
from distill_sampler.reading.readings import Key, Readings
from distill_sampler.types import STUDENT, Missing, Sample, TokenStats, View

Place = tuple[str, int]
"""Which view: its reader's identity, and its number among that reader's views."""


class BlockViews:
    """Collects the views that the metrics need for a block of samples, each of them once, and has them read.

    Args:
        student: reads the views that name no other reader.
        metrics: what is computed from the views; their readers read the other views.
        kept: statistics that frozen readers gave earlier. New ones are added.
        statistics: the statistics that are needed besides surprisal, rank and ties.
    """

    def __init__(
        self, student: ModelReader, metrics: Sequence[Metric], *, kept: Readings, statistics: Collection[str]
    ) -> None:
        self._student = student
        self._kept = kept
        self._statistics = statistics
        self._readers: dict[str, Reader] = {student.identity: student}
        for metric in metrics:
            self._readers |= {reader.identity: reader for reader in metric.readers.values()}
        self._positions = {identity: reader.positions for identity, reader in self._readers.items()}
        self._views: dict[Place, View] = {}
        self._places: dict[tuple[str, int, tuple[bytes, bytes]], Place] = {}
        """By reader, sample and content of the view."""
        self._counts: dict[str, int] = dict.fromkeys(self._readers, 0)
        self.stats: dict[Place, TokenStats] = {}
        """The statistics of each view, after `read`."""

    def add(self, metric: Metric, sample: Sample) -> list[Place] | Missing:
        """Add a metric's views of a sample, and return their places; or why the metric has no score for it.

        Raises:
            ValueError: a view names a reader that the metric does not have.
        """
        views = metric.views(sample)
        if views is None:
            return Missing.NOT_APPLICABLE
        readers = [self._reader_of(metric, view) for view in views]
        longest = [self._positions[reader.identity] for reader in readers]
        if any(len(view.input_ids) > most for view, most in zip(views, longest, strict=True)):
            return Missing.TOO_LONG
        return [self._place(reader, sample, view) for reader, view in zip(readers, views, strict=True)]

    def add_whole(self, sample: Sample) -> Place | None:
        """Add the student's view of the whole sample, and return its place; None if it is too long."""
        if len(sample.input_ids) > self._positions[self._student.identity]:
            return None
        return self._place(self._student, sample, response_view(sample))

    @property
    def tokens(self) -> int:
        """Tokens of all views."""
        return sum(len(view.input_ids) for view in self._views.values())

    def read(self, opened: Callable[[Reader], Read]) -> None:
        """Read all views, and fill `stats`. Every process must call it.

        Args:
            opened: returns the function that reads views with a reader.
        """
        ranks = self._student.ranks
        for identity, reader in self._readers.items():
            places = [place for place in self._views if place[0] == identity]
            keys: dict[Place, Key] = {}
            if reader.frozen:
                keys = {place: Readings.key(reader, self._views[place]) for place in places}
                offered = [name for name in self._statistics if name in reader.statistics]
                known = {place: self._kept.get(key, offered) for place, key in keys.items()}
                self.stats |= {place: replace(stats, cost=0.0) for place, stats in known.items() if stats is not None}
                places = [place for place in places if place not in self.stats]
                if not ranks.max_over_ranks(len(places)):
                    continue
            found = opened(reader)([self._views[place] for place in places])
            self.stats |= dict(zip(places, found, strict=True))
            if reader.frozen:
                for some in ranks.gather([(keys[place], self.stats[place]) for place in places]):
                    self._kept.keep(some)

    def cost(self, place: Place) -> float:
        """How many tokens the reader processed for a view."""
        cost = self.stats[place].cost
        return len(self._views[place].input_ids) if cost is None else cost

    def _place(self, reader: Reader, sample: Sample, view: View) -> Place:
        key = (reader.identity, sample.index, view.identity)
        if key not in self._places:
            place = self._places[key] = (reader.identity, self._counts[reader.identity])
            self._views[place] = view
            self._counts[reader.identity] += 1
        return self._places[key]

    def _reader_of(self, metric: Metric, view: View) -> Reader:
        if view.reader == STUDENT:
            return self._student
        if view.reader not in metric.readers:
            raise ValueError(
                f"{type(metric).__name__}.views names the reader '{view.reader}', but its readers are "
                f"{', '.join(map(repr, (STUDENT, *metric.readers)))}."
            )
        return metric.readers[view.reader]
