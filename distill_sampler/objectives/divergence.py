"""The divergence of a student's predictions from a teacher's, without a `[tokens, vocab]` tensor of either model.

Softened outputs (Hinton et al. 2015, arXiv:1503.02531): at temperature T the student predicts q = softmax(z / T) and
the teacher p. The loss of a position is T² D(p, q), whose gradient keeps its size when T changes:

| divergence | D(p, q) | gradient with respect to z, times T |
|---|---|---|
| `"forward"` | Σ p log(p / q) | q - p |
| `"reverse"` | Σ q log(q / p) | q (log(q / p) - D) |
| `"js"` | ½ Σ p log(p / m) + ½ Σ q log(q / m), m = ½ (p + q) | ½ q (log(q / m) - Σ q log(q / m)) |

Logits exist for a chunk of positions at a time. The forward pass also computes the gradients with respect to the hidden
states and to the output head, and drops the logits of the chunk. The backward pass multiplies these gradients by the
gradient of the loss, so nothing is computed twice. It multiplies in place, so the head's gradient exists once, unless
the graph is kept for another backward pass. Formulas of a chunk are applied to a few rows at a time, in place.

If only a teacher's most probable tokens were stored, nothing is known about the single tokens beyond them. All other
tokens then form one *cell*, for the teacher and for the student, and D is computed over the stored tokens and that
cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from distill_sampler.field_docs import documents_fields
from distill_sampler.reading.head import LogitTransform, linear

Divergence = Literal["forward", "reverse", "js"]

_CHUNK_LOGITS = {"cpu": 2**24}
"""How many logits of each model exist at a time: 67 MB."""
_CHUNK_LOGITS_ELSEWHERE = 2**25
"""134 MB: an accelerator multiplies faster than it reads the head, which it reads once for each chunk."""

_BLOCK_LOGITS = 2**20
"""To how many logits formulas are applied at a time: their intermediate results then fit into a CPU's cache."""

_NEVER = -1e4
"""Log-probability in place of -inf: exp is 0 and products with it are finite."""


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class Cells:
    """A teacher's predictions at some positions."""

    log_probs: Tensor
    """`[positions, cells]` float32, logarithms of probabilities that sum to 1 in each row; -inf: probability 0."""
    ids: Tensor | None = None
    """`[positions, cells - 1]` the token of each cell; the last cell has all other tokens. None: cell v is token v."""

    def __getitem__(self, rows: slice) -> Cells:
        return Cells(log_probs=self.log_probs[rows], ids=None if self.ids is None else self.ids[rows])


Targets = Callable[[int, int], Cells]
"""Returns the teacher's predictions at the positions from the first number up to the second."""


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """What the loss needs of the student's output head."""

    weight: Tensor
    """`[vocab, hidden]`"""
    bias: Tensor | None = None
    """`[vocab]`"""
    transform: LogitTransform = field(default_factory=LogitTransform)
    """What the model does to its logits after the head."""
    columns: int | None = None
    """How many columns count, starting with the first. Vocabularies may be padded to different sizes. None: all."""
    operands: torch.dtype | None = None
    """The dtype to which autocast rounds the factors of products; None: they are not rounded."""


def soft_target_loss(
    hidden: Tensor,
    head: Head,
    targets: Targets,
    coefficients: Tensor,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward",
) -> Tensor:
    """Σ c_k T² D_k over positions k, a scalar. Gradients reach the hidden states and the head.

    Args:
        hidden: `[positions, hidden]` input of the output head.
        head: the student's output head.
        targets: the teacher's predictions, already at temperature T.
        coefficients: `[positions]` c, the loss weight of each position divided by the host's normaliser.
        temperature: T of the student's softmax.
        divergence: D; see the module's table.
    """
    loss: Tensor = _SoftTargetLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, coefficients, head, targets, temperature, divergence
    )
    return loss


class _SoftTargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        coefficients: Tensor,
        head: Head,
        targets: Targets,
        temperature: float,
        divergence: Divergence,
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(each, dtype=dtype) if needed and each is not None else None
            for each, dtype, needed in (
                (hidden, torch.float32, ctx.needs_input_grad[0]),
                (weight, weight.dtype, ctx.needs_input_grad[1]),
                (bias, torch.float32, ctx.needs_input_grad[2]),
            )
        )
        ctx.dtypes = [each if each is None else each.dtype for each in (hidden, weight, bias)]
        columns, transform = head.columns or len(weight), head.transform
        states = hidden
        if head.operands is not None:
            states = hidden.to(head.operands)
        factor = weight.to(states.dtype)
        # the loss's scale, which keeps float16 in range, is only known in the backward pass
        dtype = torch.float32 if states.dtype == torch.float16 else states.dtype
        project = linear(factor, bias, LogitTransform(), rounded=True)
        rows = max(1, _CHUNK_LOGITS.get(hidden.device.type, _CHUNK_LOGITS_ELSEWHERE) // len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                some = slice(start, min(start + rows, len(hidden)))
                logits, cells = project(states[some])[:, :columns], targets(some.start, some.stop)
                for block in blocks(*logits.shape):
                    loss = _in_place(logits[block], cells[block], transform, temperature, divergence)
                    weights = coefficients[some][block]
                    total += (weights * loss).sum()
                    logits[block] *= weights[:, None]
                gradient = logits.to(dtype)
                if of_hidden is not None:
                    of_hidden[some] = gradient @ factor[:columns].to(dtype)
                if of_weight is not None:
                    _add_product(of_weight[:columns], gradient.T, states[some].to(dtype))
                if of_bias is not None:
                    of_bias[:columns] += logits.sum(0).to(of_bias.dtype)
                del gradient  # before there are logits of the next chunk
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # a graph that is kept (retain_graph=True) needs its gradients again, and its caller may keep what is returned
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        given: list[Tensor | None] = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if gradient is None:
                given.append(None)
                continue
            scaled = torch.empty_like(gradient) if kept else gradient
            for block in blocks(len(gradient), gradient.shape[1:].numel()):
                scaled[block] = gradient[block].float() * upstream  # rounded once
            given.append(scaled.to(dtype))
        return *given, *[None] * 5


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, without a tensor for the product where the dtypes are the same."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows to which formulas are applied one after the other."""
    step = max(1, _BLOCK_LOGITS // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _in_place(
    logits: Tensor, cells: Cells, transform: LogitTransform, temperature: float, divergence: Divergence
) -> Tensor:
    """T² D `[positions]`; the products of the head are overwritten with its gradient with respect to them."""
    transform.apply_(logits)
    slope = None
    if transform.softcap is not None:  # of cap · tanh(x / cap)
        slope = 1 - (logits / transform.softcap) ** 2
    loss = divergence_of(logits.div_(temperature), cells, divergence)
    if slope is not None:
        logits *= slope
    logits *= temperature * transform.scale
    return loss * temperature**2


def divergence_of(logits: Tensor, cells: Cells, divergence: Divergence) -> Tensor:
    """D `[positions]` between a teacher's predictions and softmax(logits).

    Args:
        logits: `[positions, columns]` float32, already divided by the temperature. They are overwritten with the
            gradient of D with respect to them.
        cells: the teacher's predictions.
        divergence: D; see the module's table.
    """
    log_q = logits.sub_(logits.logsumexp(1, keepdim=True))
    if cells.ids is None:
        loss, by_cell, mean = _between(cells.log_probs[:, : log_q.shape[1]], log_q, divergence)
        log_q.exp_().mul_(-mean[:, None]).add_(by_cell)
        return loss
    stored = log_q.gather(1, cells.ids)
    tail = log_q.scatter(1, cells.ids, -torch.inf).logsumexp(1, keepdim=True).clamp(min=_NEVER)
    loss, by_cell, mean = _between(cells.log_probs, torch.cat([stored, tail], 1), divergence)
    # the gradient of the tail is distributed over its tokens in proportion to the student's probabilities
    share = by_cell[:, -1:] * (-tail).exp() - mean[:, None]
    gradient = log_q.exp_()
    of_stored = by_cell[:, :-1] - gradient.gather(1, cells.ids) * mean[:, None]
    gradient.mul_(share).scatter_(1, cells.ids, of_stored)
    return loss


def _between(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor, Tensor]:
    """D(p, q), q · dD/dq for each cell, and the sum of that over the cells."""
    log_p, log_q = log_p.clamp(min=_NEVER), log_q.clamp(min=_NEVER)
    if divergence == "forward":
        p = log_p.exp()
        return (p * (log_p - log_q)).sum(1), -p, -p.sum(1)
    q = log_q.exp()
    if divergence == "reverse":
        by_cell = q * (log_q - log_p)
        return by_cell.sum(1), by_cell, by_cell.sum(1)
    assert divergence == "js", divergence
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    by_cell = 0.5 * q * (log_q - log_m)
    mean = by_cell.sum(1)
    return 0.5 * (log_p.exp() * (log_p - log_m)).sum(1) + mean, by_cell, mean
