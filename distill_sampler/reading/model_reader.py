"""A causal language model of transformers in this process, as a reader: the student, or a frozen teacher beside it.

1. *Batches hold tokens, not rows*: sorted by length, the longest first (running out of memory or time shows at once),
   up to `batch_tokens` of them, padding included.
2. *A prompt is read once* for all views that begin with it, where that saves at least a fifth of their tokens.
3. *Memory is found, not asked for*: the budget starts from what is free, and halves when that was not enough.
4. *Every process runs equally many forward passes*: sharded models gather their weights in each, so all must take part.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from distill_sampler.distributed import Ranks
from distill_sampler.protocols import PassInfo, Read, Reader
from distill_sampler.reading.batching import Wave, waves
from distill_sampler.reading.forward import Forward, reading, unwrap
from distill_sampler.reading.lengths import positions
from distill_sampler.reading.sharing import Prefix, can_share
from distill_sampler.reading.token_stats import EXTRAS, Impl, available, fastest
from distill_sampler.serialize import digest, hash_of
from distill_sampler.types import IntArray, TokenStats, View

logger = logging.getLogger(__name__)

_BLOCK_BATCHES = 4
"""Batches whose samples are read, sorted and reported together. More would pad a little less where prompts are shared
(2 % from 4 to 8) and report, and keep for an interrupted pass, more rarely."""

_IDLE = View(input_ids=np.zeros(2, np.int64), scored=np.array([False, True]))
"""What a process reads while others still have batches, so that all take part in every forward pass."""


_SAID: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


class ModelReader(Reader):
    """Reads with a causal language model of transformers, wrapped for training or not.

    Args:
        model: the model as the host calls it.
        frozen: whether its weights never change, as a teacher's. The student's do.
        tokenizer: turns text into its tokens; None if it has the student's.
        batch_tokens: tokens in a batch, padding included; None: found from the free memory.
        ties: how tokens with exactly the same logit count in ranks, `"strict"` or `"mid"` (see `Scorer`).
        share_prompts: read a prompt that several views begin with once.
        impl: how logits become statistics (see `token_stats`).

    Raises:
        ValueError: it is no causal language model of transformers, or has no output head.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        frozen: bool = True,
        tokenizer: Any = None,
        batch_tokens: int | None = None,
        ties: Literal["strict", "mid"] = "strict",
        share_prompts: bool = True,
        impl: Literal["auto"] | Impl = "auto",
    ) -> None:
        unwrap(model)
        self.model = model
        self.said = _SAID.setdefault(model, set())
        """What has been reported of this model once and need not be again."""
        self._frozen = frozen
        self._tokenizer = tokenizer
        self._batch_tokens = batch_tokens
        self._ties = ties
        self._impl = impl
        self._share_prompts = share_prompts
        self._sharing: bool | None = None if share_prompts else False
        """Whether this model can share prompts; None: not tried yet."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def ranks(self) -> Ranks:
        """The processes that train this model."""
        return Ranks.current(self.device)

    @property
    def vocabulary(self) -> int:
        """Columns of its logits."""
        return int(unwrap(self.model).config.get_text_config().vocab_size)

    @property
    def frozen(self) -> bool:
        return self._frozen

    @cached_property
    def identity(self) -> str:
        """For a frozen model its class, configuration and all weights, by content; for the student just that."""
        if not self._frozen:
            return "student"
        student = unwrap(self.model)
        return f"{type(student).__name__} {weights_hash(self.model)} {digest(dict(self.numerics))}"

    @property
    def weights(self) -> str:
        """16 hex digits that tell these weights from those after a training step: of 16 weights of each parameter.

        Of a sharded model, those that this process holds.
        """
        return weights_hash(self.model, sampled=True)

    @property
    def numerics(self) -> dict[str, str]:
        """What, besides the weights, decides the numbers beyond rounding in the last bits.

        Found with one small forward pass: with several processes all must ask.

        Returns:
            `dtype` (what the model computes in, autocast included), `head` (how the product with the output head is
            made), `operands` (the dtypes of what it multiplies, hidden states first), `float32_products` (`"tf32"`
            where torch is told to round those), `ties` (the rule), and `quantization` where there is one.
        """
        with reading(self.model, mid_ranks=self._ties == "mid") as forward:
            return forward.numerics

    @property
    def positions(self) -> float:
        return positions(unwrap(self.model))

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("surprisal", "rank", "ties", *EXTRAS)

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def budget(self) -> int:
        """Tokens in a batch: the smallest of the processes' budgets, because all must cut the same blocks."""
        return self._batch_tokens or -self.ranks.max_over_ranks(-_affordable_tokens(self.model, self.device))

    @property
    def block_tokens(self) -> int:
        return _BLOCK_BATCHES * self.budget * self.ranks.world_size

    @property
    def shares_prompts(self) -> bool:
        return self._share_prompts

    @contextmanager
    def open(self, info: PassInfo) -> Iterator[Read]:
        """The model in evaluation mode, without gradients; everything is as before afterwards."""
        logits = info.tokens * self.vocabulary
        impl = fastest(self.device, logits) if self._impl == "auto" else available(self._impl, self.device)
        with reading(self.model, extras=info.statistics, impl=impl, mid_ranks=self._ties == "mid") as forward:
            session = _Session(forward, info, self.ranks, budget=self.budget, sharing=self._sharing)
            try:
                yield session.read
            finally:
                self._sharing = session.sharing


class _Session:
    """One pass: what stays the same from block to block, and what is found out on the way."""

    def __init__(self, forward: Forward, info: PassInfo, ranks: Ranks, *, budget: int, sharing: bool | None) -> None:
        self.sharing = sharing
        """Whether prompts may be shared; None: nobody wanted to yet."""
        self._forward = forward
        self._info = info
        self._ranks = ranks
        self._budget = budget
        self._due = 0
        """Forward passes that this process still has to take part in."""

    def read(self, views: Sequence[View]) -> list[TokenStats]:
        """The statistics of all views. Every process calls this equally often.

        Normally one round. Where going on from a shared prompt fails, or memory runs out, what was not read yet is read
        in another one; all processes take part in it.
        """
        stats: dict[int, TokenStats] = {}
        over = False
        while not over:
            places = np.array([place for place in range(len(views)) if place not in stats], np.int64)
            plan = [wave.renumbered(places) for wave in self._plan([views[place] for place in places])]
            # agreed on before the first forward pass: afterwards, others may still wait for this process inside one
            self._due = self._ranks.max_over_ranks(sum(len(wave.batches) + bool(wave.prompts) for wave in plan))
            shared = self.sharing
            done = self._follow(plan, views, stats)
            # outside of the handlers, where no traceback holds a failed pass's tensors any more
            if not done and self._forward.device.type == "cuda":
                torch.cuda.empty_cache()
            while self._due:
                self._forwards([_IDLE])
            trouble = self._ranks.max_over_ranks(2 if self.sharing is not shared else int(not done))
            if trouble == 2:
                self.sharing = False
            over = not trouble
        return [stats[place] for place in range(len(views))]

    def _follow(self, plan: Sequence[Wave], views: Sequence[View], stats: dict[int, TokenStats]) -> bool:
        """Read what is planned. Whether that went to the end; if not, a second try will go another way."""
        for wave in plan:
            sharing = Counter(wave.row.values())
            try:
                prefix = self._prefix(wave.prompts) if wave.prompts else None
                for batch in wave.batches:
                    rows = [wave.row[place] for place in batch] if prefix else ()
                    found = self._forwards([views[place] for place in batch], prefix, rows)
                    for number, (place, read) in enumerate(zip(batch, found, strict=True)):
                        saved = len(wave.prompts[rows[number]]) * (1 - 1 / sharing[rows[number]]) if rows else 0
                        stats[place] = replace(read, cost=float(len(views[place].input_ids) - saved))
                    self._info.progress(sum(len(views[place].input_ids) for place in batch))
            except torch.OutOfMemoryError:
                longest = max(len(view.input_ids) for place, view in enumerate(views) if place not in stats)
                if self._ranks.world_size > 1 or self._budget <= longest:
                    raise  # others wait inside their forward passes; or this was a single sequence already
                self._budget //= 2
                logger.warning("Out of memory: batches are at most %d tokens from here on.", self._budget)
                return False
            except Exception as error:
                if not wave.prompts:
                    raise
                self.sharing = False
                logger.warning(
                    "Sequences are read whole from here on, because going on from a shared prompt failed: %s: %s",
                    type(error).__name__,
                    error,
                )
                return False
        return True

    def _forwards(self, *read: Any) -> list[TokenStats]:
        self._due -= 1
        return self._forward(*read)

    def _prefix(self, prompts: Sequence[IntArray]) -> Prefix:
        self._due -= 1
        return self._forward.prefix(prompts)

    def _plan(self, views: Sequence[View]) -> list[Wave]:
        """What is read with what. Whether prompts can be shared is tried when some process would first gain by it."""
        apart = self._forward.switches_at
        prompts = [view.shareable if len(view.shareable) else None for view in views]
        planned = list(waves(views, prompts, self._budget, apart=apart))
        if self.sharing is None and self._ranks.max_over_ranks(int(any(wave.prompts for wave in planned))):
            # a tenth of the pass at most, and no larger than its batches
            tokens = min(self._budget, self._info.tokens // 10)
            can = can_share(self._forward, self._info.examples, tokens=tokens)
            self.sharing = not self._ranks.max_over_ranks(int(not can))  # what fails on one process fails on all
        if self.sharing is False:
            return list(waves(views, [None] * len(views), self._budget, apart=apart))
        return planned


def weights_hash(model: nn.Module, *, sampled: bool = False) -> str:
    """16 hex digits of a model's weights: of all, or of 16 of each parameter. Of a sharded model, those held here."""
    contents: list[bytes] = []
    for name, parameter in model.named_parameters():
        local = parameter.detach()
        flat = (local.to_local() if hasattr(local, "to_local") else local).reshape(-1)
        if sampled and len(flat):
            places = torch.arange(16, device=flat.device) * max(len(flat) - 1, 0) // 15
            flat = flat[places].float()
        contents.append(name.encode())
        contents.append(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes() if len(flat) else b"")
    return hash_of(*contents)


def _affordable_tokens(model: nn.Module, device: torch.device) -> int:
    """Tokens in a batch that half of the free memory should hold: a power of two, so that it seldom changes."""
    if device.type != "cuda":
        return 2048 if device.type == "cpu" else 16384
    # without gradients a token takes the activations of about one layer, and some for keys, values and masks
    hidden = int(unwrap(model).config.get_text_config().hidden_size)
    free, _ = torch.cuda.mem_get_info(device)
    tokens = free // 2 // (64 * hidden * next(model.parameters()).element_size())
    return int(2 ** np.clip(np.floor(np.log2(max(tokens, 1))), 10, 16))
