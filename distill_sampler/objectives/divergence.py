"""The divergence of a student's predictions from a teacher's, without a `[tokens, vocab]` tensor of either model.

Softened outputs (Hinton et al. 2015, arXiv:1503.02531): at temperature T the student predicts q = softmax(z / T) and
the teacher p. The loss of a position is T² D(p, q), whose gradient keeps its size when T changes:

| divergence | D(p, q) | gradient with respect to z, times T |
|---|---|---|
| `"forward"` | Σ p log(p / q) | q - p |
| `"reverse"` | Σ q log(q / p) | q (log(q / p) - D) |
| `"js"` | ½ Σ p log(p / m) + ½ Σ q log(q / m), m = ½ (p + q) | ½ q (log(q / m) - Σ q log(q / m)) |

Logits exist for a chunk of positions at a time. The forward pass computes the loss and its gradient with respect to the
hidden states, which are small. The backward pass computes the chunks again for the gradient of the output head, if the
head is trained.

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
from distill_sampler.reading.token_stats import LogitTransform, linear

Divergence = Literal["forward", "reverse", "js"]

_CHUNK_LOGITS = 2**24
"""How many logits of the student exist at a time: 67 MB. With the teacher's and two buffers, that is 270 MB."""

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


Targets = Callable[[int, int], Cells]
"""Returns the teacher's predictions at the positions from the first number up to the second. It is called again in the
backward pass, and must return the same then."""


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
        ctx.work = work = _Work(head=head, targets=targets, temperature=temperature, divergence=divergence)
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dtype = head.operands or hidden.dtype
        factor = weight.to(dtype) if gradient is not None else weight
        with torch.autocast(hidden.device.type, enabled=False):
            for some, loss, by_logits in work.chunks(hidden, weight, bias):
                total += (coefficients[some] * loss).sum()
                if gradient is not None:
                    by_logits *= coefficients[some, None]
                    gradient[some] = by_logits.to(dtype) @ factor[: by_logits.shape[1]]
        ctx.save_for_backward(hidden, weight, bias, coefficients, gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, coefficients, gradient = ctx.saved_tensors
        of_hidden = gradient * upstream.to(gradient.dtype) if gradient is not None else None
        if not ctx.needs_input_grad[1] and not ctx.needs_input_grad[2]:
            return of_hidden, *[None] * 7
        dtype = ctx.work.head.operands or hidden.dtype
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for some, _, by_logits in ctx.work.chunks(hidden, weight, bias):
                by_logits *= (coefficients[some] * upstream)[:, None]
                columns = by_logits.shape[1]
                if of_weight is not None:
                    product = by_logits.to(dtype).T @ hidden[some].to(dtype)
                    of_weight[:columns] += product.to(of_weight.dtype)
                if of_bias is not None:
                    of_bias[:columns] += by_logits.sum(0).to(of_bias.dtype)
        return of_hidden, of_weight, of_bias, *[None] * 5


@dataclass(frozen=True, kw_only=True, eq=False)
class _Work:
    """The computation that the forward and the backward pass share."""

    head: Head
    targets: Targets
    temperature: float
    divergence: Divergence

    def chunks(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For each chunk: its positions, T² D `[chunk]`, and the gradient by the head's logits `[chunk, columns]`."""
        head, columns = self.head, self.head.columns or len(weight)
        project = linear(weight, bias, LogitTransform(), operands=head.operands)
        rows = max(1, _CHUNK_LOGITS // len(weight))
        for start in range(0, len(hidden), rows):
            stop = min(start + rows, len(hidden))
            logits = head.transform.apply_(project(hidden[start:stop])[:, :columns])
            slope = None
            if head.transform.softcap is not None:  # of cap · tanh(x / cap)
                slope = 1 - (logits / head.transform.softcap) ** 2
            loss, gradient = divergence_of(logits.div_(self.temperature), self.targets(start, stop), self.divergence)
            if slope is not None:
                gradient *= slope
            gradient *= self.temperature * head.transform.scale
            yield slice(start, stop), loss * self.temperature**2, gradient


def divergence_of(logits: Tensor, cells: Cells, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """D `[positions]` between a teacher's predictions and softmax(logits), and its gradient by the logits.

    Args:
        logits: `[positions, columns]` float32, already divided by the temperature. They are overwritten.
        cells: the teacher's predictions.
        divergence: D; see the module's table.
    """
    log_q = logits.sub_(logits.logsumexp(1, keepdim=True))
    if cells.ids is None:
        loss, by_cell, mean = _between(cells.log_probs[:, : log_q.shape[1]], log_q, divergence)
        return loss, by_cell.sub_(log_q.exp_().mul_(mean[:, None]))
    stored = log_q.gather(1, cells.ids)
    tail = log_q.scatter(1, cells.ids, -torch.inf).logsumexp(1, keepdim=True).clamp(min=_NEVER)
    loss, by_cell, mean = _between(cells.log_probs, torch.cat([stored, tail], 1), divergence)
    # the gradient of the tail is distributed over its tokens in proportion to the student's probabilities
    share = by_cell[:, -1:] * (-tail).exp() - mean[:, None]
    gradient = log_q.exp_()
    of_stored = by_cell[:, :-1] - gradient.gather(1, cells.ids) * mean[:, None]
    return loss, gradient.mul_(share).scatter_(1, cells.ids, of_stored)


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
