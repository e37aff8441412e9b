"""Who scores what: arithmetic of ranks, simulated."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill_sampler.distributed import Ranks


@given(samples=st.integers(0, 60), world_size=st.integers(1, 9))
def test_every_sample_is_read_by_exactly_one_process(samples: int, world_size: int) -> None:
    block = np.arange(samples) + 100
    shares = [Ranks(rank=rank, world_size=world_size).share(block) for rank in range(world_size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(samples))


@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_processes_get_nearly_the_same_tokens(world_size: int) -> None:
    lengths = np.sort(np.random.default_rng(0).lognormal(6, 1, 100 * world_size).astype(int))[::-1]
    tokens = [lengths[Ranks(rank=rank, world_size=world_size).share(lengths)].sum() for rank in range(world_size)]
    assert max(tokens) / np.mean(tokens) < 1.1


def test_one_process_sends_nothing() -> None:
    assert not torch.distributed.is_initialized()
    alone = Ranks.current(torch.device("cpu"))
    values = np.array([1.0, np.nan])
    assert alone.total(values) is values
    assert alone.most(7) == 7
    alone.require_equal("abcdef012345", "plan")
