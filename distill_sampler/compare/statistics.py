"""How sure a difference between two arms is: pure functions of paired differences, without any model.

Two arms of one seed train on the same prompts and are measured on the same held-out prompts, so there is a difference
for each seed and prompt. Prompts of one seed share a student, so they are no independent samples; the seeds' means are.
A hierarchical bootstrap draws seeds and then prompts within each. By itself it is wrong for few seeds (with five, its
95 % intervals cover 82 to 99 %): it counts the prompts' noise twice and treats the variance of five numbers as known.
So its draws are scaled to the standard error of the seeds' means, and each is widened as Student's t is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.types import FloatArray

LEVEL = 0.95
POWER = 0.8
DRAWS = 20_000


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """A mean difference with the distribution of its error."""

    mean: float
    """Mean over seeds of the mean over prompts."""
    error: float
    """Standard error of the mean; NaN with one seed, whose error cannot be known."""
    seeds: int
    """Number of seeds."""
    deviations: FloatArray
    """`[draws]` draws of the error in standard errors, ascending, symmetric about 0 on average."""

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The interval that covers the true difference with this probability.

        Args:
            level: such as 0.95.

        Returns:
            Its two ends; infinite with one seed.
        """
        if self.seeds < 2:
            return -math.inf, math.inf
        tail = (1 - level) / 2
        low, high = np.quantile(self.deviations, [tail, 1 - tail])
        return self.mean + float(low) * self.error, self.mean + float(high) * self.error

    def p_value(self) -> float:
        """Two-sided probability of a difference as large as this one if there is none; 1 with one seed."""
        if self.seeds < 2:
            return 1.0
        if self.error == 0:
            return 1.0 if self.mean == 0 else 1 / (len(self.deviations) + 1)
        place = -self.mean / self.error
        below = int(np.searchsorted(self.deviations, place, side="right"))
        above = len(self.deviations) - int(np.searchsorted(self.deviations, place, side="left"))
        return min(1.0, 2 * (1 + min(below, above)) / (len(self.deviations) + 1))

    def detectable(self, alpha: float = 1 - LEVEL, power: float = POWER) -> float:
        """The smallest true difference that such a comparison finds with probability `power`; infinite with one seed.

        Args:
            alpha: the level of the test; with several contrasts, the strictest that Holm may ask for.
            power: such as 0.8.
        """
        if self.seeds < 2:
            return math.inf
        size = np.abs(self.deviations)
        return self.error * float(np.quantile(size, 1 - alpha) + np.quantile(self.deviations, power))


def estimate(differences: Sequence[FloatArray], *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean and error of paired differences, by a hierarchical bootstrap: seeds, then prompts.

    The bootstrap gives the shape of the error's distribution, and the seeds' means give its scale, the usual standard
    error. Each draw is divided by the root of a χ² variable over its degrees of freedom (seeds less one), because the
    scale is only estimated; for normal differences that makes Student's t.

    Args:
        differences: for each seed, `[prompts]` the differences of the two arms, all finite; the number of prompts may
            differ.
        draws: resamples.
        seed: of the resamples; equal arguments give equal results.

    Raises:
        ValueError: there is no seed, or a seed has no prompt.
    """
    if not differences or not all(len(of_seed) for of_seed in differences):
        raise ValueError("estimate(differences=…): give at least one seed, and at least one prompt for each.")
    seeds = len(differences)
    means = np.array([of_seed.mean(dtype=float) for of_seed in differences])
    mean = float(means.mean())
    if seeds < 2:
        return Estimate(mean=mean, error=math.nan, seeds=seeds, deviations=np.zeros(draws))
    error = float(means.std(ddof=1) / math.sqrt(seeds))
    rng = np.random.default_rng(seed)
    counts = np.array([len(of_seed) for of_seed in differences])
    padded = np.zeros((seeds, counts.max()))
    for place, of_seed in enumerate(differences):
        padded[place, : len(of_seed)] = of_seed
    totals = np.zeros(draws)
    for _ in range(seeds):
        which = rng.integers(seeds, size=draws)
        prompts = rng.integers(counts[which][:, None], size=(draws, counts.max()))
        taken = padded[which[:, None], prompts]
        taken[np.arange(counts.max()) >= counts[which][:, None]] = 0
        totals += taken.sum(axis=1) / counts[which]
    totals /= seeds
    spread = totals.std()
    shape = (totals - totals.mean()) / spread if spread > 0 else rng.standard_normal(draws)
    widened = shape / np.sqrt(rng.chisquare(seeds - 1, size=draws) / (seeds - 1))
    return Estimate(mean=mean, error=error, seeds=seeds, deviations=np.sort(widened))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values of a family, adjusted so that the chance of any false positive stays at the level (Holm, 1979).

    Args:
        p_values: by contrast.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Contrast:
    """One arm against another, judged. Differences are signed so that positive means: the first arm is better."""

    arm: str
    """The arm in question."""
    control: str
    """What it is compared with."""
    difference: float
    """Mean difference in the measure's unit."""
    low: float
    """Lower end of the interval (95 %)."""
    high: float
    """Upper end of the interval."""
    p: float
    """Two-sided p-value."""
    p_holm: float
    """The same, adjusted for the number of contrasts."""
    detectable: float
    """The smallest difference that would have been found with probability 0.8, all contrasts together at level 5 %."""
    margin: float
    """Differences below this count as none; fixed before the comparison."""
    equivalent: bool
    """Whether the 90 % interval lies within the margin (two one-sided tests at 5 %)."""
    seeds: int
    """Number of seeds."""

    @property
    def verdict(self) -> str:
        """`"better"`, `"worse"` (after Holm's adjustment), with `", but by less than the margin"` where that is shown
        too; `"equivalent"`; or `"open"`."""
        if self.p_holm < 1 - LEVEL:
            side = "better" if self.difference > 0 else "worse"
            return f"{side}, but by less than the margin" if self.equivalent else side
        return "equivalent" if self.equivalent else "open"


def contrasts(
    differences: Mapping[tuple[str, str], Sequence[FloatArray]],
    *,
    margin: float,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Contrast]:
    """Judge a family of contrasts that was fixed before looking.

    Args:
        differences: by (arm, control): for each seed, `[prompts]` differences, positive where the arm is better.
        margin: differences below this count as none.
        draws: resamples.
        seed: of the resamples.

    Raises:
        ValueError: the margin is not positive, or a contrast has no seed or a seed without a prompt.
    """
    if not margin > 0:
        raise ValueError(f"contrasts(margin={margin}): give a positive number, in the unit of the measure.")
    estimates = {pair: estimate(each, draws=draws, seed=seed) for pair, each in differences.items()}
    p_values = {"\n".join(pair): one.p_value() for pair, one in estimates.items()}
    adjusted = holm(p_values)
    alpha = (1 - LEVEL) / max(len(estimates), 1)
    judged = []
    for (arm, control), one in estimates.items():
        low, high = one.interval()
        inner_low, inner_high = one.interval(1 - 2 * (1 - LEVEL))
        judged.append(
            Contrast(
                arm=arm,
                control=control,
                difference=one.mean,
                low=low,
                high=high,
                p=p_values[f"{arm}\n{control}"],
                p_holm=adjusted[f"{arm}\n{control}"],
                detectable=one.detectable(alpha),
                margin=margin,
                equivalent=-margin < inner_low and inner_high < margin,
                seeds=one.seeds,
            )
        )
    return judged


def seeds_needed(
    effect: float, *, between: float, within: float, prompts: int, contrasts: int = 1, most: int = 1000
) -> int | None:
    """How many seeds show an effect of a given size with probability 0.8; None: more than `most`.

    Args:
        effect: the true difference.
        between: standard deviation of a seed's own difference, without the prompts' noise.
        within: standard deviation of a prompt's difference within a seed.
        prompts: held-out prompts of each seed.
        contrasts: how many contrasts share the level of 5 %.
        most: where to give up.

    Raises:
        ValueError: the effect is not positive.
    """
    if not effect > 0:
        raise ValueError(f"seeds_needed(effect={effect}): give a positive difference.")
    of_seed = math.sqrt(between**2 + within**2 / prompts)
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(DRAWS)
    for seeds in range(2, most + 1):
        widened = normal / np.sqrt(rng.chisquare(seeds - 1, size=DRAWS) / (seeds - 1))
        reach = np.quantile(np.abs(widened), 1 - (1 - LEVEL) / contrasts) + np.quantile(widened, POWER)
        if reach * of_seed / math.sqrt(seeds) <= effect:
            return seeds
    return None
