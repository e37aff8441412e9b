"""The numerical kernel: hidden states times output head, reduced to statistics of the target tokens.

Letters as in arXiv:2601.14249: for a target token t_k, surprisal_k = -log p(t_k) in nats and
rank_k = 1 + #{v : logit_v > logit_{t_k}}. The comparison is strict, the authors' rule: ties take the best rank. How
many there were is kept beside it.

The logits of a chunk of positions exist in float32 for a moment, in one buffer that is used again for every chunk;
nothing of the size `[tokens, vocab]` ever does. The target's logit is read from the same product that it is compared
with: computed apart it would differ in the last bit and many tokens would outrank themselves.

One function, `token_stats`, with four implementations behind `impl=`:

| impl | how a chunk of logits becomes statistics | reduction / product alone (2 cores, 49k columns) |
|---|---|---|
| `"reference"` | the formulas in float64, everything at once | – |
| `"chunked"` | a few passes over rows that stay in the cache | 0.2 |
| `"compiled"` | the formulas through `torch.compile`, two passes | 0.1, after 5 to 25 s of compilation |
| `"triton"` | one pass, for accelerators with Triton (`_triton.py`) | – |
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

logger = logging.getLogger(__name__)

_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

Impl = Literal["reference", "chunked", "compiled", "triton"]

EXTRAS = ("entropy", "top1", "sum_p2")
"""Statistics that are computed on request only."""

_CHUNK_LOGITS = 2**25
"""Logits that exist at a time: 134 MB. An accelerator needs as much again as scratch."""

_ROWS_LOGITS = 2**20
"""Logits that a CPU reduces at a time: with the scratch beside them 8 MB, which stays in its caches. Passes over a
whole chunk go through memory instead, and cost three times as much."""

_UPCAST_BYTES = 2**26
"""Size of the pieces of a head that are converted to float32 at a time on a CPU: 64 MB."""

_COMPILE_FROM = {"cpu": 10**11, "cuda": 10**13}
"""Logits in a pass from which compiling the reduction pays twice over what it costs."""


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """What a model does to its logits after the output head: `softcap · tanh(scale · logits / softcap)`."""

    scale: float = 1.0
    """Multiplier (Cohere's `logit_scale`, Granite's 1 / `logits_scaling`, ...)."""
    softcap: float | None = None
    """Gemma's `final_logit_softcapping`; None: no cap."""

    def apply_(self, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
        """In place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


Project = Callable[[Float[Tensor, "tokens hidden"]], Float[Tensor, "tokens vocab"]]
"""From hidden states to float32 logits, which the caller may overwrite and which the next call may reuse."""


def token_stats(
    hidden: Float[Tensor, "tokens hidden"],
    targets: Int[Tensor, "tokens"],
    project: Project,
    *,
    extras: Collection[str] = (),
    chunk: int = 256,
    impl: Impl = "chunked",
) -> dict[str, Shaped[Tensor, "tokens"]]:
    """Statistics of the targets, by the names of the fields of `TokenStats`.

    `surprisal` (nats, float32), `rank` (from 1, not clipped, int64) and `ties` (how many other columns have exactly
    the target's logit, int64); those of `extras` too (float32): `entropy` of the prediction (nats), `top1`, the
    largest probability, and `sum_p2`, the sum of the squared probabilities.

    A NaN or +inf logit makes the surprisal of its position non-finite; a logit of -inf is a token that cannot occur.
    Padded vocabulary columns count exactly as in the model's own softmax.

    Args:
        hidden: input of the output head at the positions that predict the targets.
        targets: the token that follows each position.
        project: the output head with everything the model does to its logits.
        extras: which of `EXTRAS` to compute.
        chunk: positions whose logits exist at a time; `chunk_for` suggests one.
        impl: `"reference"`, `"chunked"`, `"compiled"` or `"triton"`; see the module's table.
    """
    assert set(extras) <= set(EXTRAS), extras
    extras = frozenset(extras)
    if impl == "reference":
        chunk = max(1, len(targets))
    pieces: dict[str, list[Tensor]] = {name: [] for name in ("surprisal", "rank", "ties", *sorted(extras))}
    with _compilation_allowed() if impl in ("compiled", "triton") else nullcontext():
        for start in range(0, len(targets), chunk):
            logits = project(hidden[start : start + chunk])
            for name, values in _REDUCTIONS[impl](logits, targets[start : start + chunk], extras).items():
                pieces[name].append(values)
    none = torch.empty(0, device=hidden.device)
    return {
        name: torch.cat([none, *values]).to(torch.int64 if name in ("rank", "ties") else torch.float32)
        for name, values in pieces.items()
    }


def chunk_for(vocab: int) -> int:
    """Positions whose logits fill 134 MB: enough for the product to be as fast as it gets.

    Whole blocks of rows: with 682 of them a product in bfloat16 on a CPU took a quarter longer a row than with 672.
    """
    positions = _CHUNK_LOGITS // vocab
    return positions // 32 * 32 or max(1, positions)


def fastest(device: torch.device, logits: int) -> Impl:
    """The implementation that is through soonest with a pass of so many logits, compilation included.

    A function of the pass alone, not of what happens to be compiled already: scoring twice gives the same bits.
    """
    if device.type == "cuda" and find_spec("triton") and available("triton", device) == "triton":
        return "triton"  # compiled within a second, or found on disk
    if logits < _COMPILE_FROM.get(device.type, 10**13):
        return "chunked"
    return available("compiled", device)


@cache
def available(impl: Impl, device: torch.device) -> Impl:
    """`impl`, or `"chunked"`, with one line in the log, if it does not work here (no compiler, no Triton, ...)."""
    try:
        with _compilation_allowed():
            _REDUCTIONS[impl](
                torch.zeros(2, 3, device=device), torch.zeros(2, dtype=torch.int64, device=device), frozenset()
            )
    except Exception as error:  # whatever it is, there is another way
        reason = next(iter(str(error).strip().splitlines()), "")
        logger.warning(
            "The '%s' statistics do not work here (%s: %s); they are computed as 'chunked', a little slower.",
            impl,
            type(error).__name__,
            reason,
        )
        return "chunked"
    return impl


# ---- From logits to statistics ----


def _formulas(logits: Tensor, targets: Tensor, extras: Collection[str] = ()) -> dict[str, Tensor]:
    """What is computed, as one would write it down."""
    target = logits.gather(1, targets[:, None])
    peak = logits.amax(1, keepdim=True)
    shifted = logits - peak
    exps = shifted.exp()
    total = exps.sum(1)
    # where the peak is infinite, the NaN that follows is the answer
    stats = {
        "surprisal": total.log() + (peak - target)[:, 0],
        "rank": (logits > target).sum(1) + 1,
        "ties": ((logits == target).sum(1) - 1).clamp(min=0),  # a NaN does not even equal itself
    }
    if "entropy" in extras:  # 0 · log 0 = 0, also where a logit is -inf
        stats["entropy"] = total.log() - (exps * shifted.clamp(min=-1e4)).sum(1) / total
    if "top1" in extras:
        stats["top1"] = 1 / total
    if "sum_p2" in extras:
        stats["sum_p2"] = (exps * exps).sum(1) / (total * total)
    return stats


def _reduce_reference(logits: Tensor, targets: Tensor, extras: frozenset[str]) -> dict[str, Tensor]:
    return _formulas(logits.double(), targets, extras)


def _reduce_in_passes(logits: Tensor, targets: Tensor, extras: frozenset[str]) -> dict[str, Tensor]:
    """The formulas with one scratch buffer, a few rows at a time on a CPU. Overwrites the logits.

    Comparisons write 0.0 and 1.0: on a CPU summing booleans takes five times as long as summing floats, and a float32
    sum of ones is exact up to 2^24 columns.
    """
    rows = max(1, _ROWS_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    scratch = torch.empty_like(logits[:rows])
    target = logits.gather(1, targets[:, None])
    sums = _room_for_sums(target[:, 0], extras)
    for start in range(0, len(targets), rows):
        some = slice(start, start + rows)
        values, given = logits[some], target[some]
        room = scratch[: len(values)]
        torch.sum(torch.gt(values, given, out=room), 1, out=sums["rank"][some])
        torch.sum(torch.eq(values, given, out=room), 1, out=sums["ties"][some])
        torch.amax(values, 1, out=sums["peak"][some])
        exps = torch.exp(values.sub_(sums["peak"][some, None]), out=room)
        torch.sum(exps, 1, out=sums["total"][some])
        if "entropy" in sums:
            torch.sum(values.clamp_(min=-1e4).mul_(exps), 1, out=sums["entropy"][some])
        if "sum_p2" in sums:
            torch.sum(exps.square_(), 1, out=sums["sum_p2"][some])
    return _from_sums(target[:, 0], extras, **sums)


def _reduce_in_triton(logits: Tensor, targets: Tensor, extras: frozenset[str]) -> dict[str, Tensor]:
    """The same sums in one pass, without scratch."""
    from distill_sampler.reading.triton_kernel import reduce_rows  # only here: it needs Triton

    target = logits.gather(1, targets[:, None])[:, 0]
    sums = _room_for_sums(target, extras)
    reduce_rows(logits, targets, **sums)
    return _from_sums(target, extras, **sums)


def _room_for_sums(target: Tensor, extras: frozenset[str]) -> dict[str, Tensor]:
    names = ("rank", "ties", "peak", "total", *sorted(extras & {"entropy", "sum_p2"}))
    return {name: torch.empty_like(target) for name in names}


def _from_sums(
    target: Tensor, extras: frozenset[str], *, rank: Tensor, ties: Tensor, peak: Tensor, total: Tensor, **more: Tensor
) -> dict[str, Tensor]:
    """What `_formulas` gives, from its sums: columns above and equal to the target, the peak, Σ exp(shifted), and as
    asked for `entropy` Σ shifted · exp(shifted) and `sum_p2` Σ exp(shifted)²."""
    stats = {
        "surprisal": total.log() + (peak - target),
        "rank": rank + 1,
        "ties": (ties - 1).clamp(min=0),
    }
    if "entropy" in extras:
        stats["entropy"] = total.log() - more["entropy"] / total
    if "top1" in extras:
        stats["top1"] = 1 / total
    if "sum_p2" in extras:
        stats["sum_p2"] = more["sum_p2"] / (total * total)
    return stats


@cache
def _compiled() -> Callable[..., dict[str, Tensor]]:
    # any number of rows and columns with one compilation; another for a single row, and for each set of extras
    # (unwrapped: the tests check shapes by wrapping every function, which is nothing to compile)
    return torch.compile(inspect.unwrap(_formulas), dynamic=True)


def _reduce_compiled(logits: Tensor, targets: Tensor, extras: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    return _compiled()(logits, targets, tuple(sorted(extras)))


@contextmanager
def _compilation_allowed() -> Iterator[None]:
    """Also where a compiled student runs uncompiled around us; what torch says about itself meanwhile is no news."""
    with torch.compiler.set_stance("default"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_REDUCTIONS: dict[str, Callable[[Tensor, Tensor, frozenset[str]], dict[str, Tensor]]] = {
    "reference": _reduce_reference,
    "chunked": _reduce_in_passes,
    "compiled": _reduce_compiled,
    "triton": _reduce_in_triton,
}


# ---- From hidden states to logits ----


class Room:
    """Room for the logits of a chunk, the same for every chunk of every forward: on a CPU fresh memory each time makes
    the process grow."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, 0)

    def __call__(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """`[rows, columns]` float32, with whatever it held before."""
        if len(self._buffer) < rows or self._buffer.shape[1] != columns:
            self._buffer = torch.empty(rows, columns, dtype=torch.float32, device=device)
        return self._buffer[:rows]


def linear(
    weight: Float[Tensor, "vocab hidden"],
    bias: Tensor | None,
    transform: LogitTransform,
    *,
    operands: torch.dtype | None = None,
    kept: Float[Tensor, "vocab hidden"] | None = None,
    room: Room | None = None,
) -> Project:
    """A plain output head: `hidden @ weight.T + bias` with float32 out of the product, whatever the inputs' dtype.

    Made for one forward pass: it may hold a copy of the weight.

    Args:
        weight: of the head.
        bias: of the head.
        transform: what the model does to its logits afterwards.
        operands: what both factors are rounded to before they are multiplied, as autocast does; None: they are taken
            as they are.
        kept: the weight's `operand_copy`, if the caller keeps one. Else a weight that needs conversion is converted
            piece by piece where that can be, so that no second head is held.
        room: for the logits.
    """
    if kept is None and operands is not None and _has_mixed_product(weight.device):
        kept = weight.to(operands)  # once for all chunks: a chunk has too few rows to pay for it
    return partial(
        _linear,
        weight=weight,
        bias=bias,
        transform=transform,
        operands=operands,
        kept=kept,
        room=Room() if room is None else room,
    )


def _linear(
    hidden: Float[Tensor, "tokens hidden"],
    *,
    weight: Float[Tensor, "vocab hidden"],
    bias: Tensor | None,
    transform: LogitTransform,
    operands: torch.dtype | None,
    kept: Float[Tensor, "vocab hidden"] | None,
    room: Room,
) -> Float[Tensor, "tokens vocab"]:
    factor = weight if kept is None else kept
    if operands is not None:
        hidden = hidden.to(operands)
    logits = room(len(hidden), len(weight), weight.device)
    if _has_mixed_product(weight.device) and hidden.dtype == factor.dtype != torch.float32:
        torch.mm(hidden, factor.T, out_dtype=torch.float32, out=logits)
    else:
        _multiply(hidden, weight, kept, operands or weight.dtype, logits)
    if bias is not None:
        logits.add_(bias.float())
    return transform.apply_(logits)


def module(head: Callable[[Tensor], Tensor], transform: LogitTransform) -> Project:
    """Any other output head (quantised, an adapter on it, ...), called as the model calls it."""
    return partial(_module, head=head, transform=transform)


def _module(
    hidden: Float[Tensor, "tokens hidden"], *, head: Callable[[Tensor], Tensor], transform: LogitTransform
) -> Float[Tensor, "tokens vocab"]:
    return transform.apply_(head(hidden).to(torch.float32, copy=True))


def operand_copy(weight: Tensor, operands: torch.dtype | None = None) -> Tensor | None:
    """The head's weight as the product takes it, for `linear(kept=)`, where keeping a copy for a whole pass pays.

    It must be small (256 MB) and needed: in the dtype of `operands`, or in float32 where the device has no product of
    low precision with a float32 result.
    """
    rounded = operands or weight.dtype
    dtype = rounded if _has_mixed_product(weight.device) else torch.float32
    if weight.dtype == rounded == dtype or dtype.itemsize * weight.numel() > 2**28:
        return None
    return weight.detach().to(rounded).to(dtype)


def _multiply(hidden: Tensor, weight: Tensor, kept: Tensor | None, rounded: torch.dtype, out: Tensor) -> None:
    """`out[:] = hidden @ weight.T` through float32 operands, after the weight's values were rounded to `rounded`."""
    with _multiply_in_bfloat16() if hidden.dtype == rounded == torch.bfloat16 else nullcontext():
        hidden = hidden.float()
        if kept is not None or weight.dtype == rounded == torch.float32:
            torch.mm(hidden, (weight if kept is None else kept).T, out=out)
            return
        step = max(1, _UPCAST_BYTES // (4 * weight.shape[1]))
        for start in range(0, len(weight), step):
            some = weight[start : start + step].to(rounded).float()
            torch.mm(hidden, some.T, out=out[:, start : start + step])


def _has_mixed_product(device: torch.device) -> bool:
    """Whether `torch.mm(..., out_dtype=)` is there: on CUDA since torch 2.8."""
    return device.type == "cuda" and torch.version.hip is None and _TORCH >= (2, 8)


def float32_products(device: torch.device) -> str:
    """What products of float32 matrices are really made of there: `"ieee"` (float32), `"tf32"` or `"bf16"`."""
    if _TORCH < (2, 9):
        return "tf32" if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else "ieee"
    if device.type not in ("cpu", "cuda"):
        return "ieee"
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = str(backend.matmul.fp32_precision)
    return "ieee" if precision == "none" else precision


@contextmanager
def _multiply_in_bfloat16() -> Iterator[None]:
    """On CPUs that can, multiply in bfloat16 and add in float32: exact for bfloat16 inputs, and fast."""
    if _TORCH < (2, 9):  # cannot be asked for
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at run time by torch
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
