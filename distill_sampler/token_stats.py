"""The numerical kernel: hidden states times output head, reduced to statistics of the target tokens.

Letters as in arXiv:2601.14249: for a target token t_k, surprisal_k = -log p(t_k) in nats and
rank_k = 1 + #{v : logit_v > logit_{t_k}}. The comparison is strict, the authors' rule: ties take the best rank.

The logits of a chunk of positions exist in float32 for a moment, in one buffer that is used again for every chunk;
nothing of the size `[tokens, vocab]` ever does. The target's logit is read from the same product that it is compared
with: computed apart it would differ in the last bit and many tokens would outrank themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
    chunk: int = 256,
) -> tuple[Float[Tensor, "tokens"], Int[Tensor, "tokens"]]:
    """Surprisal (nats, float32) and rank (from 1, not clipped, int64) of the targets.

    A NaN or +inf logit makes the surprisal of its position non-finite; a logit of -inf is a token that cannot occur.
    Padded vocabulary columns count exactly as in the model's own softmax.

    Args:
        hidden: input of the output head at the positions that predict the targets.
        targets: the token that follows each position.
        project: the output head with everything the model does to its logits.
        chunk: positions whose logits exist at a time; memory is `5 * chunk * vocab` bytes.
    """
    surprisal = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    rank = torch.empty(targets.shape, dtype=torch.int64, device=hidden.device)
    larger = torch.empty(0, dtype=torch.bool, device=hidden.device)
    for start in range(0, len(targets), chunk):
        rows = slice(start, min(start + chunk, len(targets)))
        logits = project(hidden[rows])
        target = logits.gather(1, targets[rows, None])
        if larger.shape != logits.shape:
            larger = torch.empty_like(logits, dtype=torch.bool)
        rank[rows] = torch.gt(logits, target, out=larger).sum(1) + 1
        peak = logits.amax(1, keepdim=True)
        # log-sum-exp in place; where the peak is infinite, the NaN that follows is the answer
        logsumexp = logits.sub_(peak).exp_().sum(1).log_() + peak[:, 0]
        surprisal[rows] = logsumexp - target[:, 0]
    return surprisal, rank


def linear(weight: Float[Tensor, "vocab hidden"], bias: Tensor | None, transform: LogitTransform) -> Project:
    """A plain output head: `hidden @ weight.T + bias` with float32 out of the product, whatever the inputs' dtype.

    One buffer of logits serves all calls: on CPU a fresh one each time makes the process grow.
    """
    columns = weight.float().T
    buffer = torch.empty(0, device=weight.device)

    def project(hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        nonlocal buffer
        if len(buffer) < len(hidden):
            buffer = torch.empty(len(hidden), len(weight), device=weight.device)
        logits = buffer[: len(hidden)]
        with _multiply_in_bfloat16() if hidden.dtype == weight.dtype == torch.bfloat16 else nullcontext():
            torch.mm(hidden.float(), columns, out=logits)
        if bias is not None:
            logits.add_(bias.float())
        return transform.apply_(logits)

    return project


def module(head: Callable[[Tensor], Tensor], transform: LogitTransform) -> Project:
    """Any other output head (quantised, an adapter on it, ...), called as the model calls it."""

    def project(hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        return transform.apply_(head(hidden).to(torch.float32, copy=True))

    return project


@contextmanager
def _multiply_in_bfloat16() -> Iterator[None]:
    """On CPUs that can, multiply in bfloat16 and add in float32: exact for bfloat16 inputs, and fast."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at run time by torch
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
