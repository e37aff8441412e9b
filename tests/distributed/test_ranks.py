"""Who scores what: arithmetic of ranks, simulated."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill_sampler.distributed import Ranks


def shares(tokens: np.ndarray, world_size: int) -> list[np.ndarray]:
    return [Ranks(rank=rank, world_size=world_size).share(tokens) for rank in range(world_size)]


@given(tokens=st.lists(st.integers(1, 9999), max_size=60), world_size=st.integers(1, 9))
def test_every_piece_is_read_by_exactly_one_process(tokens: list[int], world_size: int) -> None:
    dealt = shares(np.array(tokens, np.int64), world_size)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(tokens)))
    assert all((np.diff(share) > 0).all() for share in dealt)


@given(tokens=st.lists(st.integers(1, 9999), min_size=1, max_size=60), world_size=st.integers(1, 9))
def test_no_process_has_more_than_the_mean_and_a_piece(tokens: list[int], world_size: int) -> None:
    pieces = np.array(tokens, np.int64)
    loads = [int(pieces[share].sum()) for share in shares(pieces, world_size)]
    assert max(loads) <= sum(tokens) / world_size + max(tokens)
    assert max(loads) - min(loads) <= max(tokens)


@pytest.mark.parametrize("world_size", [2, 8, 64])
@pytest.mark.parametrize("order", ["sorted", "as they come"])
def test_processes_get_nearly_the_same_tokens(world_size: int, order: str) -> None:
    """Whatever the sizes: groups of candidates of one prompt are no longer sorted by what there is to read of them."""
    tokens = np.random.default_rng(0).lognormal(6, 1, 100 * world_size).astype(int)
    if order == "sorted":
        tokens = np.sort(tokens)[::-1]
    loads = [tokens[share].sum() for share in shares(tokens, world_size)]
    assert max(loads) / np.mean(loads) < 1.01


@pytest.mark.parametrize("other", ["00000000000b", "00000000000a"])
def test_processes_that_hold_different_things_stop(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: what the second process sends."""

    def gathered(room: list[torch.Tensor], mine: torch.Tensor) -> None:
        room[0].copy_(mine)
        room[1].fill_(int(other, 16))

    monkeypatch.setattr("distill_sampler.distributed.dist.all_gather", gathered)
    ranks = Ranks(rank=0, world_size=2)
    if other == "00000000000a":
        ranks.require_equal("00000000000a", "plan")
        return
    with pytest.raises(ValueError, match=r"same plan: rank 0 has 00000000000a, rank 1 has 00000000000b.*same data"):
        ranks.require_equal("00000000000a", "plan")


def test_one_process_sends_nothing() -> None:
    assert not torch.distributed.is_initialized()
    alone = Ranks.current(torch.device("cpu"))
    values = np.array([1.0, np.nan])
    assert alone.elementwise_sum(values) is values
    assert alone.max_over_ranks(7) == 7
    alone.require_equal("abcdef012345", "plan")
