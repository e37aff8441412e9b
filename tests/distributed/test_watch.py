"""A process that hangs or dies in a scoring pass is named, with the block it was in. Two processes are two threads."""

import math
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distill_sampler.distributed import Ranks
from distill_sampler.watch import Watch, watch

GENEROUS = 30
"""Seconds after which a test gives up."""


class Process:
    """A stand-in for a process: a thread that does what it is told."""

    def __init__(self, rank: int, store: Any, said: Any, timeout: float) -> None:
        self.ranks = Ranks(rank=rank, world_size=2)
        self._orders: queue.Queue[Callable[[Watch], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, args=(store, said, timeout))
        self._thread.start()

    def _run(self, store: Any, said: Any, timeout: float) -> None:
        with Watch(
            self.ranks, store, timeout=timeout, give_up=lambda *verdict: said.put((self.ranks.rank, verdict))
        ) as watching:
            while (order := self._orders.get()) is not None:
                order(watching)

    def does(self, *orders: Callable[[Watch], None]) -> None:
        for order in orders:
            self._orders.put(order)

    def ends(self) -> None:
        self._orders.put(None)
        self._thread.join()


@pytest.fixture
def processes() -> Iterator[Callable[[float], tuple[Process, Process, Any]]]:
    with ExitStack() as opened:

        def start(timeout: float) -> tuple[Process, Process, Any]:
            store, said = dist.HashStore(), queue.Queue()  # type: ignore[var-annotated]
            first, second = (Process(rank, store, said, timeout) for rank in range(2))
            opened.callback(first.ends)
            opened.callback(second.ends)
            return first, second, said

        yield start


def verdicts(said: Any) -> dict[int, tuple[str, bool]]:
    return dict(said.get(timeout=GENEROUS) for _ in range(2))


def test_the_process_that_the_others_wait_for_is_named_with_its_block(processes: Any) -> None:
    first, second, said = processes(0.5)
    for process in (first, second):
        process.does(Watch.begin_block, Watch.end_block, Watch.begin_block, Watch.begin_forward)
    first.does(Watch.end_block)  # and waits for the numbers of the second process
    found = verdicts(said)
    for sentence, _ in found.values():
        assert "Behind are: rank 1 is reading its share of block 2 of the pass" in sentence
        assert "ddp_timeout" in sentence
    assert (found[0][1], found[1][1]) == (False, True)


def test_of_two_in_one_block_the_one_that_is_in_no_collective_hangs(
    processes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, said = processes(0.5)
    waiting = first._thread.ident
    monkeypatch.setattr("distill_sampler.watch._line_of", lambda thread: (thread == waiting, "here.py:3 (stuck)"))
    for process in (first, second):
        process.does(Watch.begin_block)
    for sentence, _ in verdicts(said).values():
        assert "rank 1 is reading its share of block 1 of the pass, at here.py:3 (stuck)." in sentence
        assert "rank 0 is" not in sentence


def test_a_pass_that_comes_further_is_left_alone(processes: Any) -> None:
    first, second, said = processes(0.6)
    for process in (first, second):
        for _ in range(12):
            process.does(Watch.begin_block, lambda _: threading.Event().wait(0.1))
    first.ends()
    second.ends()
    assert said.empty()


def test_a_dead_process_is_known_by_its_silence(processes: Any) -> None:
    first, second, _ = processes(GENEROUS)
    asked: queue.Queue[list[int]] = queue.Queue()
    second.ends()
    first.does(lambda watching: asked.put(watching.silent()))
    assert asked.get(timeout=GENEROUS) == [1]


def test_the_watch_takes_the_timeout_of_the_process_group_or_a_shorter_one_of_the_host(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_sampler.watch._longest", math.inf)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=77))
    try:
        with watch(Ranks(rank=0, world_size=2, device=torch.device("cpu"))) as watching:
            assert watching is not None
            assert watching._timeout == 77
        monkeypatch.setattr("distill_sampler.watch._longest", 20.0)  # what set_timeout does
        with watch(Ranks(rank=0, world_size=2, device=torch.device("cpu"))) as watching:
            assert watching is not None
            assert watching._timeout == 20
    finally:
        dist.destroy_process_group()
    with watch(Ranks()) as watching:
        assert watching is None
