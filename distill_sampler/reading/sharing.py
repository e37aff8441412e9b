"""Prompts that are read once: the cache that sequences go on from, and whether a model does so exactly.

Whether it does is found out by trying, once for each student, and the answer fails closed. Prompts are shared only if

1. the cache is of a kind whose layers are known to be copied whole (`_KNOWN`), so that nothing is written or permuted
   in place in what is kept;
2. five sequences that go on from three prompts of different length, with one of the prompts past the sliding window
   where that costs little, have the statistics of whole sequences (every one that the pass asks for), twice in a row;
3. nothing raises, then or later.

Everything else is read whole, which is never wrong and costs only time.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distill_sampler.types import IntArray, TokenStats, View

if TYPE_CHECKING:
    from distill_sampler.reading.forward import Forward

logger = logging.getLogger(__name__)

_KNOWN = {
    f"transformers.cache_utils.{name}"
    for name in ("DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer")
}
"""Caches and their layers that hold nothing but tensors which selecting rows and adding tokens replace, never change.
By name: this package imports no host. Subclasses are other kinds, because they may hold more."""

_ERROR = 1e-4
"""Difference of a statistic (nats) up to which a shared prompt counts as the same, for every token, in float32."""
_ERROR_LOW_PRECISION = 0.05
"""Mean difference in low precision, where it is the rounding of the model; a single token may differ by ten times as
much. A prompt that is ignored or misplaced costs tenths of nats in any model that reads at all."""

_PROMPTS = (13, 22, 6)
"""Tokens of the prompts that are tried."""
_ROWS = (1, 0, 1, 2, 0)
"""Which prompt each of the sequences goes on from: out of order, and two of them twice, so that a cache whose rows are
left where they were shows."""
_CONTINUATIONS = (8, 4, 6, 7, 5)
"""Tokens of the sequences after their prompts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """Prompts that have been read, for sequences that begin with them."""

    cache: Any
    """Keys and values of all layers, `[prompts, ..., longest, ...]`, as the model made them."""
    mask: Tensor
    """`[prompts, longest]` 1 where there is a token. Prompts are padded on the left, so that distances are right."""
    lengths: IntArray
    """`[prompts]` tokens."""

    def take(self, rows: Sequence[int]) -> tuple[Any, Tensor, IntArray]:
        """Cache, mask and lengths for sequences that continue these prompts. The cache may be written to.

        Raises:
            ValueError: the cache is of a kind that is not known to be copied whole.
        """
        for part in (self.cache, *getattr(self.cache, "layers", ())):
            kind = f"{type(part).__module__}.{type(part).__qualname__}"
            if kind not in _KNOWN:
                raise ValueError(f"{kind} is not a cache that is known to be copied whole.")
        places = torch.tensor(rows, device=self.mask.device)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(places)  # into tensors of its own
        return cache, self.mask[places], self.lengths[np.asarray(rows)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """Sequences to find out with whether prompts can be shared."""

    prompts: Sequence[IntArray]
    views: Sequence[View]
    rows: Sequence[int]
    """For each view the number of its prompt."""


def trial(examples: Sequence[View], *, positions: float, window: int = 0) -> Trial | None:
    """Prompts and continuations made of the tokens of some views. None if there are none, or too few positions.

    Args:
        examples: views like those to come, in an order that is the same on every process.
        positions: tokens that the model can read at once.
        window: makes one of the prompts longer than so many tokens.
    """
    longest = [*_PROMPTS]
    longest[0] += window
    if not examples or positions < max(longest) + max(_CONTINUATIONS):
        return None
    some = [examples[place].input_ids for place in (0, len(examples) // 2, len(examples) - 1)]
    # each from another place of its text: the first tokens are often the same everywhere
    prompts = [np.resize(ids[number * len(ids) // 4 :], longest[number]) for number, ids in enumerate(some)]
    views = []
    for number, (row, length) in enumerate(zip(_ROWS, _CONTINUATIONS, strict=True)):
        rest = np.resize(np.roll(some[number % 3], -number), length)
        # the last token of a prompt that is shared predicts none that counts
        scored = np.arange(len(prompts[row]) + length) > len(prompts[row])
        views.append(View(input_ids=np.concatenate([prompts[row], rest]), scored=scored))
    return Trial(prompts=prompts, views=views, rows=_ROWS)


def can_share(forward: Forward, examples: Sequence[View], *, tokens: int) -> bool:
    """Whether going on from prompts that were read before gives what whole sequences give. Four small forwards.

    A model may have no cache, or one that does not take up where it left off (recurrent layers, positions that are
    counted from the start of the input, ...); then whatever happens here, the answer is no.

    Args:
        forward: the student.
        examples: views like those to come.
        tokens: the largest batch that may be spent on a prompt that is longer than the student's sliding window.
    """
    if forward.switches_at < math.inf or forward.virtual:
        return False  # what a token's state is depends on the length of the whole input, or on tokens before it
    past = len(_ROWS) * (forward.window + max(_PROMPTS) + max(_CONTINUATIONS))
    window = forward.window if past <= tokens else 0
    tried = trial(examples, positions=forward.positions, window=window)
    if tried is None:
        return False
    try:
        whole = forward(tried.views)
        prefix = forward.prefix(tried.prompts)
        for _ in range(2):  # the second time shows whether the first one left the prompts as they were
            reason = _difference(whole, forward(tried.views, prefix, tried.rows), forward.exact)
            if reason:
                break
    except Exception as error:  # a model that cannot says so in its own way
        reason = f"{type(error).__name__}: {error}"
    if reason:
        logger.info("Prompts are not shared: %s", reason)
    return not reason


def _difference(whole: Sequence[TokenStats], shared: Sequence[TokenStats], exact: bool) -> str:
    """What of the statistics would change, in words; empty if nothing does.

    Args:
        exact: whether float32 is all that rounds.
    """
    for name in (field.name for field in fields(TokenStats)):
        if getattr(whole[0], name) is None or name == "ties":
            continue
        before, after = (
            np.concatenate([getattr(one, name) for one in some]).astype(np.float64) for some in (whole, shared)
        )
        errors = np.abs(after - before)
        if name == "rank":
            # two tokens whose logits are equal up to rounding may change places
            same = not exact or (errors <= 1 + before / 1000).all()
        elif exact:
            same = errors.max() <= _ERROR
        else:
            same = errors.mean() <= _ERROR_LOW_PRECISION and errors.max() <= 10 * _ERROR_LOW_PRECISION
        if not same:
            return f"{name} would change by {errors.mean():.2g} on average, by {errors.max():.2g} at most."
    return ""
