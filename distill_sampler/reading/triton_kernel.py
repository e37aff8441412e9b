# mypy: ignore-errors
"""The reduction of `token_stats` as one Triton kernel, which reads each logit once. Importing it needs Triton.

The product with the head is left to the vendor's library, which writes its float32 result to memory. For students of 4B
and more, a kernel fused with the product could save at most 1 to 3 % of a whole forward.

Without an accelerator it runs, slowly, in Triton's interpreter: set `TRITON_INTERPRET=1` before the import.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024
"""Columns that a program reads at a time: 8 in each of its 128 threads. Among the fastest of twelve settings on an
H200: 3.4 TB/s of logits, where a plain maximum over the rows reads 3.9 (`recipes/benchmarks/results/h200.txt`)."""


def reduce_rows(
    logits: Tensor, targets: Tensor, *, rank: Tensor, ties: Tensor, peak: Tensor, total: Tensor, **more: Tensor
) -> None:
    """Fill the sums that all statistics are computed from, `[tokens]` each.

    For finite logits: `rank`, the number of columns above the target's logit; `ties`, the number of columns equal to
    it, its own included; `peak`, the largest logit; `total`, Σ exp(logit − peak). On request also `entropy`,
    Σ (logit − peak) exp(logit − peak), and `sum_p2`, Σ exp(logit − peak)².

    Args:
        logits: `[tokens, vocab]` float32.
        targets: `[tokens]` the target columns.
        rank: output.
        ties: output.
        peak: output.
        total: output.
        more: any of the outputs `entropy` and `sum_p2`.
    """
    logits = logits.contiguous()
    tokens, vocab = logits.shape
    with torch.cuda.device_of(logits):
        _reduce_row[(tokens,)](
            logits,
            targets,
            rank,
            ties,
            peak,
            total,
            more.get("entropy", total),
            more.get("sum_p2", total),
            vocab,
            TILE=min(_TILE, triton.next_power_of_2(vocab)),
            ENTROPY="entropy" in more,
            SUM_P2="sum_p2" in more,
            num_warps=4,
        )


@triton.jit
def _reduce_row(
    logits,
    targets,
    rank_to,
    ties_to,
    peak_to,
    total_to,
    entropy_to,
    sum_p2_to,
    vocab,
    TILE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUM_P2: tl.constexpr,
):
    """Reduce one row, a tile at a time. Each column of the tile has sums of its own, which are combined at the end, so
    that threads do not wait for each other. When a column's peak rises, its sums are rescaled to the new peak."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    # the target's logit comes from the row that it is compared with, so that no token outranks itself
    target = tl.load(logits + tl.load(targets + row))
    rank = tl.zeros([TILE], tl.int32)
    ties = tl.zeros([TILE], tl.int32)
    peak = tl.full([TILE], -3.4e38, tl.float32)  # not -inf, because -inf minus -inf is NaN
    total = tl.zeros([TILE], tl.float32)
    entropy = tl.zeros([TILE], tl.float32)
    sum_p2 = tl.zeros([TILE], tl.float32)
    for start in range(0, vocab, TILE):
        column = start + tl.arange(0, TILE)
        inside = column < vocab
        values = tl.load(logits + column, mask=inside, other=float("-inf"))
        rank += (values > target).to(tl.int32)
        ties += ((values == target) & inside).to(tl.int32)
        higher = tl.maximum(peak, values)
        shift = peak - higher
        scale = tl.exp(shift)
        shifted = values - higher
        exps = tl.exp(shifted)
        if ENTROPY:  # 0 · log 0 = 0, also where a logit is -inf
            entropy = scale * (entropy + tl.maximum(shift, -1e4) * total) + tl.maximum(shifted, -1e4) * exps
        if SUM_P2:
            sum_p2 = scale * scale * sum_p2 + exps * exps
        total = scale * total + exps
        peak = higher
    highest = tl.max(peak, 0)
    shift = peak - highest
    scale = tl.exp(shift)
    tl.store(rank_to + row, tl.sum(rank, 0).to(tl.float32))
    tl.store(ties_to + row, tl.sum(ties, 0).to(tl.float32))
    tl.store(peak_to + row, highest)
    tl.store(total_to + row, tl.sum(scale * total, 0))
    if ENTROPY:
        tl.store(entropy_to + row, tl.sum(scale * (entropy + tl.maximum(shift, -1e4) * total), 0))
    if SUM_P2:
        tl.store(sum_p2_to + row, tl.sum(scale * scale * sum_p2, 0))
