"""Laws of the metrics, found by listing their folder, and the formulas of their papers."""

import dataclasses
import importlib
import inspect
import pkgutil
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest

import distill_sampler.metrics
from distill_sampler import AslecDrop, GlobalNaturalness, RankSurprisalRatio
from distill_sampler.protocols import Metric, PassInfo, Read, Reader
from distill_sampler.testing import check_metric
from distill_sampler.types import Sample, TokenStats
from tests import tiny


@dataclasses.dataclass(frozen=True)
class Tutor(Reader):
    """A second model with another tokenizer, by name alone: `check_metric` makes up what it says."""

    identity: str = "tutor"

    @property
    def tokenizer(self) -> Any:
        return OWN_TOKENIZER

    def open(self, info: PassInfo) -> AbstractContextManager[Read]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Sibling(Tutor):
    """A second model with the student's tokenizer."""

    @property
    def tokenizer(self) -> Any:
        return None


OWN_TOKENIZER = tiny.tokenizer(("t", "h"), ("e", "Ġ"))
NEEDED = {"teacher": Tutor(), "reference": Tutor()}
"""What metrics must be given."""


def all_metrics() -> list[Metric]:
    """One object of each class of the folder that has everything a metric has."""
    found = []
    for module in pkgutil.iter_modules(distill_sampler.metrics.__path__, "distill_sampler.metrics."):
        for item in vars(importlib.import_module(module.name)).values():
            own = dataclasses.is_dataclass(item) and item.__module__ == module.name and hasattr(item, "reduce")
            if own and not inspect.isabstract(item):
                missing = [each.name for each in dataclasses.fields(item) if each.default is dataclasses.MISSING]
                needed = {"reference": Sibling()} if item.__name__ == "Rho1Share" else NEEDED
                found.append(item(**{name: needed[name] for name in missing if name in needed}))
    return found


METRICS = all_metrics()
SAMPLE = Sample(index=0, input_ids=np.arange(6), scored=np.arange(6) >= 3)


def test_every_metric_of_the_folder_is_public() -> None:
    assert {type(metric).__name__ for metric in METRICS} == set(distill_sampler.metrics.__all__)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_keeps_its_contract(metric: Metric) -> None:
    if metric.name == "minhash":
        pytest.importorskip("datasketch", reason="the extra 'dedup' is not installed")
    check_metric(metric)


def test_the_guard_of_rsr_touches_no_surprisal_but_zero() -> None:
    for surprisal, expected in ((0.05, 20.0), (1e-6, 1e6), (0.0, 1e12)):
        stats = TokenStats(surprisal=np.full(3, surprisal, np.float32), rank=np.ones(3, np.int64))
        found = RankSurprisalRatio().reduce(SAMPLE, [stats])
        assert found["rank_surprisal_ratio"] == pytest.approx(expected, rel=1e-5)
        group = RankSurprisalRatio().aggregate({name: np.array([value]) for name, value in found.items()})
        assert group == pytest.approx(expected, rel=1e-5)


def test_aslec_drop_keeps_the_last_token_of_a_step_whatever_it_skips() -> None:
    surprisal = np.array([5.0, 3.0, 2.0], np.float32)
    for skip, expected in ((0, -10 / 3), (1, -2.5), (2, -2.0), (3, -2.0), (9, -2.0)):
        assert AslecDrop(skip=skip).of_step(surprisal) == pytest.approx(expected)
        assert AslecDrop(skip=skip).of_step(surprisal[:1]) == -5.0


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_names_its_paper(metric: Metric) -> None:
    module = importlib.import_module(type(metric).__module__)
    assert "arXiv" in str(type(metric).__doc__) + str(module.__doc__)


def test_rsr_is_clipped_ranks_over_surprisals() -> None:
    stats = TokenStats(surprisal=np.array([0.5, 1.5, 4.0], np.float32), rank=np.array([1, 2, 101]))
    numbers = RankSurprisalRatio().reduce(SAMPLE, [stats])
    assert numbers == pytest.approx({"mean_rank": 103 / 3, "mean_surprisal": 2.0, "rank_surprisal_ratio": 103 / 6})
    unclipped = RankSurprisalRatio(rank_clip=1000, name="rsr_1000").reduce(SAMPLE, [stats])
    assert unclipped["rsr_1000"] == pytest.approx(104 / 6)
    assert "rsr_1000_mean_rank" in unclipped


def test_a_response_that_the_student_is_certain_of_has_a_finite_ratio() -> None:
    stats = TokenStats(surprisal=np.zeros(3, np.float32), rank=np.ones(3, np.int64))
    assert np.isfinite(RankSurprisalRatio().reduce(SAMPLE, [stats])["rank_surprisal_ratio"])


def test_the_group_ratio_is_a_ratio_of_sums_of_means() -> None:
    columns = {
        "mean_rank": np.array([2.0, 30.0]),
        "mean_surprisal": np.array([1.0, 2.0]),
        "rank_surprisal_ratio": np.array([2.0, 15.0]),
    }
    assert RankSurprisalRatio().aggregate(columns) == pytest.approx(32 / 3)  # not (2 + 15) / 2


def test_global_naturalness_is_the_mean_log_probability() -> None:
    stats = TokenStats(surprisal=np.array([1.0, 2.0], np.float32), rank=np.array([1, 1]))
    assert GlobalNaturalness().reduce(SAMPLE, [stats]) == {"global_naturalness": -1.5}


def test_a_clip_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rank_clip=0"):
        RankSurprisalRatio(rank_clip=0)
