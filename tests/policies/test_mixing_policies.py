"""MixDomains and MixTeachers."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_pools import everything, make_pool, rng

from distill_sampler.policies import MixDomains, MixTeachers
from distill_sampler.types import IntArray

quick = settings(max_examples=150, deadline=None)
COUNTS = st.lists(st.integers(1, 60), min_size=2, max_size=4)
SHARES = st.lists(st.integers(1, 9) | st.sampled_from([0.7, 0.3, 0.1, 2.5]), min_size=4, max_size=4)


def counts_of(column: list[str], indices: IntArray) -> dict[str, int]:
    return Counter(column[index] for index in indices.tolist())


@quick
@given(counts=COUNTS, shares=SHARES, num=st.none() | st.integers(1, 200))
def test_shares_of_domains_hold_to_one_sample(counts: list[int], shares: list[float], num: int | None) -> None:
    domains = [name for name, count in zip("wxyz", counts, strict=False) for _ in range(count)]
    wanted = dict(zip("wxyz", shares[: len(counts)], strict=False))
    pool = make_pool(np.zeros(len(domains)), domain=domains)
    result = MixDomains(wanted, num=num)(everything(pool), pool, rng()).indices
    got = counts_of(domains, result)
    for domain, share in wanted.items():
        assert abs(got[domain] - len(result) * share / sum(wanted.values())) < 1 + 1e-6
    if num is None:
        assert len(set(result.tolist())) == len(result)  # no repeats, and no more is possible without
        stock = Counter(domains)
        most = min(stock[domain] * sum(wanted.values()) / share for domain, share in wanted.items())
        assert most - 1 - 1e-6 < len(result) <= most + 1e-6
    else:
        assert len(result) == num
        for domain in wanted:
            times = [Counter(result.tolist())[i] for i in range(len(domains)) if domains[i] == domain]
            assert max(times) - min(times) <= 1


@quick
@given(
    lengths=st.lists(st.integers(1, 50), min_size=2, max_size=60),
    share=st.integers(1, 9),
    num=st.none() | st.integers(200, 2000),
)
def test_shares_of_tokens_hold_to_one_sample(lengths: list[int], share: int, num: int | None) -> None:
    domains = ["x", "y"] + ["x"] * ((len(lengths) - 2) // 2) + ["y"] * ((len(lengths) - 1) // 2)
    pool = make_pool(np.zeros(len(domains)), domain=domains, lengths=lengths)
    result = MixDomains({"x": share, "y": 1}, by="tokens", num=num)(everything(pool), pool, rng()).indices
    stock = {d: sum(n for n, domain in zip(lengths, domains, strict=True) if domain == d) for d in "xy"}
    total = min(stock["x"] * (share + 1) / share, stock["y"] * (share + 1)) if num is None else num
    for domain, part in (("x", share / (share + 1)), ("y", 1 / (share + 1))):
        tokens = sum(lengths[i] for i in result.tolist() if domains[i] == domain)
        assert abs(tokens - total * part) <= max(lengths) / 2 + 1


def test_a_share_of_zero_leaves_a_domain_out() -> None:
    pool = make_pool(range(4), domain=list("xxyz"))
    assert MixDomains({"x": 1, "y": 1, "z": 0})(everything(pool), pool, rng()).indices.tolist() in ([0, 2], [1, 2])


def test_who_is_left_out_is_drawn_evenly_and_anew() -> None:
    pool = make_pool(range(12), domain=["x"] * 10 + ["y"] * 2)
    kept = Counter(
        index
        for seed in range(1000)
        for index in MixDomains({"x": 1, "y": 1})(everything(pool), pool, rng(seed)).indices.tolist()
    )
    assert kept[10] == kept[11] == 1000
    assert all(abs(kept[index] - 200) < 60 for index in range(10))


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ({"x": 1}, r"^MixDomains\(column='domain'\): .*'y'.* 0 to leave it out"),
        ({"x": 1, "y": 1, "yy": 1}, "MixDomains: There is no domain 'yy'.* Did you mean 'y'"),
        ({"x": 1, "y": 1, "z": 1}, "^MixDomains: .*'z'.* set its share to 0"),
    ],
)
def test_shares_and_domains_must_match(shares: dict[str, float], sentence: str) -> None:
    pool = make_pool(range(3), domain=list("xyz"))
    with pytest.raises(ValueError, match=sentence):
        MixDomains(shares)(everything(pool).take(np.array([0, 1])), pool, rng())


def largest_cap(counts: list[int], max_share: float) -> int:
    """The most that each teacher may have, by trying every number."""
    return max(c for c in range(max(counts) + 1) if c <= max_share * sum(min(n, c) for n in counts) + 1e-9)


@quick
@given(counts=COUNTS, max_share=st.sampled_from([0.25, 0.3, 1 / 3, 0.5, 0.7, 1.0]))
def test_no_teacher_has_more_than_its_share_and_no_more_is_left_out(counts: list[int], max_share: float) -> None:
    teachers = [name for name, count in zip("wxyz", counts, strict=False) for _ in range(count)]
    pool = make_pool(np.zeros(len(teachers)), teacher=teachers)
    if max_share * len(counts) < 1 - 1e-9:
        with pytest.raises(ValueError, match=rf"MixTeachers\(max_share=.*\): .* {len(counts)} teachers") as refused:
            MixTeachers(max_share)(everything(pool), pool, rng())
        cure = re.search(r"or max_share=([\d.]+)\.$", str(refused.value))
        assert cure is not None
        MixTeachers(float(cure[1]))(everything(pool), pool, rng())
        return
    got = counts_of(teachers, MixTeachers(max_share)(everything(pool), pool, rng()).indices)
    cap = largest_cap(counts, max_share)
    assert got == {name: min(count, cap) for name, count in zip("wxyz", counts, strict=False)}
    assert max(got.values()) <= max_share * sum(got.values()) + 1e-6


def test_mix_teachers_leaves_out_whom_it_draws() -> None:
    pool = make_pool(range(12), teacher=["A"] * 10 + ["B"] * 2)
    kept = Counter(
        index for seed in range(1000) for index in MixTeachers(0.5)(everything(pool), pool, rng(seed)).indices.tolist()
    )
    assert kept[10] == kept[11] == 1000
    assert all(abs(kept[index] - 200) < 60 for index in range(10))
