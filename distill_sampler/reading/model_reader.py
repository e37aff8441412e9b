"""A causal language model of transformers in this process, as a reader: the student, or a frozen teacher beside it.

1. *A batch is limited in tokens, not in rows*: up to `batch_tokens`, padding included. Views are sorted by length, the
   longest first, so that a lack of memory or time shows at once.
2. *A prompt is read once* for all views that begin with it, where that saves at least a fifth of their tokens.
3. *The batch size is found, not configured*: it starts from the free memory, and halves when memory runs out.
4. *Every process runs the same number of forward passes*: a sharded model gathers its weights in each, so all processes
   must take part.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
from distill_sampler.reading.forward import Forward, reading
from distill_sampler.reading.layers import not_compilable
from distill_sampler.reading.lengths import positions
from distill_sampler.reading.sharing import Prefix, can_share
from distill_sampler.reading.structure import decoder_of, unwrap
from distill_sampler.reading.token_stats import EXTRAS, Impl, available, fastest, free_memory, usual_batch_tokens
from distill_sampler.serialize import digest, hash_of
from distill_sampler.types import IntArray, TokenStats, View
from distill_sampler.watch import begin_forward

logger = logging.getLogger(__name__)

_BLOCK_BATCHES = 4
"""How many batches of samples are read, sorted and reported together. With more, shared prompts would need a little
less padding (2 % from 4 to 8), but results would be reported, and saved for an interrupted pass, less often."""

_IDLE = View(input_ids=np.zeros(2, np.int64), scored=np.array([False, True]))
"""What a process reads while others still have batches, so that all take part in every forward pass."""


_REPORTED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""What has been logged about each model and must not be logged again."""


class ModelReader(Reader):
    """Reads with a causal language model of transformers, bare or wrapped for training.

    Args:
        model: the model as the host calls it.
        frozen: whether its weights never change. A teacher's do not; the student's do.
        tokenizer: the model's tokenizer; None if it is the student's.
        batch_tokens: tokens in a batch, padding included; None: derived from the free memory.
        ties: how tokens with exactly the same logit count in ranks, `"strict"` or `"mid"` (see `Scorer`).
        share_prompts: read a prompt that several views begin with only once.
        impl: how logits become statistics (see `token_stats`).
        top_k: how many of the likeliest tokens are given for each place (`TokenStats.top_ids`).
        compile_layers: run the layers compiled, where that is possible (see `Scorer`).

    Raises:
        ValueError: the model is not a causal language model of transformers, or has no output head.
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
        top_k: int = 0,
        compile_layers: bool = False,
    ) -> None:
        unwrap(model)
        self.model = model
        self.reported = _REPORTED.setdefault(model, set())
        """What has been logged about this model and must not be logged again."""
        self._frozen = frozen
        self._tokenizer = tokenizer
        self._batch_tokens = batch_tokens
        self._ties = ties
        self._impl = impl
        self._top_k = top_k
        self._compile_layers = compile_layers
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
        """The number of columns of its logits."""
        return int(unwrap(self.model).config.get_text_config().vocab_size)

    @property
    def frozen(self) -> bool:
        return self._frozen

    @cached_property
    def identity(self) -> str:
        """For a frozen model its class, numerics and a hash of all its weights; for the student `"student"`."""
        if not self._frozen:
            return "student"
        student = unwrap(self.model)
        return f"{type(student).__name__} {weights_hash(self.model)} {digest(dict(self.numerics))}"

    @property
    def weights(self) -> str:
        """16 hex digits that change when training changes the weights: a hash of 16 weights of each parameter.

        For a sharded model, of the weights that this process holds.
        """
        return weights_hash(self.model, sampled=True)

    @property
    def numerics(self) -> dict[str, str]:
        """The settings besides the weights that change the numbers by more than the rounding of the last bits.

        Runs one small forward pass, so with several processes all must call it.

        Returns:
            `dtype` (what the model computes in, autocast included), `head` (how the product with the output head is
            computed), `operands` (the dtypes of its factors, hidden states first), `float32_products` (how torch
            computes products of float32 matrices, such as `"tf32"`), `ties` (the rule), and `layers` and `quantization`
            where layers are compiled or weights quantised.
        """
        with reading(self.model, mid_ranks=self._ties == "mid", compile_layers=self._compiles) as forward:
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
        """Tokens in a batch: the smallest of the processes' budgets, because all must form the same blocks."""
        return self._batch_tokens or -self.ranks.max_over_ranks(-_affordable_tokens(self.model, self.device))

    @property
    def block_tokens(self) -> int:
        return _BLOCK_BATCHES * self.budget * self.ranks.world_size

    @property
    def shares_prompts(self) -> bool:
        # a cache of keys and values would make each layer compile anew
        return self._share_prompts and not self._compiles

    @property
    def _compiles(self) -> bool:
        """Whether the layers run compiled: it is wanted, and possible on every process. All must ask for it."""
        if not self._compile_layers:
            return False
        reason = not_compilable(decoder_of(unwrap(self.model)))
        if not reason and available("compiled", self.device) != "compiled":
            reason = "torch.compile does not work on this machine"
        if reason and "layers" not in self.reported:
            self.reported.add("layers")
            logger.warning("compile_layers=True: the layers run as they are, because %s.", reason)
        return not self.ranks.max_over_ranks(int(bool(reason)))

    @contextmanager
    def open(self, info: PassInfo) -> Iterator[Read]:
        """Open the model in evaluation mode and without gradients. Its state is restored afterwards."""
        logits = info.tokens * self.vocabulary
        impl = fastest(self.device, logits) if self._impl == "auto" else available(self._impl, self.device)
        with reading(
            self.model,
            extras=info.statistics,
            impl=impl,
            mid_ranks=self._ties == "mid",
            top_k=self._top_k,
            compile_layers=self._compiles,
        ) as forward:
            sharing = self._sharing if self.shares_prompts else False
            session = _Session(forward, info, self.ranks, budget=self.budget, sharing=sharing)
            try:
                yield session.read
            finally:
                self._sharing = session.sharing


class _Session:
    """One pass with the model. It remembers the batch size, and whether prompts can be shared."""

    def __init__(self, forward: Forward, info: PassInfo, ranks: Ranks, *, budget: int, sharing: bool | None) -> None:
        self.sharing = sharing
        """Whether prompts may be shared; None: not tried yet."""
        self._forward = forward
        self._info = info
        self._ranks = ranks
        self._budget = budget
        self._due = 0
        """Forward passes that this process still has to take part in."""

    def read(self, views: Sequence[View]) -> list[TokenStats]:
        """The statistics of all views. Every process must call it the same number of times.

        Usually one round of forward passes. If continuing a shared prompt fails, or memory runs out, another round
        reads what is left; all processes take part in it.
        """
        stats: dict[int, TokenStats] = {}
        over = False
        while not over:
            places = np.array([place for place in range(len(views)) if place not in stats], np.int64)
            plan = [wave.renumbered(places) for wave in self._plan([views[place] for place in places])]
            # agreed before the first forward pass: later, other processes may be waiting for this one inside a forward
            self._due = self._ranks.max_over_ranks(sum(len(wave.batches) + bool(wave.prompts) for wave in plan))
            shared = self.sharing
            done = self._follow(plan, views, stats)
            # outside of the exception handlers, so that no traceback keeps a failed pass's tensors alive
            if not done and self._forward.device.type == "cuda":
                torch.cuda.empty_cache()
            while self._due:
                self._begin([_IDLE])()
            trouble = self._ranks.max_over_ranks(2 if self.sharing is not shared else int(not done))
            if trouble == 2:
                self.sharing = False
            over = not trouble
        return [stats[place] for place in range(len(views))]

    def _follow(self, plan: Sequence[Wave], views: Sequence[View], stats: dict[int, TokenStats]) -> bool:
        """Read the waves of a plan. False if that failed; the next try has smaller batches or whole sequences."""
        for wave in plan:
            try:
                self._read_wave(wave, views, stats)
            except torch.OutOfMemoryError:
                longest = max(len(view.input_ids) for place, view in enumerate(views) if place not in stats)
                if self._ranks.world_size > 1 or self._budget <= longest:
                    raise  # other processes wait inside their forward passes; or this was a single sequence already
                self._budget //= 2
                logger.warning("Out of memory: from now on, batches have at most %d tokens.", self._budget)
                return False
            except Exception as error:
                if not wave.prompts:
                    raise
                self.sharing = False
                logger.warning(
                    "From now on, sequences are read whole, because continuing a shared prompt failed: %s: %s",
                    type(error).__name__,
                    error,
                )
                return False
        return True

    def _read_wave(self, wave: Wave, views: Sequence[View], stats: dict[int, TokenStats]) -> None:
        """Read a wave. An accelerator always has the next batch to compute while this one's statistics are taken."""
        sharing = Counter(wave.row.values())
        prefix = self._prefix(wave.prompts) if wave.prompts else None
        begun: list[tuple[Sequence[int], Callable[[], list[TokenStats]]]] = []

        def take() -> None:
            batch, found = begun.pop(0)
            for place, read in zip(batch, found(), strict=True):
                saved = len(wave.prompts[wave.row[place]]) * (1 - 1 / sharing[wave.row[place]]) if prefix else 0
                stats[place] = replace(read, cost=float(len(views[place].input_ids) - saved))
            self._info.progress(sum(len(views[place].input_ids) for place in batch))

        try:
            for batch in wave.batches:
                rows = [wave.row[place] for place in batch] if prefix else ()
                begun.append((batch, self._begin([views[place] for place in batch], prefix, rows)))
                if len(begun) == 2:
                    take()
        finally:  # what was read before an error too
            while begun:
                take()

    def _begin(self, *read: Any) -> Callable[[], list[TokenStats]]:
        self._due -= 1
        begin_forward()
        return self._forward.begin(*read)

    def _prefix(self, prompts: Sequence[IntArray]) -> Prefix:
        self._due -= 1
        begin_forward()
        return self._forward.prefix(prompts)

    def _plan(self, views: Sequence[View]) -> list[Wave]:
        """The waves to read. The first time that some process would gain by sharing prompts, a trial is run."""
        apart = self._forward.switches_at
        prompts = [view.shareable if len(view.shareable) else None for view in views]
        planned = list(waves(views, prompts, self._budget, apart=apart))
        if self.sharing is None and self._ranks.max_over_ranks(int(any(wave.prompts for wave in planned))):
            # the trial may cost a tenth of the pass, and no more than a batch
            tokens = min(self._budget, self._info.tokens // 10)
            can = can_share(self._forward, self._info.examples, tokens=tokens)
            self.sharing = not self._ranks.max_over_ranks(int(not can))  # if it fails on one process, none shares
        if self.sharing is False:
            return list(waves(views, [None] * len(views), self._budget, apart=apart))
        return planned


def weights_hash(model: nn.Module, *, sampled: bool = False) -> str:
    """16 hex digits: a hash of a model's weights, all of them or 16 of each parameter.

    For a sharded model, of the weights that this process holds.
    """
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
    """How many tokens of a batch should fit in half of the free memory: a power of two, so that it seldom changes.

    No more than usual: larger batches of few samples need more padding.
    """
    usual = usual_batch_tokens(device)
    if device.type != "cuda":
        return usual
    # without gradients, a token needs the activations of about one layer, and some memory for keys, values and masks
    hidden = int(unwrap(model).config.get_text_config().hidden_size)
    tokens = free_memory(device) // 2 // (64 * hidden * next(model.parameters()).element_size())
    return int(np.clip(2 ** int(np.log2(max(tokens, 1))), 1024, usual))
