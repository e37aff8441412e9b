"""One forward pass of a causal language model: token sequences in, statistics of their scored tokens out.

Three things make a forward for scoring cheap and safe:

1. *Only scored positions reach the output head.* For the length of a forward the head's `forward` is one that reduces
   the hidden states to statistics (`token_stats`) and returns an empty row of logits. The model is called through its
   root, as the trainer calls it, so wrappers and adapters work as they do in training.
2. *A prompt that several sequences begin with is read once* (`Forward.prefix`); the sequences go on from its keys and
   values. Whether that is exact for this model is found out by trying (`Forward.can_share`).
3. *The student is left as it was* (`reading`): mode of every module, random state, gradients, the head itself.

Padding goes to the right, where causal attention never looks, so whole sequences need no mask.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_sampler.reading.token_stats import (
    Impl,
    LogitTransform,
    Project,
    chunk_for,
    float32_copy,
    linear,
    module,
    token_stats,
)
from distill_sampler.types import IntArray, TokenStats, View

logger = logging.getLogger(__name__)

_SHARING_ERROR = {torch.float32: 1e-4}
_SHARING_ERROR_LOW_PRECISION = 0.05
"""Mean difference in surprisal (nats) up to which a shared prompt counts as the same. In low precision it is the
rounding of the model; a prompt that is ignored or misplaced costs tenths of nats in any model that reads at all."""


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
        """Cache, mask and lengths for sequences that continue these prompts. The cache may be written to."""
        places = torch.tensor(rows, device=self.mask.device)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(places)
        return cache, self.mask[places], self.lengths[np.asarray(rows)]


class Forward:
    """Reads views with a student whose output head is swapped for one that gives statistics. Made by `reading`."""

    def __init__(self, model: nn.Module, *, extras: Collection[str], impl: Impl, mid_ranks: bool) -> None:
        student = unwrap(model)
        self._model = model
        self._head: nn.Module = student.get_output_embeddings()
        self._extras = frozenset(extras)
        self._impl: Impl = impl
        self._mid_ranks = mid_ranks
        self._chunk = chunk_for(student.config.get_text_config().vocab_size)
        self.positions = positions(model)
        self.device = next(model.parameters()).device
        self._dtype = torch.float32  # what the body computes in: seen by the probe
        self.transform = self._probe(type(student).__name__)
        """What the model does to its logits after the head; None: something that cannot be described so."""
        self._plain_head: tuple[Tensor, Project] | None = None
        weight = self._head.weight if self._is_plain else None
        # a weight that is sharded outside of a forward is so to save memory: a whole copy would undo that
        self._upcast = (
            float32_copy(weight)
            if isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.ndim == 2 and len(weight)
            else None
        )

    def __call__(
        self, views: Sequence[View], prefix: Prefix | None = None, rows: Sequence[int] = ()
    ) -> list[TokenStats]:
        """The statistics of each view's scored tokens. One forward of the student.

        Args:
            views: what to read.
            prefix: prompts that the views begin with; none of a prompt's tokens is scored, nor the first after it.
            rows: for each view the number of its prompt in `prefix`.
        """
        starts = np.zeros(len(views), np.int64)
        inputs: dict[str, Any] = {"use_cache": False}
        if prefix is not None:
            cache, mask, starts = prefix.take(rows)
        lengths = np.array([len(view.input_ids) for view in views]) - starts
        longest = int(lengths.max())
        input_ids = np.empty((len(views), longest), np.int64)
        for row, (view, start) in enumerate(zip(views, starts, strict=True)):
            input_ids[row, : lengths[row]] = view.input_ids[start:]
            input_ids[row, lengths[row] :] = view.input_ids[0]  # never looked at
        if prefix is not None:
            place = np.minimum(np.arange(longest), lengths[:, None] - 1) + starts[:, None]
            inputs = {
                "use_cache": True,
                "past_key_values": cache,
                "attention_mask": torch.cat([mask, mask.new_ones(input_ids.shape)], 1),
                "position_ids": torch.from_numpy(place).to(self.device),
            }
        # the state at place t predicts token t + 1, so token (row, t) is predicted at flat place row * longest + t - 1
        targets = np.concatenate(
            [
                row * longest + np.flatnonzero(view.scored[start:])
                for row, (view, start) in enumerate(zip(views, starts, strict=True))
            ]
        )
        stats = self._run(
            torch.from_numpy(input_ids).to(self.device), torch.from_numpy(targets).to(self.device), inputs
        )
        if self._mid_ranks:
            stats["rank"] = stats["rank"] + stats["ties"] / 2
        bounds = np.cumsum([int(view.scored.sum()) for view in views])[:-1]
        pieces = {name: np.split(values.cpu().numpy(), bounds) for name, values in stats.items()}
        return [token_stats_of({name: pieces[name][row] for name in pieces}) for row in range(len(views))]

    def prefix(self, prompts: Sequence[IntArray]) -> Prefix:
        """Read prompts that views begin with. One forward of the student."""
        lengths = np.array([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        input_ids = np.empty((len(prompts), longest), np.int64)
        for row, prompt in enumerate(prompts):
            input_ids[row, : longest - len(prompt)] = prompt[0]  # never looked at; not a token that others have
            input_ids[row, longest - len(prompt) :] = prompt
        place = np.arange(longest) - (longest - lengths[:, None])
        mask = torch.from_numpy((place >= 0).astype(np.int64)).to(self.device)
        with forward_of(self._head, lambda hidden: hidden.new_zeros(*hidden.shape[:-1], 1)):
            output = self._model(
                input_ids=torch.from_numpy(input_ids).to(self.device),
                attention_mask=mask,
                position_ids=torch.from_numpy(place.clip(min=0)).to(self.device),
                use_cache=True,
            )
        return Prefix(cache=output.past_key_values, mask=mask, lengths=lengths)

    def can_share(self, views: Sequence[View], starts: Sequence[int]) -> bool:
        """Whether going on from prompts that were read before gives what whole sequences give. Three forwards.

        A model may have no cache, or one that does not take up where it left off (recurrent layers, positions that
        are counted from the start of the input, ...); then whatever happens here, the answer is no.
        """
        whole = self(views)
        try:
            prefix = self.prefix([view.input_ids[:start] for view, start in zip(views, starts, strict=True)])
            shared = self(views, prefix, range(len(views)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model that cannot says so in its own way
            logger.info("Prompts are not shared: %s: %s", type(error).__name__, error)
            return False
        errors = np.concatenate([np.abs(a.surprisal - b.surprisal) for a, b in zip(whole, shared, strict=True)])
        limit = _SHARING_ERROR.get(self._dtype, _SHARING_ERROR_LOW_PRECISION)
        if not errors.mean() <= limit:
            logger.info("Prompts are not shared: surprisals would change by %.2g nats on average.", errors.mean())
            return False
        return True

    @property
    def numerics(self) -> dict[str, str]:
        """What, besides the weights, decides the numbers beyond rounding in the last bits."""
        if self.transform is None:
            head = "logits as the model returns them"
        elif self._is_plain:
            head = "float32 product"
        else:
            head = f"product of {type(self._head).__name__}"
        config = unwrap(self._model).config
        quantization = getattr(config, "quantization_config", None)
        method = getattr(quantization, "quant_method", None) or (quantization or {}).get("quant_method", "unknown")
        return {
            "dtype": str(self._dtype).removeprefix("torch."),
            "head": head,
            "ties": "mid" if self._mid_ranks else "strict",
            **({"quantization": str(getattr(method, "value", method))} if quantization else {}),
        }

    @property
    def _is_plain(self) -> bool:
        return type(self._head) is nn.Linear

    def _run(self, tokens: Tensor, flat: Tensor, inputs: dict[str, Any]) -> dict[str, Tensor]:
        def stats(states: Tensor, project: Project) -> dict[str, Tensor]:
            return token_stats(
                states.flatten(0, 1)[flat - 1],
                tokens.flatten()[flat],
                project,
                extras=self._extras,
                chunk=self._chunk,
                impl=self._impl,
            )

        if self.transform is None:  # the model's own logits; the head is the original
            return stats(self._model(input_ids=tokens, **inputs).logits, _own_logits)
        result: list[dict[str, Tensor]] = []
        original = self._head.forward

        def reduce(hidden: Tensor) -> Tensor:
            with torch.autocast(hidden.device.type, enabled=False):
                result.append(stats(hidden, self._project(original)))
            return hidden.new_zeros(*hidden.shape[:-1], 1)

        with forward_of(self._head, reduce):
            self._model(input_ids=tokens, **inputs)
        return result[0]

    def _project(self, original: Callable[[Tensor], Tensor]) -> Project:
        """The head, to be called inside a forward: only there a sharded weight is whole."""
        assert self.transform is not None
        if not self._is_plain:
            return module(original, self.transform)
        weight: Tensor = self._head.weight  # type: ignore[assignment]
        if self._plain_head is None or self._plain_head[0] is not weight:
            bias: Tensor | None = self._head.bias  # type: ignore[assignment]
            self._plain_head = weight, linear(weight, bias, self.transform, upcast=self._upcast)
        return self._plain_head[1]

    def _probe(self, name: str) -> LogitTransform | None:
        """Find out what the model does to its logits after the head, by showing it logits of our own.

        Nothing is read from names in a configuration: the answer is fitted to what comes out, and checked. None if
        it is nothing that `LogitTransform` describes; then the model's own logits are used.
        """
        shown = torch.tensor([-1e6, -60.0, -5.0, -1e-3, 0.0, 1e-3, 0.5, 20.0, 1e6], device=self.device)

        def show(hidden: Tensor) -> Tensor:
            kind = hidden.device.type
            self._dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
            return shown.expand(*hidden.shape[:-1], -1)

        with forward_of(self._head, show):
            # two tokens, because a model may drop or treat the last position specially
            seen = self._model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False)
        seen = seen.logits[0, 0].float()
        if seen.shape == shown.shape:
            scale = float(seen[5] / shown[5])
            cap = float(seen[-1])
            capped = abs(cap) < 0.5 * abs(scale) * 1e6
            fitted = LogitTransform(scale=scale, softcap=cap if capped else None)
            if torch.allclose(fitted.apply_(shown.clone()[None])[0], seen, rtol=1e-3, atol=1e-5):
                return fitted
        logger.warning(
            "%s changes its logits in a way that is not a scale or a soft cap; scoring goes through its full logits "
            "and needs more memory.",
            name,
        )
        return None


@contextmanager
def reading(
    model: nn.Module, *, extras: Collection[str] = (), impl: Impl = "chunked", mid_ranks: bool = False
) -> Iterator[Forward]:
    """The student, ready to read views: in evaluation mode, without gradients. Everything is as before afterwards.

    A compiled student runs uncompiled: every batch has another shape, and would be another compilation.

    Args:
        model: the student as the host calls it.
        extras: statistics beside surprisal, rank and ties.
        impl: of `token_stats`.
        mid_ranks: ties count half in ranks.

    Raises:
        ValueError: it is no causal language model, or has no output head.
    """
    unwrap(model)
    modes = [(part, part.training) for part in model.modules()]
    compiled = any("_orig_mod" in part._modules or part._compiled_call_impl for part in model.modules())
    device = next(model.parameters()).device
    forked = [device] if device.type == "cuda" else []
    try:
        model.eval()
        with (
            torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
            torch.random.fork_rng(devices=forked),
            torch.no_grad(),
        ):
            yield Forward(model, extras=extras, impl=impl, mid_ranks=mid_ranks)
    finally:
        for part, training in modes:
            part.training = training


def unwrap(model: nn.Module) -> Any:
    """The language model inside DDP, DeepSpeed and `torch.compile` wrappers.

    Raises:
        ValueError: there is none with an output head.
    """
    inner: Any = model
    # wrappers are peeled off by their class: some, DeepSpeed's engine for one, pass attributes on to what they wrap
    while not hasattr(type(inner), "get_output_embeddings"):
        parts = dict(inner.named_children())
        wrapped = parts.get("module", parts.get("_orig_mod"))
        if wrapped is None:
            break
        inner = wrapped
    if not callable(getattr(inner, "get_output_embeddings", None)):  # adapters of peft pass it on
        raise ValueError(
            f"{type(model).__name__} is not a causal language model of transformers: it has no output head "
            "(get_output_embeddings), so there is nothing to score with."
        )
    if inner.get_output_embeddings() is None:
        raise ValueError(
            f"{type(inner).__name__} has no output head. Load the student with AutoModelForCausalLM, not AutoModel."
        )
    return inner


def positions(model: nn.Module) -> float:
    """Tokens that a student can read at once, after YaRN and the like; infinity if its configuration names no limit.

    Beyond them, learned positions run out (an error deep inside the model), and rotary ones leave what was trained.
    """
    config = unwrap(model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    extended = (rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or 0)
    return max(getattr(config, "max_position_embeddings", None) or math.inf, int(extended))


@contextmanager
def forward_of(head: nn.Module, forward: Any) -> Iterator[None]:
    """Swap a module's `forward` on the instance: hooks that gather sharded weights still run."""
    before = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def token_stats_of(arrays: Mapping[str, Any]) -> TokenStats:
    """The statistics of one view, from arrays named like the fields."""
    return TokenStats(**arrays)


def _own_logits(logits: Tensor) -> Tensor:
    return logits.to(torch.float32, copy=True)
