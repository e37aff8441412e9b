"""The statistics of comparisons, on simulated data with known effects."""

import math

import numpy as np
import pytest

from distill_sampler.compare.statistics import contrasts, estimate, holm, seeds_needed

SEEDS, PROMPTS = 5, 24


def simulated(rng: np.random.Generator, *, between: float, within: float, effect: float = 0.0) -> list[np.ndarray]:
    return list(rng.normal(effect, between, (SEEDS, 1)) + rng.normal(0, within, (SEEDS, PROMPTS)))


def error_of(between: float, within: float) -> float:
    return math.sqrt((between**2 + within**2 / PROMPTS) / SEEDS)


def rates(trials: int, between: float, within: float, effect: float, margin: float) -> tuple[float, float, float]:
    """How often the interval covers the effect, a difference is found, and equivalence is claimed."""
    rng = np.random.default_rng(7)
    covered = found = equivalent = 0
    for trial in range(trials):
        one = estimate(simulated(rng, between=between, within=within, effect=effect), draws=1000, seed=trial)
        low, high = one.interval()
        inner = one.interval(0.9)
        covered += low <= effect <= high
        found += one.p_value() < 0.05
        equivalent += -margin < inner[0] and inner[1] < margin
    return covered / trials, found / trials, equivalent / trials


def test_intervals_cover_and_no_difference_is_rarely_found() -> None:
    covered, found, _ = rates(300, 1.0, 1.0, 0.0, margin=9)
    assert abs(covered - 0.95) < 0.04  # two standard errors of 300 trials, and the promise of 1.5 %
    assert found < 0.09


@pytest.mark.slow
@pytest.mark.parametrize(("between", "within"), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.1), (0.1, 1.0)])
def test_coverage_power_and_equivalence_are_as_promised(between: float, within: float) -> None:
    error = error_of(between, within)
    covered, found, equivalent = rates(3000, between, within, 0.0, margin=6 * error)
    assert abs(covered - 0.95) < 0.015 + 0.004  # and one standard error of the simulation
    assert found < 0.065
    assert equivalent > 0.8
    # a difference of exactly the margin is called equivalent in 5 % of trials at most
    _, _, wrong = rates(3000, between, within, 6 * error, margin=6 * error)
    assert wrong < 0.06
    # Student's t with 4 degrees of freedom: 2.776 + 0.941 standard errors are found with probability 0.8
    _, power, _ = rates(3000, between, within, 3.717 * error, margin=1)
    assert abs(power - 0.8) < 0.04


def test_the_detectable_difference_is_that_of_students_t() -> None:
    rng = np.random.default_rng(0)
    one = estimate(simulated(rng, between=1.0, within=1.0))
    assert one.detectable() / one.error == pytest.approx(2.776 + 0.941, rel=0.06)
    assert one.interval()[1] - one.mean == pytest.approx(2.776 * one.error, rel=0.06)


def test_the_naive_hierarchical_bootstrap_would_not_do() -> None:
    """With five seeds, plain percentiles are a quarter too narrow where seeds differ and too wide where they do not."""
    rng = np.random.default_rng(3)
    for between, within, naive in ((1.0, 0.01, 0.8), (0.0, 1.0, 1.25)):
        ratios = []
        for _ in range(40):
            data = np.array(simulated(rng, between=between, within=within))
            seeds = rng.integers(SEEDS, size=(400, SEEDS, 1))
            drawn = data[seeds, rng.integers(PROMPTS, size=(400, SEEDS, PROMPTS))].mean(axis=(1, 2))
            ratios.append(drawn.std() / (data.mean(axis=1).std(ddof=1) / math.sqrt(SEEDS)))
        assert (np.mean(ratios) < 1) == (naive < 1)


def test_the_same_differences_give_the_same_numbers() -> None:
    rng = np.random.default_rng(0)
    data = simulated(rng, between=1, within=1)
    first, second = estimate(data), estimate([each.copy() for each in data])
    assert first.interval() == second.interval()
    assert first.p_value() == second.p_value()


def test_seeds_may_have_different_numbers_of_prompts() -> None:
    one = estimate([np.array([1.0, 3.0]), np.array([4.0]), np.array([0.0, 0.0, 0.0])], draws=500)
    assert one.mean == pytest.approx(2.0)  # each seed counts once
    assert one.error == pytest.approx(np.std([2, 4, 0], ddof=1) / math.sqrt(3))


def test_one_seed_says_nothing() -> None:
    (one,) = contrasts({("a", "b"): [np.ones(50)]}, margin=0.1)
    assert (one.low, one.high, one.p, one.verdict) == (-math.inf, math.inf, 1.0, "open")
    assert math.isinf(one.detectable)


def test_an_arm_against_itself_is_equivalent() -> None:
    (one,) = contrasts({("a", "a"): [np.zeros(9)] * 3}, margin=0.1)
    assert (one.difference, one.p, one.verdict) == (0.0, 1.0, "equivalent")


def test_holm_multiplies_the_smallest_by_the_number_and_never_decreases() -> None:
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.5}) == pytest.approx(
        {"a": 0.09, "b": 0.04, "c": 0.09, "d": 0.5}
    )


def test_a_family_finds_nothing_where_nothing_is() -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(60):
        family = {("a", str(k)): simulated(rng, between=1, within=1) for k in range(4)}
        wrong += any(one.verdict in ("better", "worse") for one in contrasts(family, margin=0.1, draws=500))
    assert wrong <= 8  # 5 % of 60, and two standard errors


def test_the_sign_and_the_margin_decide_the_verdict() -> None:
    rng = np.random.default_rng(2)
    noise = [each * 0.01 for each in simulated(rng, between=1, within=1)]
    for effect, expected in ((1.0, "better"), (-1.0, "worse"), (0.0, "equivalent")):
        (one,) = contrasts({("a", "b"): [effect + each for each in noise]}, margin=0.2)
        assert one.verdict == expected
        assert one.low < one.difference < one.high


def test_seeds_needed_grow_with_the_noise_and_fall_with_the_effect() -> None:
    few, many = (seeds_needed(e, between=1.0, within=1.0, prompts=40) for e in (2.0, 0.5))
    assert few is not None
    assert many is not None
    assert few < many
    # the normal approximation: (1.96 + 0.84)² · variance / effect²
    assert many == pytest.approx((1.96 + 0.84) ** 2 * (1 + 1 / 40) / 0.25, rel=0.15)
    assert seeds_needed(1e-6, between=1.0, within=1.0, prompts=40, most=50) is None


@pytest.mark.parametrize(
    ("call", "cure"),
    [
        (lambda: estimate([]), "at least one seed"),
        (lambda: estimate([np.zeros(0)]), "at least one prompt"),
        (lambda: contrasts({}, margin=0), "positive"),
        (lambda: seeds_needed(0, between=1, within=1, prompts=2), "positive"),
    ],
)
def test_what_cannot_be_estimated_is_refused(call: object, cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        call()  # type: ignore[operator]
