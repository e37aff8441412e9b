"""Batches of a fixed number of tokens, padding included, for trainers that pad: samples of like length go together.

The plan is divided into windows. In one window samples are sorted from long to short, in the next from short to long,
so that a batch across two windows holds like lengths too. Batches are cut from that sequence: each takes what follows,
as long as its samples, padded to its longest, have no more tokens than a batch may have. Then the batches return to
the plan's order, by the earliest sample of each. So a sample is trained about two windows from where it was planned at
most.
"""

from __future__ import annotations

import numpy as np

from distill_sampler.types import IntArray


def lay_out_padded(lengths: IntArray, budget: int, window: int) -> tuple[IntArray, IntArray]:
    """`([n], [batches + 1])`: the places `0..n-1` in the order of the batches, and where each batch begins in it.

    Within a batch, places ascend. `lengths [5, 1, 4, 1, 5, 1]` with 10 tokens a batch and one window
    `-> [0, 4, 1, 2, 3, 5], [0, 2, 4, 6]`: the second batch pads 1 to 4.

    Args:
        lengths: `[n]` the length of the sample at each place in tokens, from 1 to the budget.
        budget: how many tokens a batch has at most, with its padding.
        window: samples of a window.
    """
    places = np.arange(len(lengths))
    number = places // window
    by_length = np.lexsort((places, np.where(number % 2, lengths, -lengths), number))
    starts, longest = [0], 0
    for place, length in enumerate(lengths[by_length].tolist()):
        longest = max(longest, length)
        if (place - starts[-1] + 1) * longest > budget:
            starts.append(place)
            longest = length
    bounds = np.array([*starts, len(lengths)])
    batch = np.repeat(np.arange(len(starts)), np.diff(bounds))
    earliest = np.minimum.reduceat(by_length, bounds[:-1])
    order = by_length[np.lexsort((by_length, earliest[batch]))]
    sizes = np.diff(bounds)[np.argsort(earliest)]
    return order, np.concatenate([[0], np.cumsum(sizes)])
