"""`check_metric` finds each broken promise, and says which member and what to do. What keeps them passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from distill_sampler import (
    GlobalNaturalness,
    Metric,
    RankSurprisalRatio,
    Sample,
    TokenStats,
    View,
)
from distill_sampler.metrics.response import response_view
from distill_sampler.testing import check_metric


@dataclass(frozen=True, kw_only=True)
class Good(Metric):
    """A metric whose parts can be broken one at a time."""

    name: str = "good"
    of_columns: tuple[str, ...] = ("good",)
    statistics: tuple[str, ...] = ()
    data_columns: tuple[str, ...] = ()
    others: Mapping[str, Any] = field(default_factory=dict)
    exact: Metric | None = None
    higher: Any = True
    see: Callable[[Sample], Any] | None = None
    compute: Callable[[Sample, Sequence[TokenStats]], Any] | None = None
    group: Callable[[Mapping[str, Any]], float] | None = None
    memory: Any = field(default=None, compare=False)

    columns = property(lambda self: self.of_columns)  # type: ignore[assignment]
    uses_statistics = property(lambda self: self.statistics)  # type: ignore[assignment]
    uses_columns = property(lambda self: self.data_columns)  # type: ignore[assignment]
    readers = property(lambda self: self.others)  # type: ignore[assignment]
    approximates = property(lambda self: self.exact)  # type: ignore[assignment]
    higher_is_better = property(lambda self: self.higher)  # type: ignore[assignment]

    def views(self, sample: Sample) -> Any:
        return self.see(sample) if self.see else [response_view(sample)]

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Any:
        return self.compute(sample, stats) if self.compute else {self.name: float(stats[0].surprisal.mean())}

    def aggregate(self, columns: Mapping[str, Any]) -> float:
        return self.group(columns) if self.group else float(columns[self.name].mean())


def view_with(**changes: Any) -> Callable[[Sample], list[View]]:
    return Seeing(tuple(changes.items()))  # a lambda could not be pickled


@dataclass(frozen=True)
class Seeing:
    changes: tuple[tuple[str, Any], ...]

    def __call__(self, sample: Sample) -> list[View]:
        made = {name: change(sample) if callable(change) else change for name, change in self.changes}
        return [replace(response_view(sample), **made)]


def first_scored(sample: Sample) -> Any:
    return np.ones(len(sample.input_ids), bool)


def none_scored(sample: Sample) -> Any:
    return np.zeros(len(sample.input_ids), bool)


def as_int32(sample: Sample) -> Any:
    return sample.input_ids.astype(np.int32)


def generator(sample: Sample) -> Iterator[View]:
    yield response_view(sample)


def never(sample: Sample) -> None:
    return None


def flips_scored(sample: Sample) -> list[View]:
    view = response_view(sample)
    view.scored[-2] = not view.scored[-2]
    return [View(input_ids=view.input_ids, scored=np.arange(len(view.scored)) > 0)]


def another_key(sample: Sample, stats: Any) -> dict[str, float]:
    return {"godo": 1.0}


def nothing_at_all(sample: Sample, stats: Any) -> list[float]:
    return [1.0]


def nan(sample: Sample, stats: Any) -> dict[str, float]:
    return {"good": float("nan")}


def divides(sample: Sample, stats: Any) -> dict[str, float]:
    return {"good": float(np.float64(1.0) / np.float64(max(stats[0].surprisal.sum(), 0)))}


def entropy(sample: Sample, stats: Any) -> dict[str, float]:
    return {"good": float(stats[0].entropy.mean())}


def reads_column(sample: Sample, stats: Any) -> dict[str, float]:
    return {"good": float(sample.columns["difficulty"])}


def gets_column(sample: Sample, stats: Any) -> dict[str, float]:
    return {"good": float(sample.columns.get("difficulty", 0))}


def global_random(sample: Sample, stats: Any) -> dict[str, float]:
    return {"good": np.random.random()}  # noqa: NPY002  # what should not be done


CALLS: list[int] = []


def counts_calls(sample: Sample, stats: Any) -> dict[str, float]:
    CALLS.append(1)
    return {"good": float(len(CALLS))}


def raises(sample: Sample, stats: Any) -> dict[str, float]:
    raise KeyError("something")


def total(columns: Mapping[str, Any]) -> float:
    return float(columns["good"].sum())


@dataclass(frozen=True, kw_only=True)
class IdentityHasTokenizer(Good):
    tokenizer: Any = None

    def with_tokenizer(self, tokenizer: Any) -> Any:
        return replace(self, tokenizer=tokenizer)


class NoReduce:
    name = "no_reduce"


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        (RankSurprisalRatio, "is a class"),
        (NoReduce(), "has no aggregate, .*reduce.*Subclass"),
        (Good(see=lambda sample: None), "pickling it"),
        (Good(memory=object), None),
        (IdentityHasTokenizer(), "with_tokenizer.*compare=False"),
        (Good(name="other"), "columns is"),
        (Good(of_columns=("good", "good")), "columns is"),
        (Good(higher=1), "higher_is_better"),
        (Good(statistics=("perplexity",)), "uses_statistics names .*entropy"),
        (
            Good(
                data_columns=("reward"),
            ),
            "uses_columns is",
        ),
        (Good(others={"tutor": "gpt"}), "readers has a str"),
        (Good(exact=GlobalNaturalness()), None),
        (Good(exact=Good()), "approximates.*another name"),
        (Good(see=view_with(scored=first_scored)), "first token is scored"),
        (Good(see=view_with(scored=none_scored)), "no scored token"),
        (Good(see=view_with(input_ids=as_int32)), "int64 and bool"),
        (Good(see=view_with(reader="tutor")), r"reader 'tutor'.*property readers"),
        (Good(see=generator), "views returns a generator"),
        (Good(see=never), "applies to none"),
        (Good(see=flips_scored), "changes the sample's arrays"),
        (Good(compute=another_key), r"reduce returns \['godo'\].*exactly \['good'\]"),
        (Good(compute=nothing_at_all), "reduce returns"),
        (Good(compute=nan), "score of a sample is nan.*None"),
        (Good(compute=divides), "score of a sample is inf"),
        (Good(compute=entropy), "reduce raises.*uses_statistics"),
        (Good(compute=entropy, statistics=("entropy",)), None),
        (Good(compute=reads_column), "column 'difficulty'.*uses_columns"),
        (Good(compute=gets_column), "column 'difficulty'.*uses_columns"),
        (Good(compute=global_random), "second time"),
        (Good(compute=counts_calls), "second time"),
        (Good(compute=raises), "reduce raises KeyError"),
        (Good(group=total), "a group of 7 equal samples"),
        (Good(), None),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_a_metric_that_breaks_a_promise_is_told_which(metric: Any, told: str | None) -> None:
    if told is None:
        check_metric(metric)
        return
    with pytest.raises(AssertionError, match=f"^{getattr(metric, '__name__', type(metric).__name__)}: .*{told}"):
        check_metric(metric)


def test_a_metric_that_can_change_is_no_metric() -> None:
    @dataclass
    class Changing(Metric):
        name: str = "changing"  # type: ignore[misc]

        def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> dict[str, float]:
            return {self.name: 0.0}

    with pytest.raises(AssertionError, match="frozen dataclass"):
        check_metric(Changing())


def test_a_metric_that_reads_columns_is_shown_them() -> None:
    metric = Good(compute=reads_column, data_columns=("difficulty",))
    with pytest.raises(ValueError, match=r"check_metric\(…, columns=\{'difficulty'"):
        check_metric(metric)
    check_metric(metric, columns={"difficulty": [1, 2]})
    sample = Sample(index=3, input_ids=np.arange(4), scored=np.arange(4) > 1, columns={"difficulty": 4, "other": 1})
    check_metric(metric, samples=[sample])
