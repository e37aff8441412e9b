"""`check_reader`: a reader gives a number for each scored token, the same in every batch, and has an identity."""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Sequence

import numpy as np

from distill_sampler.protocols import PassInfo, Reader
from distill_sampler.testing.metric import ALWAYS, STATISTICS
from distill_sampler.testing.verdict import Verdict
from distill_sampler.types import TokenStats, View

LONGEST = 4096
"""Readers with at most this many positions are tested with a view of exactly that length."""
FLIPPED_RANKS = 0.05
"""Share of the ranks that may differ when a view is read in another batch, because almost equal logits swap ranks."""


def check_reader(
    reader: Reader,
    *,
    views: Sequence[View] | None = None,
    vocabulary: int = 32,
    tolerance: float = 1e-4,
    unlike: Reader | None = None,
    seed: int = 0,
) -> None:
    """Check a reader's contract by reading some views with it.

    Args:
        reader: the reader.
        views: the views to read. By default random token ids below `vocabulary`.
        vocabulary: how many different token ids random views have.
        tolerance: how much surprisals (nats) may differ when a view is read in another batch.
        unlike: a reader with other weights, whose identity must be different.
        seed: seed of everything random.

    Raises:
        AssertionError: the reader breaks the contract; the message says how, and the cure.
    """
    say = Verdict(reader, Reader)
    _check_declarations(reader, unlike, say)
    identity = reader.identity
    rng = np.random.default_rng(seed)
    shown = list(views) if views is not None else _views(reader.positions, vocabulary, rng)
    whole = _read(reader, shown, say)
    for view, stats in zip(shown, whole, strict=True):
        _check_stats(reader, view, stats, say)
    say.require(
        len(_read(reader, [], say)) == 0,
        "it returns statistics for an empty list of views",
        "Return an empty list for an empty list of views: a process may have nothing to read",
    )
    order = rng.permutation(len(shown))
    mixed = _read(reader, [shown[place] for place in order], say)
    _require_same(
        whole,
        [mixed[place] for place in np.argsort(order)],
        tolerance,
        say,
        "views in another order have different numbers",
        "Return the statistics in the order of the views, not in the order of your batches",
    )
    _require_same(
        whole,
        [_read(reader, [view], say)[0] for view in shown],
        tolerance,
        say,
        "a view that is read alone has different numbers than together with others",
        "Exclude padding (attention mask, positions), or allow for rounding with tolerance=",
    )
    _require_same(
        whole,
        _read(reader, [_without_tail(view) for view in shown], say),
        tolerance,
        say,
        "tokens after the last scored one change the numbers",
        "The surprisal at position t is -log p(input_ids[t] | input_ids[:t]), which depends on no later token",
    )
    if reader.frozen:
        _require_same(
            whole,
            _read(reader, shown, say),
            tolerance,
            say,
            "frozen is True, but it gives different numbers the second time",
            "Turn dropout and sampling off, or make frozen False",
        )
    say.require(
        reader.identity == identity,
        "its identity changes when it reads",
        "Make the identity depend on weights and settings, not on what was read",
    )


def _check_declarations(reader: Reader, unlike: Reader | None, say: Verdict) -> None:
    identity = reader.identity
    say.require(isinstance(identity, str) and bool(identity), "it has no identity", "Return a text, such as a hash")
    say.require(
        not re.search(r"0x[0-9a-fA-F]{6,}", identity),
        f"its identity contains a memory address ({identity}), which differs between processes",
        "Hash the weights and settings instead: distill_sampler.serialize.hash_of(array.tobytes())",
    )
    try:
        copy = pickle.loads(pickle.dumps(reader))
    except Exception:  # a reader may hold a connection (check_metric tests that a metric with a reader pickles)
        copy = reader
    say.require(
        copy.identity == identity,
        "a copy has another identity",
        "Make the identity depend on weights and settings alone",
    )
    say.require(
        unlike is None or unlike.identity != identity,
        f"a reader with other weights has the same identity, {identity}",
        "Hash all weights into it, so that scores of the two are never mixed",
    )
    say.require(isinstance(reader.frozen, bool), f"frozen is {reader.frozen!r}", "Return True or False")
    numerics = dict(reader.numerics)
    say.require(
        all(isinstance(part, str) for entry in numerics.items() for part in entry),
        f"numerics is {numerics!r}",
        "Return texts by name, such as {'dtype': 'bfloat16'}",
    )
    unknown = [name for name in reader.statistics if name not in STATISTICS]
    say.require(
        "surprisal" in reader.statistics and not unknown,
        f"statistics is {tuple(reader.statistics)!r}",
        f"Return 'surprisal' and any others that it gives of {', '.join(STATISTICS)}",
    )
    say.require(reader.positions >= 2, f"positions is {reader.positions}", "Return how many tokens it can read at once")
    say.require(
        isinstance(reader.block_tokens, int) and reader.block_tokens > 0,
        f"block_tokens is {reader.block_tokens!r}",
        "Return how many tokens of views it wants at a time",
    )


def _read(reader: Reader, views: Sequence[View], say: Verdict) -> Sequence[TokenStats]:
    """Read views in a pass of their own."""
    reported: list[int] = []
    extras = tuple(name for name in reader.statistics if name not in ALWAYS)
    info = PassInfo(
        statistics=extras,
        tokens=sum(int(view.scored.sum()) for view in views),
        examples=views[:4],
        progress=reported.append,
    )
    cure = f"It must read views of up to {reader.positions} tokens, and an empty list"
    with say.calling("reading", cure), reader.open(info) as read:
        found = read(views)
    say.require(
        len(found) == len(views),
        f"it returns statistics of {len(found)} views for {len(views)}",
        "Return one TokenStats for each view, in their order",
    )
    total = sum(len(view.input_ids) for view in views)
    say.require(
        sum(reported) == total,
        f"it reports progress over {sum(reported)} tokens of {total}",
        "Call info.progress with the number of tokens of the views that have been read, once for each view",
    )
    return found


def _check_stats(reader: Reader, view: View, stats: TokenStats, say: Verdict) -> None:
    tokens = int(view.scored.sum())
    for name in STATISTICS:
        values = getattr(stats, name)
        say.require(
            (values is not None) or name not in reader.statistics,
            f"it offers {name}, but returns none",
            "Return it, or remove it from statistics",
        )
        if values is None:
            continue
        say.require(
            isinstance(values, np.ndarray)
            and values.shape[:1] == (tokens,)
            and values.ndim == 1 + name.startswith("top_"),
            f"{name} is not an array with one number for each of {tokens} scored tokens",
            "Return numpy arrays: one number (top_…: one row) for each True in view.scored, in the order of the tokens",
        )
        low, high = _BOUNDS[name]
        say.require(
            bool(np.isfinite(values).all() and (values >= low - 1e-6).all() and (values <= high + 1e-4).all()),
            f"{name} is not between {low} and {high} everywhere",
            "Surprisal is -log p in nats, rank counts from 1; NaN means that something went wrong",
        )
    say.require(
        stats.surprisal.dtype == np.float32, f"surprisal is {stats.surprisal.dtype}", "Convert it to numpy's float32"
    )
    cost = len(view.input_ids) if stats.cost is None else stats.cost
    say.require(
        0 <= cost <= len(view.input_ids) + 1e-6,
        f"the cost of a view of {len(view.input_ids)} tokens is {cost}",
        "Return how many tokens the reader processed for the view: 0 if it knew the view, at most all of them",
    )


_BOUNDS = {
    "surprisal": (0.0, np.inf),
    "rank": (1.0, np.inf),
    "ties": (0.0, np.inf),
    "entropy": (0.0, np.inf),
    "top1": (0.0, 1.0),
    "sum_p2": (0.0, 1.0),
    "near_first": (-1.0, 1.0),
    "near_second": (-1.0, 1.0),
    "top50": (0.0, 1.0),
    "top50_sum_p2": (0.0, 1.0),
    "top_ids": (0.0, np.inf),
    "top_logprobs": (-np.inf, 0.0),
}


def _require_same(
    one: Collection[TokenStats],
    other: Collection[TokenStats],
    tolerance: float,
    say: Verdict,
    problem: str,
    cure: str,
) -> None:
    for mine, yours in zip(one, other, strict=True):
        for name in STATISTICS:
            left, right = getattr(mine, name), getattr(yours, name)
            if left is None or right is None or name == "ties":
                same = (left is None) == (right is None)
            elif name in ("rank", "top_ids"):
                same = bool(np.mean(np.abs(left - right) > 0.5) <= FLIPPED_RANKS)
            else:
                same = np.allclose(left, right, rtol=tolerance, atol=tolerance)
            say.require(same, f"{problem} ({name})", cure)


def _views(positions: float, vocabulary: int, rng: np.random.Generator) -> list[View]:
    """Short and long views with one, half, a third or all tokens scored. Some share a beginning."""
    longest = int(min(positions, 24))
    start = rng.integers(vocabulary, size=longest // 2)
    views = []
    for number in range(12):
        length = int(rng.integers(2, longest + 1))
        input_ids = rng.integers(vocabulary, size=length)
        if number % 3 == 0:
            input_ids = np.concatenate([start, rng.integers(vocabulary, size=longest - len(start))])
        places = np.arange(len(input_ids))
        scored = [places == len(input_ids) - 1, places >= len(input_ids) // 2, places % 3 == 1][number % 3]
        if number == 1:
            scored = places > 0
        views.append(View(input_ids=input_ids, scored=scored))
    if positions <= LONGEST:
        input_ids = rng.integers(vocabulary, size=int(positions))
        views.append(View(input_ids=input_ids, scored=np.arange(len(input_ids)) > 0))
    return views


def _without_tail(view: View) -> View:
    """The view up to its last scored token."""
    stop = int(np.flatnonzero(view.scored)[-1]) + 1
    return View(input_ids=view.input_ids[:stop], scored=view.scored[:stop], reader=view.reader, shared=view.shared)
