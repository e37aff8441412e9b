"""Prompts that are read once: the cache that sequences continue from, and whether a model does that exactly.

A trial decides, once for each student. Prompts are shared only if

1. copying the cache is known to copy everything in it (`_KNOWN`), so that no forward writes into what is kept;
2. five sequences that continue three prompts of different lengths have the same statistics as when they are read whole
   (every statistic that the pass needs), twice in a row; one of the prompts is longer than the sliding window, where
   that costs little;
3. no error is raised, in the trial or later.

Otherwise sequences are read whole, which is always right and costs only time.
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
"""Classes of caches and cache layers that hold only tensors. Selecting rows and adding tokens replace these tensors and
never change them in place. They are listed by name, because this package imports no host. Subclasses do not count,
because they may hold more."""

_ERROR = 1e-4
"""Largest difference of a statistic (nats), for any token, at which a shared prompt counts as exact, in float32."""
_ERROR_LOW_PRECISION = 0.05
"""Largest mean difference in low precision, where the model's own rounding makes one. A single token may differ by ten
times as much. A prompt that is ignored or misplaced changes any real model's surprisals by tenths of nats."""

_PROMPTS = (13, 22, 6)
"""Lengths of the prompts of the trial, in tokens."""
_ROWS = (1, 0, 1, 2, 0)
"""Which prompt each sequence of the trial continues: out of order and with repeats, to reveal a cache whose rows were
not selected."""
_CONTINUATIONS = (8, 4, 6, 7, 5)
"""Lengths of the continuations, in tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """Prompts that have been read, for sequences that begin with them."""

    cache: Any
    """Keys and values of all layers, `[prompts, ..., longest, ...]`, as the model made them."""
    mask: Tensor
    """`[prompts, longest]` 1 where there is a token. Prompts are padded on the left, so that the distances from a
    continuation to its prompt are right."""
    lengths: IntArray
    """`[prompts]` tokens of each prompt."""

    def take(self, rows: Sequence[int]) -> tuple[Any, Tensor, IntArray]:
        """Cache, mask and lengths for sequences that continue these prompts. The cache may be written to.

        Raises:
            ValueError: copying a cache of this class is not known to copy everything in it.
        """
        for part in (self.cache, *getattr(self.cache, "layers", ())):
            kind = f"{type(part).__module__}.{type(part).__qualname__}"
            if kind not in _KNOWN:
                raise ValueError(f"it is not known whether a copy of {kind} is complete.")
        places = torch.tensor(rows, device=self.mask.device)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(places)  # makes new tensors
        return cache, self.mask[places], self.lengths[np.asarray(rows)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """The sequences of the trial that shows whether prompts can be shared."""

    prompts: Sequence[IntArray]
    """The tokens of each prompt."""
    views: Sequence[View]
    """The sequences, prompts included."""
    rows: Sequence[int]
    """For each view, the number of its prompt."""


def trial(examples: Sequence[View], *, positions: float, window: int = 0) -> Trial | None:
    """Make prompts and continuations from the tokens of some views. None without examples, or with too few positions.

    Args:
        examples: views like those to come, in the same order on every process.
        positions: how many tokens the model can read at once.
        window: one of the prompts is made longer than this many tokens.
    """
    longest = [*_PROMPTS]
    longest[0] += window
    if not examples or positions < max(longest) + max(_CONTINUATIONS):
        return None
    some = [examples[place].input_ids for place in (0, len(examples) // 2, len(examples) - 1)]
    # each prompt starts at another place of its text, because the first tokens of texts are often the same
    prompts = [np.resize(ids[number * len(ids) // 4 :], longest[number]) for number, ids in enumerate(some)]
    views = []
    for number, (row, length) in enumerate(zip(_ROWS, _CONTINUATIONS, strict=True)):
        rest = np.resize(np.roll(some[number % 3], -number), length)
        # the last token of a shared prompt predicts the first token after it, which must not be scored
        scored = np.arange(len(prompts[row]) + length) > len(prompts[row])
        views.append(View(input_ids=np.concatenate([prompts[row], rest]), scored=scored))
    return Trial(prompts=prompts, views=views, rows=_ROWS)


def can_share(forward: Forward, examples: Sequence[View], *, tokens: int) -> bool:
    """Whether continuing prompts that were read before gives the same statistics as whole sequences.

    Runs up to four small forwards. A model may have no cache, or a cache that cannot be continued exactly (recurrent
    layers, positions that are counted from the start of the input, ...). Any difference and any error means no.

    Args:
        forward: the student.
        examples: views like those to come.
        tokens: the largest batch that may be spent on a prompt longer than the student's sliding window.
    """
    if forward.switches_at < math.inf or forward.virtual:
        return False  # a token's state depends on the length of the whole input, or on virtual tokens before it
    past = len(_ROWS) * (forward.window + max(_PROMPTS) + max(_CONTINUATIONS))
    window = forward.window if past <= tokens else 0
    tried = trial(examples, positions=forward.positions, window=window)
    if tried is None:
        return False
    try:
        whole = forward(tried.views)
        prefix = forward.prefix(tried.prompts)
        for _ in range(2):  # the second time shows whether the first one changed the kept prompts
            reason = _difference(whole, forward(tried.views, prefix, tried.rows), forward.exact)
            if reason:
                break
    except Exception as error:  # models that cannot continue a cache raise errors of all kinds
        reason = f"{type(error).__name__}: {error}"
    if reason:
        logger.info("Prompts are not shared: %s", reason)
    return not reason


def _difference(whole: Sequence[TokenStats], shared: Sequence[TokenStats], exact: bool) -> str:
    """Which statistic differs, in words; empty if none does.

    Args:
        whole: the statistics of the sequences read whole.
        shared: the statistics of the same sequences as continuations.
        exact: whether everything is computed in float32.
    """
    for name in (field.name for field in fields(TokenStats)):
        if getattr(whole[0], name) is None or name == "ties":
            continue
        before, after = (
            np.concatenate([getattr(one, name) for one in some]).astype(np.float64) for some in (whole, shared)
        )
        errors = np.abs(after - before)
        if name == "rank":
            # two tokens whose logits differ by rounding alone may swap ranks
            same = not exact or (errors <= 1 + before / 1000).all()
        elif exact:
            same = errors.max() <= _ERROR
        else:
            same = errors.mean() <= _ERROR_LOW_PRECISION and errors.max() <= 10 * _ERROR_LOW_PRECISION
        if not same:
            return f"{name} would change by {errors.mean():.2g} on average, by {errors.max():.2g} at most."
    return ""
