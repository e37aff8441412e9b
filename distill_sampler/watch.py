"""Watches a scoring pass on several processes. If a process hangs or dies, the job ends with a message that names it.

Processes that wait for another one in a collective report nothing, and some backends never stop waiting. So each
process records which block it has reached, and a thread publishes this, with the current line of its Python code,
through the process group's store. If a process makes no progress for 90% of the process group's timeout
(`ddp_timeout` of a trainer, `InitProcessGroupKwargs` of accelerate), its thread compares all processes. The culprits
are those that are behind and are not waiting themselves.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from torch.distributed import distributed_c10d

from distill_sampler.distributed import Ranks

logger = logging.getLogger(__name__)

_SHARE = 0.9
"""The watch gives up after this share of the timeout, before the collectives, which cannot say who is missing."""
_KEY = "distill_sampler/watch"


class Place(NamedTuple):
    """How far a process has come. A process with a smaller place is behind."""

    scoring_pass: int = 0
    block: int = 0
    """Counted from 1; 0: the pass has just begun."""
    is_read: bool = False
    """Whether this process has read its share and waits for the numbers of the others."""
    waits: bool = False
    """Whether it is inside a collective."""
    where: str = ""
    """The current line of its main thread."""

    def __str__(self) -> str:
        doing = "has read its share" if self.is_read else "is reading its share"
        return f"{doing} of block {self.block} of the pass, at {self.where}"


class Watch:
    """Watches one scoring pass. Made by `watch`.

    Args:
        ranks: the processes.
        store: the store through which they publish their places.
        timeout: the longest time in seconds that a process may make no progress.
        give_up: called with the message, and whether this process is behind. By default it ends the process.
        scoring_pass: the number of the pass, the same on all processes.
    """

    def __init__(
        self,
        ranks: Ranks,
        store: Any,
        *,
        timeout: float,
        give_up: Callable[[str, bool], None] | None = None,
        scoring_pass: int = 0,
    ) -> None:
        self._ranks = ranks
        self._store = store
        self._timeout = timeout
        self._give_up = give_up or _end_process
        self._place = Place(scoring_pass=scoring_pass)
        self._since = time.monotonic()
        self._beats = 0
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._every = float(np.clip(timeout / 40, 0.02, 5))
        self._thread = threading.Thread(target=self._run, name="distill_sampler watch", daemon=True)

    def __enter__(self) -> Watch:
        self._publish()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def begin_block(self) -> None:
        """Record that this process begins the next block."""
        self._come_to(self._place._replace(block=self._place.block + 1, is_read=False))

    def begin_forward(self) -> None:
        """Record that this process begins a forward pass."""
        self._come_to(self._place)

    def end_block(self) -> None:
        """Record that this process has read its share of the block."""
        self._come_to(self._place._replace(is_read=True))

    def silent(self) -> list[int]:
        """The processes that no longer publish their place, because they are dead or stopped."""
        before = self._published()
        for _ in range(4):
            time.sleep(self._every)
            self._publish()
        after = self._published()
        return [rank for rank in range(self._ranks.world_size) if before.get(rank) == after.get(rank)]

    def _come_to(self, place: Place) -> None:
        self._place, self._since = place, time.monotonic()

    def _run(self) -> None:
        while not self._over.wait(self._every):
            try:
                self._publish()
                if time.monotonic() - self._since > _SHARE * self._timeout:
                    key = f"{_KEY}/verdict/{self._place.scoring_pass}"
                    # the first verdict counts for all processes; later, some are silent because they have ended
                    verdict = json.loads(self._store.compare_set(key, "", json.dumps(self._verdict())))
                    self._give_up(verdict[0], self._ranks.rank in verdict[1])
                    return
            except Exception as error:  # the store's process has died
                if time.monotonic() - self._since > _SHARE * self._timeout:
                    self._give_up(f"Scoring has stopped: the process group's store does not answer ({error}).", True)
                    return

    def _publish(self) -> None:
        self._beats += 1
        waits, where = _line_of(self._main)
        self._store.set(f"{_KEY}/{self._ranks.rank}", json.dumps([self._beats, *self._place[:3], waits, where]))

    def _published(self) -> dict[int, list[Any]]:
        keys = {rank: f"{_KEY}/{rank}" for rank in range(self._ranks.world_size)}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def _verdict(self) -> tuple[str, list[int]]:
        """The message, and the ranks of the processes that are behind."""
        silent = set(self.silent())
        places = {rank: Place(*found[1:]) for rank, found in self._published().items()}
        first = min(place[:3] for place in places.values())
        behind = {rank for rank, place in places.items() if place[:3] == first}
        behind = behind & silent or {rank for rank in behind if not places[rank].waits} or behind
        names = "; ".join(
            f"rank {rank} {places[rank]}" + (", and its process no longer answers" if rank in silent else "")
            for rank in sorted(behind)
        )
        if len(behind) == self._ranks.world_size:
            names += ". Which of them hangs is unknown"
        return (
            f"Scoring hangs: rank {self._ranks.rank} has made no progress for {_SHARE * self._timeout:.0f} s, and the "
            f"timeout is {self._timeout:.0f} s (ddp_timeout, or InitProcessGroupKwargs of accelerate). Behind "
            f"are: {names}. The job ends now.",
            sorted(behind),
        )


_current: Watch | None = None
_num_passes = 0
_longest = math.inf


def set_timeout(seconds: float) -> None:
    """Set the longest time that a process may make no progress in scoring, if the process group's timeout is longer.

    Hosts do not always give the process group the timeout that users set (transformers 5.23 does not on a CPU).
    """
    global _longest
    _longest = seconds


@contextmanager
def watch(ranks: Ranks) -> Iterator[Watch | None]:
    """Watch a scoring pass, if there are several processes. All of them must call this."""
    global _current, _num_passes
    if ranks.world_size == 1:
        yield None
        return
    _num_passes += 1
    of_group = distributed_c10d._get_default_group()._get_backend(ranks.device).options._timeout
    timeout = min(_longest, of_group.total_seconds())
    # a separate connection, because a collective that waits for its peers may block the store's own
    store: Any = distributed_c10d._get_default_store()
    store = store.clone()
    with Watch(ranks, store, timeout=timeout, scoring_pass=_num_passes) as _current:
        try:
            yield _current
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
                silent = ", ".join(map(str, _current.silent()))
                logger.error("Scoring stops: rank %s no longer answers (%s).", silent or "of another process", error)
            raise
        finally:
            _current = None


def _line_of(thread: int) -> tuple[bool, str]:
    """Whether a thread is inside a collective, and its current line."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return False, "its end"
    code = frame.f_code
    path = code.co_filename.replace(os.sep, "/")
    waits = "/torch/distributed/" in path or "/deepspeed/" in path
    return waits, f"{path.rpartition('/')[2]}:{frame.f_lineno} ({code.co_name})"


def begin_forward() -> None:
    """Tell the watch, if there is one, that a forward pass begins."""
    if _current is not None:
        _current.begin_forward()


def _end_process(sentence: str, is_behind: bool) -> None:
    """Print the message and end this process at once, because its main thread is stuck."""
    sys.stderr.write(f"\n{sentence}\n")
    if is_behind:
        faulthandler.dump_traceback(all_threads=True)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)
