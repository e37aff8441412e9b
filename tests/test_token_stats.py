"""The kernel against eight lines of full float32 logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill_sampler.token_stats import LogitTransform, linear, module, token_stats


def reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Surprisal and rank, written down as in the paper."""
    logits = logits.double()
    target = logits.gather(1, targets[:, None])
    return -logits.log_softmax(1).gather(1, targets[:, None])[:, 0], 1 + (logits > target).sum(1)


def random_head(seed: int, tokens: int, vocab: int, hidden: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, hidden, generator=generator),
        torch.randint(vocab, (tokens,), generator=generator),
        torch.randn(vocab, hidden, generator=generator),
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16), tokens=st.integers(1, 40), vocab=st.integers(2, 300), chunk=st.integers(1, 50)
)  # fmt: skip
def test_statistics_equal_full_logits_for_any_chunk(seed: int, tokens: int, vocab: int, chunk: int) -> None:
    hidden, targets, weight = random_head(seed, tokens, vocab)
    surprisal, rank = token_stats(hidden, targets, linear(weight, None, LogitTransform()), chunk=chunk)
    expected_surprisal, expected_rank = reference(hidden @ weight.T, targets)
    torch.testing.assert_close(surprisal.double(), expected_surprisal, atol=1e-5, rtol=1e-5)
    assert (rank != expected_rank).float().mean() <= 0.05  # a near tie may fall either way in the last bit


def test_a_tie_takes_the_best_rank_and_a_token_never_outranks_itself() -> None:
    hidden = torch.ones(3, 1)
    weight = torch.tensor([[2.0], [2.0], [1.0], [3.0]])
    _, rank = token_stats(hidden, torch.tensor([0, 2, 3]), linear(weight, None, LogitTransform()))
    assert rank.tolist() == [2, 4, 1]  # two share rank 2; the next has three above it


def test_ranks_are_not_clipped_here() -> None:
    weight = torch.arange(5000.0)[:, None] / 1000
    _, rank = token_stats(torch.ones(1, 1), torch.tensor([0]), linear(weight, None, LogitTransform()))
    assert rank.item() == 5000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_heads_give_float32_products(dtype: torch.dtype) -> None:
    hidden, targets, weight = (t.to(dtype) if t.is_floating_point() else t for t in random_head(1, 200, 997, 64))
    surprisal, rank = token_stats(hidden, targets, linear(weight, None, LogitTransform()))
    expected_surprisal, expected_rank = reference(hidden.double() @ weight.double().T, targets)
    torch.testing.assert_close(surprisal.double(), expected_surprisal, atol=1e-4, rtol=1e-5)
    assert (rank == expected_rank).float().mean() > 0.99
    # the product rounded to bfloat16 would be far off that budget
    rounded, _ = reference((hidden.double() @ weight.double().T).to(torch.bfloat16), targets)
    assert (rounded - expected_surprisal).abs().max() > 1e-2


def test_the_precision_setting_of_the_process_is_put_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    hidden, targets, weight = (t.to(torch.bfloat16) if t.is_floating_point() else t for t in random_head(2, 4, 32))
    token_stats(hidden, targets, linear(weight, None, LogitTransform()))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_bias_scale_and_soft_cap_are_applied_in_the_models_order() -> None:
    hidden, targets, weight = random_head(3, 30, 101)
    bias = torch.linspace(-1, 1, 101)
    transform = LogitTransform(scale=0.25, softcap=3.0)
    surprisal, rank = token_stats(hidden, targets, linear(weight, bias, transform))
    expected_surprisal, expected_rank = reference(
        3 * torch.tanh(0.25 * (hidden @ weight.T + bias).double() / 3), targets
    )
    torch.testing.assert_close(surprisal.double(), expected_surprisal, atol=1e-5, rtol=1e-5)
    assert rank.tolist() == expected_rank.tolist()


def test_any_module_as_head_gives_the_same_and_keeps_its_output() -> None:
    hidden, targets, weight = random_head(4, 30, 101)
    logits = hidden @ weight.T
    kept = logits.clone()
    surprisal, rank = token_stats(hidden, targets, module(lambda _: logits, LogitTransform()), chunk=30)
    direct = token_stats(hidden, targets, linear(weight, None, LogitTransform()))
    torch.testing.assert_close(surprisal, direct[0], atol=1e-5, rtol=1e-5)
    assert rank.tolist() == direct[1].tolist()
    assert torch.equal(logits, kept)


def test_nan_and_infinite_logits_show_and_minus_infinity_is_an_impossible_token() -> None:
    logits = torch.zeros(3, 5)
    logits[0, 3], logits[1, 3], logits[2, 3] = float("nan"), float("inf"), float("-inf")
    surprisal, rank = token_stats(
        torch.zeros(3, 1), torch.tensor([1, 1, 1]), module(lambda _: logits, LogitTransform())
    )
    assert surprisal.isfinite().tolist() == [False, False, True]
    assert surprisal[2].item() == pytest.approx(torch.tensor(4.0).log().item())
    assert rank[2].item() == 1


def test_no_tokens_give_no_statistics() -> None:
    _, _, weight = random_head(5, 1, 7)
    surprisal, rank = token_stats(
        torch.empty(0, 16), torch.empty(0, dtype=torch.long), linear(weight, None, LogitTransform())
    )
    assert (surprisal.shape, rank.shape) == ((0,), (0,))
