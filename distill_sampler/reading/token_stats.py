"""The numerical kernel: hidden states times output head, reduced to statistics of the target tokens.

Notation as in arXiv:2601.14249: for a target token t_k, surprisal_k = -log p(t_k) in nats and
rank_k = 1 + #{v : logit_v > logit_{t_k}}. The comparison is strict, as in the authors' code, so tied tokens share the
best rank. The number of ties is returned too.

Logits exist for one chunk of positions at a time, in float32, in a buffer that all chunks reuse; no array of size
`[tokens, vocab]` is ever made. The target's logit is taken from the same product that it is compared with: computed
separately it would differ in the last bit, and many tokens would outrank themselves.

One function, `token_stats`, with four implementations behind `impl=`:

| impl | how a chunk of logits becomes statistics | reduction / product alone (2 cores, 49k columns) |
|---|---|---|
| `"reference"` | the formulas in float64, everything at once | – |
| `"chunked"` | a few passes over rows that stay in the cache | 0.2 |
| `"compiled"` | the formulas through `torch.compile`, two passes | 0.1, after 5 to 25 s of compilation |
| `"triton"` | one pass, for accelerators with Triton (`triton_kernel.py`) | – |
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from distill_sampler.reading.head import Project

logger = logging.getLogger(__name__)

Impl = Literal["reference", "chunked", "compiled", "triton"]

EXTRAS = ("entropy", "top1", "sum_p2", "top50", "top50_sum_p2")
"""Statistics that are only computed on request."""

_CHUNK_LOGITS = 2**25
"""How many logits exist at a time: 134 MB. An accelerator needs as much again as scratch, except with Triton."""

_CHUNK_LOGITS_IN_A_PASS = 2**27
"""The same on CUDA in a scoring pass, where eight times as much is free: 537 MB. With 152k columns these are 883
positions. On an H200 (bfloat16, width 896), product and reduction together ran at 340 TFLOP/s with 864 positions, at
245 with 192, and at 370 with 3,456."""

_ROWS_LOGITS = 2**20
"""How many logits a CPU reduces at a time: 8 MB with their scratch, which stays in its caches. Passes over a whole
chunk would go through memory and take three times as long."""

_COMPILE_FROM = {"cpu": 10**11, "cuda": 10**13}
"""Number of logits in a pass from which compiling the reduction saves twice the time that it takes."""


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

    Always `surprisal` (nats, float32), `rank` (from 1, not clipped, int64) and `ties` (how many other columns have
    exactly the target's logit, int64). On request (`extras`, float32) what the fields of `TokenStats` say.

    A NaN or +inf logit makes the surprisal of its position non-finite. A logit of -inf is a token that cannot occur.
    Padded vocabulary columns count as they do in the model's own softmax.

    Args:
        hidden: input of the output head at the positions that predict the targets; targets: the tokens that follow.
        project: the output head, with everything that the model does to its logits.
        extras: which of `EXTRAS` to compute.
        chunk: for how many positions logits exist at a time; `chunk_for` suggests a number.
        impl: `"reference"`, `"chunked"`, `"compiled"` or `"triton"`; see the module's table.
    """
    assert set(extras) <= set(EXTRAS), extras
    extras = frozenset(extras)
    top50 = any(name.startswith("top50") for name in extras)
    if impl == "reference":
        chunk = max(1, len(targets))
    pieces: dict[str, list[Tensor]] = {name: [] for name in ("surprisal", "rank", "ties", *sorted(extras))}
    with compilation_allowed() if impl in ("compiled", "triton") else nullcontext():
        for start in range(0, len(targets), chunk):
            logits, some = project(hidden[start : start + chunk]), targets[start : start + chunk]
            if top50:  # now: a reduction may overwrite the logits
                largest = logits.topk(min(50, logits.shape[1])).values - logits.gather(1, some[:, None])
            stats = _REDUCTIONS[impl](logits, some, extras)
            if top50:
                log_p = largest - stats["surprisal"][:, None].float()
                stats["top50"], stats["top50_sum_p2"] = log_p.exp().sum(1), (2 * log_p).exp().sum(1)
            for name in pieces:
                pieces[name].append(stats[name])
    none = torch.empty(0, device=hidden.device)
    return {
        name: torch.cat([none, *values]).to(torch.int64 if name in ("rank", "ties") else torch.float32)
        for name, values in pieces.items()
    }


def usual_batch_tokens(device: torch.device) -> int:
    """Tokens in a batch of a forward pass where nothing else is known."""
    return 1024 if device.type == "cpu" else 16384


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that tensors could take: what is free, and what torch keeps for tensors to come. Where
    that lies in small pieces, large tensors can take less."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def chunk_for(vocab: int, device: torch.device | None = None, *, impl: Impl = "chunked") -> int:
    """For how many positions logits should exist at a time, so that the product reaches its full speed.

    A multiple of 32: with 682 rows, a bfloat16 product on a CPU took a quarter longer for each row than with 672.

    Args:
        vocab: columns of the head.
        device: where a pass only scores; None: beside training, which needs the memory itself.
        impl: how logits become statistics.
    """
    logits = 2 * _CHUNK_LOGITS if impl == "triton" else _CHUNK_LOGITS
    if device is not None and device.type == "cuda" and free_memory(device) > 8 * 4 * _CHUNK_LOGITS_IN_A_PASS:
        logits = _CHUNK_LOGITS_IN_A_PASS
    positions = logits // vocab
    return positions // 32 * 32 or max(1, positions)


def fastest(device: torch.device, logits: int) -> Impl:
    """The implementation that takes the least time, compilation included, for a pass of this many logits.

    It depends on the pass alone, not on what has been compiled already, so scoring twice gives the same bits.
    """
    if device.type == "cuda" and find_spec("triton") and available("triton", device) == "triton":
        return "triton"  # compiles within a second, or is cached on disk
    if logits < _COMPILE_FROM.get(device.type, 10**13):
        return "chunked"
    return available("compiled", device)


@cache
def available(impl: Impl, device: torch.device) -> Impl:
    """`impl` if it works on this machine, else `"chunked"` with a warning (no compiler, no Triton, ...)."""
    try:
        with compilation_allowed():
            _REDUCTIONS[impl](
                torch.zeros(2, 3, device=device), torch.zeros(2, dtype=torch.int64, device=device), frozenset()
            )
    except Exception as error:  # whatever went wrong, the chunked implementation works
        reason = next(iter(str(error).strip().splitlines()), "")
        logger.warning(
            "impl='%s' does not work on this machine (%s: %s). Scoring uses 'chunked', which is a little slower.",
            impl,
            type(error).__name__,
            reason,
        )
        return "chunked"
    return impl


# ---- From logits to statistics ----


def _formulas(logits: Tensor, targets: Tensor, extras: Collection[str] = ()) -> dict[str, Tensor]:
    """The definitions of the statistics, written as formulas."""
    target = logits.gather(1, targets[:, None])
    peak = logits.amax(1, keepdim=True)
    shifted = logits - peak
    exps = shifted.exp()
    total = exps.sum(1)
    # an infinite peak makes these NaN, as it should
    stats = {
        "surprisal": total.log() + (peak - target)[:, 0],
        "rank": (logits > target).sum(1) + 1,
        "ties": ((logits == target).sum(1) - 1).clamp(min=0),  # clamped because NaN does not equal itself
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

    Comparisons write 0.0 and 1.0, because a CPU takes five times as long to sum booleans as to sum floats. A float32
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
    """The formulas in one pass, without a scratch buffer."""
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
    """The statistics of `_formulas` from sums over the columns: `rank` and `ties` count columns above and equal to the
    target (its own included), `peak` is the largest logit, `total` is Σ exp(logit − peak), `more["entropy"]` is
    Σ (logit − peak) · exp(logit − peak), and `more["sum_p2"]` is Σ exp(logit − peak)²."""
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
    # one compilation serves any number of rows and columns, but a single row and each set of extras need their own
    # (unwrapped, because the tests wrap every function to check shapes, and the wrapper cannot be compiled)
    return torch.compile(inspect.unwrap(_formulas), dynamic=True)


def _reduce_compiled(logits: Tensor, targets: Tensor, extras: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    return _compiled()(logits, targets, tuple(sorted(extras)))


@contextmanager
def compilation_allowed() -> Iterator[None]:
    """Allow compilation even while a compiled student runs uncompiled, and silence torch's own warnings about it."""
    with torch.compiler.set_stance("default"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_REDUCTIONS: dict[str, Callable[[Tensor, Tensor, frozenset[str]], dict[str, Tensor]]] = {
    "reference": _reduce_reference,
    "chunked": _reduce_in_passes,
    "compiled": _reduce_compiled,
    "triton": _reduce_in_triton,
}
