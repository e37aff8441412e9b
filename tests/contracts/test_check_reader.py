"""`check_reader` finds each broken promise, and says which member and what to do. What keeps them passes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from distill_sampler import (
    ModelReader,
    Reader,
    Scorer,
    TokenStats,
    View,
)
from distill_sampler.protocols import PassInfo, Read
from distill_sampler.testing import check_reader
from tests import tiny

CALLS: list[int] = []


@dataclass(frozen=True)
class Uniform(Reader):
    """Every token has probability 1 / 32. What it says of views can be changed."""

    change: Callable[[Sequence[View], list[TokenStats]], Sequence[TokenStats]] | None = None
    report: Callable[[View], int] | None = None
    called: str = "uniform"
    offers: tuple[str, ...] = ("surprisal",)
    longest: float = 64

    identity = property(lambda self: self.called)  # type: ignore[assignment]
    statistics = property(lambda self: self.offers)  # type: ignore[assignment]
    positions = property(lambda self: self.longest)  # type: ignore[assignment]

    @contextmanager
    def open(self, info: PassInfo) -> Iterator[Read]:
        def read(views: Sequence[View]) -> Sequence[TokenStats]:
            stats = []
            for view in views:
                info.progress(self.report(view) if self.report else len(view.input_ids))
                values = (view.input_ids[view.scored] % 7 + 1).astype(np.float32)  # not the same for every token
                stats.append(TokenStats(surprisal=values))
            return self.change(views, stats) if self.change else stats

        yield read


def of_all(change: Callable[[View, TokenStats], TokenStats]) -> Any:
    return lambda views, stats: [change(view, each) for view, each in zip(views, stats, strict=True)]


def fails_on_nothing(views: Sequence[View], stats: list[TokenStats]) -> list[TokenStats]:
    return [replace(each, surprisal=each.surprisal * max(1, 0 / len(views))) for each in stats] or stats[0]  # type: ignore[return-value]


def too_short(views: Sequence[View], stats: list[TokenStats]) -> list[TokenStats]:
    if any(len(view.input_ids) > 60 for view in views):
        raise IndexError("index out of range in self")
    return stats


@dataclass(frozen=True)
class Renamed(Uniform):
    @property
    def identity(self) -> str:
        return f"uniform {len(CALLS)}"

    @contextmanager
    def open(self, info: PassInfo) -> Iterator[Read]:
        CALLS.append(1)
        with super().open(info) as read:
            yield read


NOISE = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("reader", "told"),
    [
        (Uniform, "is a class"),
        (Uniform(), None),
        (Uniform(called=""), "has no identity"),
        (Uniform(called="<Uniform object at 0x7f0011223344>"), "memory address"),
        (Renamed(), "identity changes when it reads"),
        (Uniform(offers=("rank",)), "statistics is"),
        (Uniform(offers=("surprisal", "loss")), "statistics is"),
        (Uniform(offers=("surprisal", "rank")), "offers rank, but returns none"),
        (Uniform(longest=1), "positions is 1"),
        (Uniform(too_short), "reading raises IndexError.*up to 64 tokens"),
        (Uniform(lambda views, stats: stats[:-1]), "statistics of 12 views for 13"),
        (Uniform(lambda views, stats: stats[::-1]), "surprisal is not an array"),
        (Uniform(fails_on_nothing), "reading raises.*empty list"),
        (Uniform(of_all(lambda v, s: replace(s, surprisal=s.surprisal[:-1]))), "one number for each"),
        (Uniform(of_all(lambda v, s: replace(s, surprisal=s.surprisal.tolist()))), "numpy arrays"),
        (Uniform(of_all(lambda v, s: replace(s, surprisal=-s.surprisal))), "surprisal is not between 0.0 and inf"),
        (Uniform(of_all(lambda v, s: replace(s, surprisal=s.surprisal * np.float32(np.nan)))), "not between"),
        (Uniform(of_all(lambda v, s: replace(s, surprisal=s.surprisal.astype(float)))), "float64.*float32"),
        (Uniform(of_all(lambda v, s: replace(s, rank=np.zeros(len(s.surprisal), np.int64)))), "rank is not between 1"),
        (Uniform(of_all(lambda v, s: replace(s, cost=1e6))), "cost of a view.* 1000000"),
        (Uniform(of_all(lambda v, s: replace(s, cost=0.0))), None),
        (Uniform(report=lambda view: 0), "progress over 0 tokens"),
        (
            Uniform(of_all(lambda v, s: replace(s, surprisal=s.surprisal + NOISE.random(dtype=np.float32)))),
            "views in another order",
        ),
        (
            Uniform(lambda views, stats: [replace(s, surprisal=s.surprisal * np.float32(len(views))) for s in stats]),
            "read alone",
        ),
        (
            Uniform(of_all(lambda v, s: replace(s, surprisal=s.surprisal + np.float32(v.input_ids[-1])))),
            "tokens after the last scored one",
        ),
    ],
)
def test_a_reader_that_breaks_a_promise_is_told_which(reader: Any, told: str | None) -> None:
    if told is None:
        check_reader(reader)
        return
    with pytest.raises(AssertionError, match=f"^{getattr(reader, '__name__', type(reader).__name__)}: .*{told}"):
        check_reader(reader)


def test_a_reader_whose_numbers_come_in_another_order_is_found_where_lengths_do_not_tell() -> None:
    views = [View(input_ids=np.array([1, token]), scored=np.array([False, True])) for token in range(2, 12)]
    with pytest.raises(AssertionError, match="views in another order"):
        check_reader(Uniform(lambda views, stats: stats[::-1]), views=views)


def test_a_frozen_reader_that_gives_other_numbers_each_time_is_found() -> None:
    passes: list[int] = []

    def later(views: Sequence[View], stats: list[TokenStats]) -> list[TokenStats]:
        passes.append(1)
        return [replace(each, surprisal=each.surprisal + np.float32(len(passes) > 31)) for each in stats]

    views = [View(input_ids=np.array([1, token]), scored=np.array([False, True])) for token in range(27)]
    # all, none, mixed, one by one (27), without what follows: 31 passes; then all again
    with pytest.raises(AssertionError, match="frozen is True, but it gives different numbers"):
        check_reader(Uniform(later), views=views)


def test_a_reader_with_other_weights_has_another_identity() -> None:
    check_reader(Uniform(), unlike=Uniform(called="other"))
    with pytest.raises(AssertionError, match="other weights has the same identity"):
        check_reader(Uniform(), unlike=Uniform(longest=20))


@pytest.mark.parametrize("frozen", [True, False])
def test_models_of_transformers_keep_the_contract_of_readers(frozen: bool) -> None:
    if frozen:
        check_reader(ModelReader(tiny.model()), unlike=ModelReader(tiny.model(1)))
    else:
        check_reader(Scorer().reader(tiny.model(max_position_embeddings=48)))


def test_a_model_whose_padding_is_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    forward = type(model).forward

    def without_mask(self: Any, *args: Any, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        # left-padded, as for generation: real tokens stand behind padding that nobody masks
        width = kwargs["input_ids"].shape[1]
        noise = torch.arange(width) * 0.05
        hidden = self.get_input_embeddings()(kwargs.pop("input_ids")) + noise.flip(0)[None, :, None]
        return forward(self, *args, inputs_embeds=hidden, **kwargs)

    monkeypatch.setattr(type(model), "forward", without_mask)
    with pytest.raises(AssertionError, match=r"read alone|another order|after the last scored"):
        check_reader(ModelReader(model, share_prompts=False))


def test_importing_the_checks_needs_numpy_alone() -> None:
    code = """
import sys
import distill_sampler.testing
heavy = [name for name in ("torch", "transformers", "pyarrow", "pytest", "hypothesis") if name in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
