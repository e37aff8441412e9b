"""The kernel against eight lines of full logits."""

import importlib
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill_sampler.reading import head
from distill_sampler.reading import token_stats as kernel
from distill_sampler.reading.head import LogitTransform, Project, linear, module
from distill_sampler.reading.token_stats import EXTRAS, token_stats

AS_IT_IS = LogitTransform()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLS = ["reference", "chunked", *(["triton"] if INTERPRETED else [])]


def reference(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Written down as in the paper."""
    logits = logits.double()
    target = logits.gather(1, targets[:, None])
    logp = logits.log_softmax(1)
    return {
        "surprisal": -logp.gather(1, targets[:, None])[:, 0],
        "rank": 1 + (logits > target).sum(1),
        "ties": (logits == target).sum(1) - 1,
        "entropy": -(logp.exp() * logp.clamp(min=-1e9)).sum(1),
        "top1": logp.exp().amax(1),
        "sum_p2": logp.exp().square().sum(1),
        "top50": logp.exp().topk(min(50, logp.shape[1])).values.sum(1),
        "top50_sum_p2": logp.exp().topk(min(50, logp.shape[1])).values.square().sum(1),
    }


def random_head(seed: int, tokens: int, vocab: int, hidden: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, hidden, generator=generator),
        torch.randint(vocab, (tokens,), generator=generator),
        torch.randn(vocab, hidden, generator=generator),
    )


def given_logits(logits: Tensor) -> Project:
    return module(lambda _: logits, AS_IT_IS)


def assert_close(stats: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    for name in stats:
        if name in ("rank", "ties"):
            # a near tie may fall either way in the last bit
            assert (stats[name] != expected[name]).float().mean() <= 0.05, name
        else:
            torch.testing.assert_close(stats[name].double(), expected[name], atol=atol, rtol=1e-5, msg=name)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16), tokens=st.integers(1, 40), vocab=st.integers(2, 300), chunk=st.integers(1, 50)
)  # fmt: skip
def test_statistics_equal_full_logits_for_any_chunk(seed: int, tokens: int, vocab: int, chunk: int) -> None:
    hidden, targets, weight = random_head(seed, tokens, vocab)
    stats = token_stats(hidden, targets, linear(weight, None, AS_IT_IS), chunk=chunk, extras=EXTRAS)
    assert_close(stats, reference(hidden @ weight.T, targets))


@pytest.mark.parametrize("impl", IMPLS)
def test_implementations_agree(impl: Any) -> None:
    hidden, targets, weight = random_head(0, 333, 5003)
    project = linear(weight, None, AS_IT_IS)
    stats = token_stats(hidden, targets, project, chunk=100, extras=EXTRAS, impl=impl)
    assert_close(stats, reference(hidden @ weight.T, targets))


@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("vocab", [2, 500, 4096, 10_007])
def test_equal_logits_give_equal_ranks_and_ties_in_every_implementation(vocab: int, impl: Any) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(20, vocab, generator=generator) * 5
    logits[10:] = logits[10:].round()  # many ties
    targets = torch.randint(vocab, (20,), generator=generator)
    expected, stats = (
        token_stats(logits, targets, given_logits(logits), chunk=20, extras=EXTRAS, impl=some)
        for some in ("reference", impl)
    )
    for name in ("rank", "ties"):
        assert torch.equal(stats[name], expected[name])
    for name in ("surprisal", *EXTRAS):
        torch.testing.assert_close(stats[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(INTERPRETED or not find_spec("triton"), reason="Triton is not installed")
def test_the_laws_hold_when_the_kernel_is_interpreted() -> None:
    # in a process of its own: whether Triton interprets or compiles is settled when it is imported
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "triton", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_memory_that_torch_keeps_for_later_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gigabyte = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gigabyte, 80 * gigabyte))  # as late in training
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60 * gigabyte)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 60 * gigabyte)
    assert kernel.chunk_for(152_000, torch.device("cuda")) == 192
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20 * gigabyte)
    assert kernel.chunk_for(152_000, torch.device("cuda")) == 864


@pytest.mark.skipif(not torch.cuda.is_available() or not find_spec("triton"), reason="no accelerator with Triton")
def test_triton_is_chosen_on_an_accelerator_and_agrees() -> None:
    assert kernel.fastest(torch.device("cuda"), logits=1) == "triton"
    hidden, targets, weight = (tensor.cuda() for tensor in random_head(0, 333, 5003))
    project = linear(weight, None, AS_IT_IS)
    stats = token_stats(hidden, targets, project, chunk=100, extras=EXTRAS, impl="triton")
    expected = token_stats(hidden, targets, project, extras=EXTRAS, impl="reference")
    assert_close(stats, {name: values.double() for name, values in expected.items()})


@pytest.mark.slow
def test_the_compiled_implementation_agrees_and_compiles_a_few_times_only() -> None:
    if kernel.available("compiled", torch.device("cpu")) != "compiled":
        pytest.skip("torch.compile does not work on this machine")
    counters = importlib.import_module("torch._dynamo.utils").counters
    before = counters["stats"]["unique_graphs"]  # of other tests
    for vocab in (211, 5003, 50_000):
        for tokens in (1, 2, 255, 256, 300, 513):
            hidden, targets, weight = random_head(tokens, tokens, vocab)
            stats = token_stats(hidden, targets, linear(weight, None, AS_IT_IS), extras=EXTRAS, impl="compiled")
            assert_close(stats, reference(hidden @ weight.T, targets))
    assert counters["stats"]["unique_graphs"] - before <= 6  # of 18 shapes: one row or several, with extras or without


def test_without_a_working_compiler_there_is_one_line_and_the_other_implementation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: object) -> None:
        raise RuntimeError("no C++ compiler found\nand much more")

    monkeypatch.setitem(kernel._REDUCTIONS, "compiled", no_compiler)
    kernel.available.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert kernel.available("compiled", torch.device("cpu")) == "chunked"
        assert kernel.available("compiled", torch.device("cpu")) == "chunked"
    kernel.available.cache_clear()
    assert len(caplog.records) == 1
    assert "no C++ compiler found" in caplog.text
    assert "much more" not in caplog.text


def test_only_passes_that_are_long_enough_compile() -> None:
    assert kernel.fastest(torch.device("cpu"), logits=10**9) == "chunked"


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tie_takes_the_best_rank_and_a_token_never_outranks_itself(impl: Any) -> None:
    hidden = torch.ones(3, 1)
    weight = torch.tensor([[2.0], [2.0], [1.0], [3.0]])
    stats = token_stats(hidden, torch.tensor([0, 2, 3]), linear(weight, None, AS_IT_IS), impl=impl)
    assert stats["rank"].tolist() == [2, 4, 1]  # two share rank 2; the next has three above it
    assert stats["ties"].tolist() == [1, 0, 0]


def test_ranks_are_not_clipped_here() -> None:
    weight = torch.arange(5000.0)[:, None] / 1000
    stats = token_stats(torch.ones(1, 1), torch.tensor([0]), linear(weight, None, AS_IT_IS))
    assert stats["rank"].item() == 5000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upcast", ["once", "in pieces"])
def test_low_precision_heads_give_float32_products(
    dtype: torch.dtype, upcast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_UPCAST_BYTES", 64 * 4 * 100)  # 100 of the 997 columns at a time
    hidden, targets, weight = (t.to(dtype) if t.is_floating_point() else t for t in random_head(1, 200, 997, 64))
    copy = head.operand_copy(weight) if upcast == "once" else None
    stats = token_stats(hidden, targets, linear(weight, None, AS_IT_IS, kept=copy))
    exact = hidden.double() @ weight.double().T
    expected = reference(exact, targets)
    torch.testing.assert_close(stats["surprisal"].double(), expected["surprisal"], atol=1e-4, rtol=1e-5)
    assert (stats["rank"] == expected["rank"]).float().mean() > 0.99
    # the product rounded to bfloat16 would be far off that budget
    rounded = reference(exact.to(torch.bfloat16), targets)
    assert (rounded["surprisal"] - expected["surprisal"]).abs().max() > 1e-2


@pytest.mark.parametrize("copied", ["once", "in pieces"])
def test_both_factors_are_rounded_before_they_are_multiplied(copied: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_UPCAST_BYTES", 64 * 4 * 100)  # 100 of the 997 columns at a time
    hidden, targets, weight = random_head(1, 200, 997, 64)
    copy = head.operand_copy(weight, torch.bfloat16) if copied == "once" else None
    stats = token_stats(hidden, targets, linear(weight, None, AS_IT_IS, operands=torch.bfloat16, kept=copy))
    exact = hidden.bfloat16().double() @ weight.bfloat16().double().T  # and the result is not rounded
    torch.testing.assert_close(
        stats["surprisal"].double(), reference(exact, targets)["surprisal"], atol=1e-4, rtol=1e-5
    )
    unrounded = reference(hidden @ weight.T, targets)
    assert (stats["surprisal"] - unrounded["surprisal"]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("states", "operands", "expected"),
    [(torch.float32, None, False), (torch.bfloat16, None, True), (torch.float32, torch.bfloat16, True)],
)
def test_factors_are_multiplied_as_bfloat16_only_if_both_are(
    states: torch.dtype, operands: torch.dtype | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, targets, weight = random_head(1, 20, 97, 16)
    calls: list[bool] = []
    plain = head._multiply_in_bfloat16
    monkeypatch.setattr(head, "_multiply_in_bfloat16", lambda: calls.append(True) or plain())
    token_stats(hidden.to(states), targets, linear(weight.to(states), None, AS_IT_IS, operands=operands))
    assert bool(calls) is expected


def test_one_room_serves_every_chunk_and_every_forward() -> None:
    room = head.Room()
    first = room(5, 7, torch.device("cpu"))
    assert room(3, 7, torch.device("cpu")).data_ptr() == first.data_ptr()
    assert room(3, 8, torch.device("cpu")).shape == (3, 8)
    assert room(9, 8, torch.device("cpu")).shape == (9, 8)


def test_a_large_head_is_never_copied_whole() -> None:
    assert head.operand_copy(torch.empty(2**14, 2**13, device="meta"), torch.bfloat16) is None
    assert head.operand_copy(torch.empty(2**14, 2**13, dtype=torch.bfloat16, device="meta")) is None
    assert head.operand_copy(torch.zeros(4, 4)) is None


def test_the_precision_setting_of_the_process_is_put_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    hidden, targets, weight = (t.to(torch.bfloat16) if t.is_floating_point() else t for t in random_head(2, 4, 32))
    token_stats(hidden, targets, linear(weight, None, AS_IT_IS))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_bias_scale_and_soft_cap_are_applied_in_the_models_order() -> None:
    hidden, targets, weight = random_head(3, 30, 101)
    bias = torch.linspace(-1, 1, 101)
    stats = token_stats(hidden, targets, linear(weight, bias, LogitTransform(scale=0.25, softcap=3.0)))
    expected = reference(3 * torch.tanh(0.25 * (hidden @ weight.T + bias).double() / 3), targets)
    assert_close(stats, expected)
    assert stats["rank"].tolist() == expected["rank"].tolist()


def test_any_module_as_head_gives_the_same_and_keeps_its_output() -> None:
    hidden, targets, weight = random_head(4, 30, 101)
    logits = hidden @ weight.T
    kept = logits.clone()
    stats = token_stats(hidden, targets, given_logits(logits), chunk=30)
    direct = token_stats(hidden, targets, linear(weight, None, AS_IT_IS))
    torch.testing.assert_close(stats["surprisal"], direct["surprisal"], atol=1e-5, rtol=1e-5)
    assert stats["rank"].tolist() == direct["rank"].tolist()
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_infinite_logits_show_and_minus_infinity_is_an_impossible_token(impl: Any) -> None:
    logits = torch.zeros(3, 5)
    logits[0, 3], logits[1, 3], logits[2, 3] = float("nan"), float("inf"), float("-inf")
    stats = token_stats(
        torch.zeros(3, 1), torch.tensor([1, 1, 1]), given_logits(logits), extras=EXTRAS, impl=impl, chunk=3
    )
    assert stats["surprisal"].isfinite().tolist() == [False, False, True]
    for name, value in (("surprisal", 4.0), ("entropy", 4.0)):
        assert stats[name][2].item() == pytest.approx(torch.tensor(value).log().item())
    assert stats["sum_p2"][2].item() == pytest.approx(0.25)
    assert stats["rank"][2].item() == 1
    assert stats["ties"][2].item() == 3


def test_columns_that_only_pad_the_vocabulary_count_as_in_the_models_softmax() -> None:
    hidden, targets, weight = random_head(6, 20, 100)
    padded = torch.cat([weight, torch.zeros(28, 16)])
    stats = token_stats(hidden, targets, linear(padded, None, AS_IT_IS))
    assert_close(stats, reference(hidden @ padded.T, targets))
    assert (stats["surprisal"] > reference(hidden @ weight.T, targets)["surprisal"]).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens_give_no_statistics(impl: Any) -> None:
    _, _, weight = random_head(5, 1, 7)
    stats = token_stats(
        torch.empty(0, 16), torch.empty(0, dtype=torch.long), linear(weight, None, AS_IT_IS), extras=EXTRAS, impl=impl
    )
    assert {name: tuple(values.shape) for name, values in stats.items()} == dict.fromkeys(
        ("surprisal", "rank", "ties", *EXTRAS), (0,)
    )
