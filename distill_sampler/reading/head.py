"""The output head: from hidden states to float32 logits, and what models do to their logits afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

_UPCAST_BYTES = 2**26
"""Size of the pieces of a head that a CPU converts to float32 at a time: 64 MB."""


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """What a model does to its logits after the output head: `softcap · tanh(scale · logits / softcap)`."""

    scale: float = 1.0
    """Factor of the logits (Cohere's `logit_scale`, Granite's 1 / `logits_scaling`, ...)."""
    softcap: float | None = None
    """Gemma's `final_logit_softcapping`; None: no cap."""

    def apply_(self, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
        """Apply the transform in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def in_every_column(shown: Tensor, like: Tensor) -> Tensor:
    """`[positions, columns]` the values `shown`, repeated along each row and moved on from row to row, so that every
    column has large ones and small ones."""
    positions, columns = like.shape
    places = torch.arange(columns, device=shown.device) + 2 * torch.arange(positions, device=shown.device)[:, None]
    return shown[places % len(shown)]


def fitted_transform(shown: Tensor, seen: Tensor) -> LogitTransform | None:
    """The transform that turned the logits `shown` into `seen`, `[positions, columns]` each; None if it is not a scale
    and a soft cap. The first row begins with `-1e6, …, 1e-3, …, 1e6`, the sixth and the ninth value."""
    scale = float(seen[0, 5] / shown[0, 5])
    cap = float(seen[0, 8])
    capped = abs(cap) < 0.5 * abs(scale) * 1e6
    fitted = LogitTransform(scale=scale, softcap=cap if capped else None)
    same = torch.allclose(fitted.apply_(shown.clone()), seen, rtol=1e-3, atol=1e-5)
    return fitted if same else None


Project = Callable[[Float[Tensor, "tokens hidden"]], Float[Tensor, "tokens vocab"]]
"""From hidden states to float32 logits. The caller may overwrite the result, and the next call may reuse its memory."""


class Room:
    """A buffer for the logits of a chunk, reused by every chunk of every forward. On a CPU, allocating new memory each
    time would make the process grow."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, 0)

    def __call__(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """An uninitialised `[rows, columns]` float32 tensor in the buffer."""
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
    rounded: bool = False,
) -> Project:
    """A plain output head: `hidden @ weight.T + bias`, with a float32 product for inputs of any dtype.

    Make a new one for each forward pass: it may hold a copy of the weight.

    Args:
        weight: the head's weight.
        bias: the head's bias.
        transform: what the model does to its logits afterwards.
        operands: the dtype to which both factors are rounded before they are multiplied, as autocast does; None: they
            are not rounded.
        kept: the weight's `operand_copy`, if the caller keeps one. Otherwise, a weight that needs conversion is
            converted piece by piece where possible, so that there is no second copy of the head.
        room: the buffer for the logits.
        rounded: whether logits may be rounded to the dtype of the factors, as the model's own head does, where a
            float32 product is slower.
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
        rounded=rounded,
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
    rounded: bool,
) -> Float[Tensor, "tokens vocab"]:
    factor = weight if kept is None else kept
    if operands is not None:
        hidden = hidden.to(operands)
    logits = room(len(hidden), len(weight), weight.device)
    if _has_mixed_product(weight.device) and hidden.dtype == factor.dtype != torch.float32:
        torch.mm(hidden, factor.T, out_dtype=torch.float32, out=logits)
    elif rounded and hidden.dtype == factor.dtype:
        logits.copy_(hidden @ factor.T)
    else:
        _multiply(hidden, weight, kept, operands or weight.dtype, logits)
    if bias is not None:
        logits.add_(bias.float())
    return transform.apply_(logits)


def module(head: Callable[[Tensor], Tensor], transform: LogitTransform) -> Project:
    """Any other output head (quantised, with an adapter, ...), called as the model calls it."""
    return partial(_module, head=head, transform=transform)


def _module(
    hidden: Float[Tensor, "tokens hidden"], *, head: Callable[[Tensor], Tensor], transform: LogitTransform
) -> Float[Tensor, "tokens vocab"]:
    return transform.apply_(head(hidden).to(torch.float32, copy=True))


def operand_copy(weight: Tensor, operands: torch.dtype | None = None) -> Tensor | None:
    """A converted copy of the head's weight, to pass as `linear(kept=)`; None where keeping one does not pay.

    A copy is kept for a whole pass if it is small (up to 256 MB) and needed: in the dtype of `operands`, or in float32
    where the device has no low-precision product with a float32 result.
    """
    rounded = operands or weight.dtype
    dtype = rounded if _has_mixed_product(weight.device) else torch.float32
    if weight.dtype == rounded == dtype or dtype.itemsize * weight.numel() > 2**28:
        return None
    return weight.detach().to(rounded).to(dtype)


def _multiply(hidden: Tensor, weight: Tensor, kept: Tensor | None, rounded: torch.dtype, out: Tensor) -> None:
    """`out[:] = hidden @ weight.T` as a float32 product, after rounding the weight to the dtype `rounded`."""
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
    """Whether `torch.mm(..., out_dtype=)` exists for the device: on CUDA since torch 2.8."""
    return device.type == "cuda" and torch.version.hip is None and _TORCH >= (2, 8)


def float32_products(device: torch.device) -> str:
    """The precision in which torch multiplies float32 matrices there: `"ieee"` (float32), `"tf32"` or `"bf16"`."""
    if _TORCH < (2, 9):
        return "tf32" if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else "ieee"
    if device.type not in ("cpu", "cuda"):
        return "ieee"
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = str(backend.matmul.fp32_precision)
    return "ieee" if precision == "none" else precision


@contextmanager
def _multiply_in_bfloat16() -> Iterator[None]:
    """Let CPUs that can multiply in bfloat16 and add in float32, which is fast, and exact for bfloat16 inputs."""
    if _TORCH < (2, 9):  # there is no such setting
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at run time by torch
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
