"""Laws of the metrics, found by listing their folder, and the formulas of their papers."""

import dataclasses
import importlib
import pkgutil

import numpy as np
import pytest

import distill_sampler.metrics
from distill_sampler import GlobalNaturalness, RankSurprisalRatio
from distill_sampler.types import Metric, Sample, TokenStats
from tests import tiny


def all_metrics() -> list[Metric]:
    found = []
    for module in pkgutil.iter_modules(distill_sampler.metrics.__path__):
        if module.name not in ("response", "steps", "windows"):
            contents = vars(importlib.import_module(f"distill_sampler.metrics.{module.name}"))
            found += [
                item(**({"tokenizer": tiny.tokenizer()} if "tokenizer" in item.__dataclass_fields__ else {}))
                for item in contents.values()
                if isinstance(item, type)
                and hasattr(item, "reduce")
                and item.__module__.endswith(module.name)
                and dataclasses.is_dataclass(item)
            ]
    return found


METRICS = all_metrics()
TEXT = np.array(tiny.tokenizer()("abc" + "First check it. Then verify. So it is.\nDone")["input_ids"])
SAMPLE = Sample(index=0, input_ids=TEXT, scored=np.arange(len(TEXT)) >= 3)


def stats_for(metric: Metric, seed: int = 0) -> list[TokenStats]:
    rng = np.random.default_rng(seed)
    return [
        TokenStats(
            surprisal=rng.exponential(size=int(view.scored.sum())).astype(np.float32),
            rank=rng.integers(1, 400, int(view.scored.sum())),
        )
        for view in metric.views(SAMPLE)
    ]


def test_every_metric_of_the_folder_is_public() -> None:
    assert {type(metric).__name__ for metric in METRICS} == set(distill_sampler.metrics.__all__)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_keeps_the_protocol(metric: Metric) -> None:
    assert isinstance(metric, Metric)
    assert type(metric).__dataclass_params__.frozen
    assert metric.name in metric.columns
    numbers = metric.reduce(SAMPLE, stats_for(metric))
    assert tuple(numbers) == metric.columns
    assert np.isfinite(list(numbers.values())).all()
    for view in metric.views(SAMPLE):
        assert view.scored.any()
        assert not view.scored[0]
    assert "arXiv" in type(metric).__doc__ or "arXiv" in importlib.import_module(type(metric).__module__).__doc__


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_group_of_equal_samples_scores_as_each_of_them(metric: Metric) -> None:
    numbers = metric.reduce(SAMPLE, stats_for(metric))
    assert metric.reduce(SAMPLE, stats_for(metric)) == numbers
    group = metric.aggregate({name: np.full(7, value) for name, value in numbers.items()})
    assert group == pytest.approx(numbers[metric.name])


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
