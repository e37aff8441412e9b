"""One forward pass of a causal language model: token sequences in, statistics of their scored tokens out.

Three things make a forward for scoring cheap and safe:

1. *Only scored positions reach the output head.* During a forward, the head's `forward` is replaced by a function that
   reduces the hidden states to statistics (`token_stats`) and returns one empty column of logits. The model is called
   through its root module, as the trainer calls it, so wrappers and adapters work as in training. A probe at the start
   of each pass checks that these are the statistics of the model's own logits (`Forward._probe`).
2. *A prompt that several sequences share is read once* (`Forward.prefix`), and the sequences continue from its keys and
   values. A trial shows whether that is exact for this model (`sharing.py`).
3. *The student is left as it was* (`reading`): mode of every module, random state, gradients, and the head itself.

Whole sequences are padded on the right, where causal attention never looks, so they need no mask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_sampler.reading.activations import NEAR, last_activations, nearness
from distill_sampler.reading.head import (
    LogitTransform,
    Project,
    Room,
    fitted_transform,
    float32_products,
    in_every_column,
    linear,
    module,
    operand_copy,
)
from distill_sampler.reading.layers import compiled_layers
from distill_sampler.reading.lengths import positions, switches_at, virtual_tokens, window
from distill_sampler.reading.sharing import Prefix
from distill_sampler.reading.structure import autocast_dtype, decoder_of, forward_of, unwrap
from distill_sampler.reading.token_stats import Impl, chunk_for, token_stats
from distill_sampler.reading.top_k import TopK
from distill_sampler.reading.transfers import Copies, moved
from distill_sampler.types import IntArray, TokenStats, View

logger = logging.getLogger(__name__)

_EXACT = 1e-4
"""Largest difference between logits that count as equal, relative to the largest of the row, in float32."""
_EXACT_LOW_PRECISION = 0.02
"""The same limit where something is rounded to bfloat16, float16 or TF32."""


class Forward:
    """Reads views with a student whose output head is replaced by one that computes statistics. Made by `reading`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        extras: Collection[str],
        impl: Impl,
        mid_ranks: bool,
        top_k: int = 0,
        compiled_layers: bool = False,
    ) -> None:
        student = unwrap(model)
        self._model = model
        self._head: nn.Module = student.get_output_embeddings()
        self._near = bool(NEAR & set(extras))
        self._extras = frozenset(extras) - NEAR
        self._impl: Impl = impl
        self._mid_ranks = mid_ranks
        self._top_k = top_k
        self._compiled_layers = compiled_layers
        self._room = Room()
        self.positions = positions(student)
        self.switches_at = switches_at(student)
        """Sequences of up to this many tokens must not share a batch with longer ones."""
        self.window = window(student)
        self.virtual = virtual_tokens(student)
        self.device = next(model.parameters()).device
        self._chunk = chunk_for(student.config.get_text_config().vocab_size, self.device)
        self.dtype = torch.float32
        """The dtype that the body computes in. The probe sets it."""
        self.operands: torch.dtype | None = None
        """The dtype to which autocast rounds both factors of the head's product; None: autocast is off. The probe sets
        it."""
        self._kept: Tensor | None = None
        """A converted copy of the head's weight, where keeping one pays."""
        self.lead = 0
        """How many states reach the head before those of the tokens (virtual tokens of an adapter)."""
        self._factors = ""
        """The dtypes of the two factors of the head's product, in words."""
        self.transform = self._probe(type(student).__name__)
        """What the model does to its logits after the head; None: something that `LogitTransform` cannot describe."""

    def __call__(
        self, views: Sequence[View], prefix: Prefix | None = None, rows: Sequence[int] = ()
    ) -> list[TokenStats]:
        """The statistics of each view's scored tokens. One forward of the student; arguments as in `begin`."""
        return self.begin(views, prefix, rows)()

    def begin(
        self, views: Sequence[View], prefix: Prefix | None = None, rows: Sequence[int] = ()
    ) -> Callable[[], list[TokenStats]]:
        """Begin a forward of the student. The function that it returns waits for the statistics of the scored tokens.

        An accelerator computes while the host does something else, such as beginning the next forward.

        Args:
            views: what to read.
            prefix: prompts that the views begin with. A prompt's tokens and the first token after it are not scored.
            rows: for each view, the number of its prompt in `prefix`.
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
            input_ids[row, lengths[row] :] = view.input_ids[0]  # padding, never attended to
        if prefix is not None:
            place = np.minimum(np.arange(longest), lengths[:, None] - 1) + starts[:, None]
            inputs = {
                "use_cache": True,
                "past_key_values": cache,
                "attention_mask": torch.cat([mask, mask.new_ones(input_ids.shape)], 1),
                "position_ids": moved(place, self.device),
            }
        # the state at position t predicts token t + 1; token (row, t) is predicted at flat position row*longest + t - 1
        targets = np.concatenate(
            [
                row * longest + np.flatnonzero(view.scored[start:])
                for row, (view, start) in enumerate(zip(views, starts, strict=True))
            ]
        )
        no_activations: list[Tensor] = []
        with last_activations(self._model) if self._near else nullcontext(no_activations) as activations:
            stats = self._run(moved(input_ids, self.device), moved(targets, self.device), inputs)
        if self._mid_ranks:
            stats["rank"] = stats["rank"] + stats["ties"] / 2
        near: list[dict[str, Any]] = [
            nearness(activations[-1][row], view, int(start), lead=self.lead)
            if self._near and view.parts is not None
            else {}
            for row, (view, start) in enumerate(zip(views, starts, strict=True))
        ]
        copies = Copies(stats)

        def found() -> list[TokenStats]:
            bounds = np.cumsum([int(view.scored.sum()) for view in views])[:-1]
            pieces: dict[str, Any] = {name: np.split(values, bounds) for name, values in copies.arrays().items()}
            return [
                TokenStats(**{name: pieces[name][row] for name in pieces}, **near[row]) for row in range(len(views))
            ]

        return found

    def prefix(self, prompts: Sequence[IntArray]) -> Prefix:
        """Read prompts that views begin with. One forward of the student."""
        lengths = np.array([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        input_ids = np.empty((len(prompts), longest), np.int64)
        for row, prompt in enumerate(prompts):
            input_ids[row, : longest - len(prompt)] = prompt[0]  # padding, masked
            input_ids[row, longest - len(prompt) :] = prompt
        place = np.arange(longest) - (longest - lengths[:, None])
        mask = moved((place >= 0).astype(np.int64), self.device)
        with forward_of(self._head, lambda hidden: hidden.new_zeros(*hidden.shape[:-1], 1)):
            output = self._model(
                input_ids=moved(input_ids, self.device),
                attention_mask=mask,
                position_ids=moved(place.clip(min=0), self.device),
                use_cache=True,
            )
        return Prefix(cache=output.past_key_values, mask=mask, lengths=lengths)

    @property
    def numerics(self) -> dict[str, str]:
        """The settings besides the weights that change the numbers by more than the rounding of the last bits."""
        if self.transform is None:
            head = "logits as the model returns them"
        elif self._is_plain:
            head = "float32 product"
        else:
            head = f"product of {type(self._head).__name__}"
        config = unwrap(self._model).config
        quantization = getattr(config, "quantization_config", None)
        method = getattr(quantization, "quant_method", None) or (quantization or {}).get("quant_method", "unknown")
        found = {"dtype": str(self.dtype).removeprefix("torch."), "head": head}
        if self.transform is not None and self._is_plain:
            found["operands"] = self._factors
        if any("float32" in found.get(name, "") for name in ("dtype", "operands")):
            found["float32_products"] = float32_products(self.device)
        found["ties"] = "mid" if self._mid_ranks else "strict"
        if self._compiled_layers:
            found["layers"] = "compiled"
        return {**found, **({"quantization": str(getattr(method, "value", method))} if quantization else {})}

    @property
    def exact(self) -> bool:
        """Whether everything is computed in float32."""
        return self.dtype == torch.float32 and float32_products(self.device) == "ieee"

    @property
    def _is_plain(self) -> bool:
        return type(self._head) is nn.Linear

    def _run(self, tokens: Tensor, flat: Tensor, inputs: dict[str, Any]) -> dict[str, Tensor]:
        def stats(states: Tensor, project: Project) -> dict[str, Tensor]:
            if states.shape[:2] != (len(tokens), self.lead + tokens.shape[1]):
                raise ValueError(f"{tuple(states.shape[:2])} states for {tuple(tokens.shape)} tokens.")
            top = TopK(project, self._top_k) if self._top_k else None
            found = token_stats(
                states[:, self.lead :].flatten(0, 1)[flat - 1],
                tokens.flatten()[flat],
                top or project,
                extras=self._extras,
                chunk=self._chunk,
                impl=self._impl,
            )
            return found | top.stats() if top else found

        if self.transform is None:  # use the model's own logits, through its original head
            return stats(self._model(input_ids=tokens, **inputs).logits, _own_logits)
        result: list[dict[str, Tensor]] = []
        original, transform = self._head.forward, self.transform

        def reduce(hidden: Tensor) -> Tensor:
            with torch.autocast(hidden.device.type, enabled=False):
                result.append(stats(hidden, self._project(original, transform)))
            return hidden.new_zeros(*hidden.shape[:-1], 1)

        with forward_of(self._head, reduce):
            self._model(input_ids=tokens, **inputs)
        return result[0]

    def _project(self, original: Callable[[Tensor], Tensor], transform: LogitTransform) -> Project:
        """The product with the head. Call it inside a forward: only there is a sharded weight gathered."""
        if not self._is_plain:
            return module(original, transform)
        weight: Tensor = self._head.weight  # type: ignore[assignment]
        bias: Tensor | None = self._head.bias  # type: ignore[assignment]
        return linear(weight, bias, transform, operands=self.operands, kept=self._kept, room=self._room)

    def _probe(self, name: str) -> LogitTransform | None:
        """Find out what the model does to its logits after the head. One forward of three rows of four tokens.

        In the last row the head returns known values instead of logits, in float32 and in every column, and the model's
        output shows the transform. No name in a configuration is trusted. It must be the same transform in every
        column, because a model may change single columns. In the other two rows the head returns the true logits, and
        the model's output must equal the head's product after the transform.

        These two rows differ only in their last token, which must not affect a causal model's earlier logits. Encoders
        such as BERT can be loaded as causal language models without a warning, but their scores would mean nothing.

        Returns:
            The transform; None if `LogitTransform` cannot describe it. Then the model's own logits are used.

        Raises:
            ValueError: the logits at a position depend on later tokens, or there is not one row of logits for each
                token.
        """
        shown = torch.tensor([-1e6, -60.0, -5.0, -1e-3, 0.0, 1e-3, 0.5, 20.0, 1e6], device=self.device)
        columns = unwrap(self._model).config.get_text_config().vocab_size
        tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9], [0, 0, 0, 0]], device=self.device) % columns
        whole = self._weight_is_whole()
        seen: list[tuple[torch.Size, Tensor]] = []
        original: Callable[[Tensor], Tensor] = self._head.forward

        def look(hidden: Tensor) -> Tensor:
            logits = original(hidden)
            self.operands = autocast_dtype(hidden.device)
            self.dtype = self.operands or hidden.dtype
            if self._is_plain:
                weight: Tensor = self._head.weight  # type: ignore[assignment]
                factors = (self.operands or hidden.dtype, self.operands or weight.dtype)
                self._factors = " × ".join(str(dtype).removeprefix("torch.") for dtype in factors)
                if whole:
                    self._kept = operand_copy(weight, self.operands)
            if hidden.ndim != 3 or len(hidden) != len(tokens) or logits.shape[-1] < len(shown):
                return logits
            with torch.autocast(hidden.device.type, enabled=False):
                project = self._project(original, LogitTransform())
                ours = project(hidden[:2, -tokens.shape[1] :].flatten(0, 1)).clone()
            seen.append((hidden.shape[:-1], ours))
            logits = logits.to(torch.float32, copy=True)
            logits[2, -tokens.shape[1] :] = in_every_column(shown, logits[2, -tokens.shape[1] :])
            return logits

        with forward_of(self._head, look):
            own = self._model(input_ids=tokens, use_cache=False).logits
        self.lead = own.shape[-2] - tokens.shape[1]
        if own.shape[:-2] != tokens.shape[:1] or self.lead not in (0, self.virtual):
            raise ValueError(
                f"{name} gives logits of shape {tuple(own.shape)} for {tuple(tokens.shape)} tokens, so it is not known "
                "which logits belong to which token. Score the model without its adapter, or merge the adapter."
            )
        if not seen:
            self.dtype = own.dtype
        shape, own = own.shape[:-1], own[:, self.lead :].float()
        limit = _EXACT if self.exact else _EXACT_LOW_PRECISION
        before = _same(own[0, :-1], own[1, :-1], limit)
        # rounding may send a token of one row to another expert, but not all of them
        if not (before.all() if self.exact else before.any()):
            raise ValueError(
                f"{name} is not a causal language model: its prediction of a token depends on the tokens after it. "
                "Give a decoder such as Llama, Qwen or SmolLM."
            )
        if [states for states, _ in seen] == [shape] and seen[0][1].shape[-1] == own.shape[-1]:
            fitted = fitted_transform(in_every_column(shown, own[2]), own[2])
            if fitted is not None and _same(fitted.apply_(seen[0][1]), own[:2].flatten(0, 1), limit).all():
                return fitted
        logger.warning(
            "%s changes its logits by something other than a scale or a soft cap. Scoring uses its full logits and "
            "needs more memory.",
            name,
        )
        return None

    def _weight_is_whole(self) -> bool:
        """Whether this process holds the whole weight of the head outside of a forward too. If it is sharded to save
        memory, a whole copy must not be kept."""
        weight = self._head.weight if self._is_plain else None
        return isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.ndim == 2 and len(weight) > 0


def _same(left: Tensor, right: Tensor, limit: float) -> Tensor:
    """`[rows]` whether two rows of logits are equal, up to `limit` times the largest finite logit of the row. Where one
    is not finite, the other must be the same."""
    scale = right.abs().nan_to_num(0, 0, 0).amax(-1, keepdim=True)
    close: Tensor = ((left - right).abs() <= limit * scale) | (left == right) | (left.isnan() & right.isnan())
    rows: Tensor = close.all(-1)
    return rows


@contextmanager
def reading(
    model: nn.Module,
    *,
    extras: Collection[str] = (),
    impl: Impl = "chunked",
    mid_ranks: bool = False,
    top_k: int = 0,
    compile_layers: bool = False,
) -> Iterator[Forward]:
    """The student, ready to read views: in evaluation mode and without gradients. Its state is restored afterwards.

    A compiled student runs uncompiled, because every batch has another shape and would be compiled again.

    Args:
        model: the student as the host calls it.
        extras: statistics to compute besides surprisal, rank and ties.
        impl: the implementation of `token_stats`.
        top_k: how many of the likeliest tokens are given for each place.
        mid_ranks: add half of the ties to each rank.
        compile_layers: run the layers compiled (`layers.py`), for any shape.

    Raises:
        ValueError: the model is not a causal language model, or has no output head.
    """
    student = unwrap(model)
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
            compiled_layers(decoder_of(student)) if compile_layers else nullcontext(),
        ):
            yield Forward(
                model,
                extras=extras,
                impl=impl,
                mid_ranks=mid_ranks,
                top_k=top_k,
                compiled_layers=compile_layers,
            )
    finally:
        for part, training in modes:
            part.training = training


def _own_logits(logits: Tensor) -> Tensor:
    return logits.to(torch.float32, copy=True)
