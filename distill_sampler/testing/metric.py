"""`check_metric`: views can be read, numbers are a function of the sample, and declarations hold."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from distill_sampler.protocols import Metric, Reader
from distill_sampler.serialize import described
from distill_sampler.testing.verdict import Verdict
from distill_sampler.types import STUDENT, Sample, TokenStats, View

STATISTICS = tuple(each.name for each in fields(TokenStats) if each.name != "cost")
ALWAYS = ("surprisal", "rank", "ties")
"""Statistics that the student always gives."""


def check_metric(
    metric: Metric,
    *,
    samples: Sequence[Sample] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> None:
    """Check a metric's contract, with random statistics for its views.

    Args:
        metric: the metric.
        samples: samples that it applies to, with the columns that it reads. By default random ones.
        columns: for each column in `uses_columns`, values that random samples may have.
        tokenizer: the tokenizer of `samples`, for a metric that reads text. By default one token for each character.
        seed: seed of everything random.

    Raises:
        AssertionError: the metric breaks the contract; the message says how, and the cure.
        ValueError: the metric reads columns, and neither `samples` nor `columns` has them.
    """
    say = Verdict(metric, Metric)
    say.require_value(metric)
    _check_declarations(metric, say)
    rng = np.random.default_rng(seed)
    if samples is None:
        samples = _samples(metric, columns or {}, rng)
    shown = [replace(sample, columns=_Listed(sample.columns, metric, say)) for sample in samples]
    copies = [replace(each, input_ids=each.input_ids.copy(), scored=each.scored.copy()) for each in shown]

    tokenizer = tokenizer or Characters()
    twin: Metric = pickle.loads(pickle.dumps(metric)).with_tokenizer(tokenizer)
    identity, metric = described(metric), metric.with_tokenizer(tokenizer)
    say.require(
        described(metric) == identity,
        "with_tokenizer changes its identity, so that a resume would refuse its own scores",
        "Leave the tokenizer out of comparisons: tokenizer: Any = field(default=None, compare=False)",
    )
    found = [_numbers(metric, sample, say, seed) for sample in shown]
    untouched = all(
        np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.scored, other.scored)
        for one, other in zip(shown, copies, strict=True)
    )
    say.require(untouched, "it changes the sample's arrays", "Copy what you change: sample.scored.copy()")
    again = [_numbers(twin, sample, say, seed) for sample in reversed(copies)][::-1]
    say.require(
        repr(found) == repr(again),
        "equal samples with equal statistics have different numbers the second time",
        "Compute views and reduce from their arguments and the fields alone, without state and without global "
        "randomness (distill_sampler.hashing.content_uniform draws a number that depends on a sample's content)",
    )
    known = [numbers for numbers in found if numbers is not None]
    say.require(
        bool(known),
        "it applies to none of the samples",
        "Give check_metric(samples=) samples that it applies to, or check when views and reduce return None",
    )
    for sample, of_sample in zip(shown, found, strict=True):
        # where the reader is certain, a guard against division by zero decides, and no mean follows from it
        if of_sample is not None and not _certain(sample):
            _check_aggregate(metric, of_sample, say)


def _check_declarations(metric: Metric, say: Verdict) -> None:
    name, columns = metric.name, metric.columns
    say.require(isinstance(name, str) and bool(name), "it has no name", "Give the field a default: name: str = 'mine'")
    say.require(
        isinstance(columns, tuple) and name in columns and len(set(columns)) == len(columns),
        f"columns is {columns!r}",
        f"Return a tuple with the name of every number that reduce gives, without repeats and with '{name}'",
    )
    better = metric.higher_is_better
    say.require(isinstance(better, bool), f"higher_is_better is {better!r}", "Return True or False")
    unknown = [name for name in metric.uses_statistics if name not in STATISTICS]
    say.require(not unknown, f"uses_statistics names {unknown}", f"Statistics are {', '.join(STATISTICS)}")
    say.require(
        isinstance(metric.uses_columns, tuple) and all(isinstance(name, str) for name in metric.uses_columns),
        f"uses_columns is {metric.uses_columns!r}",
        "Return a tuple with names of columns of the data set, such as ('difficulty',)",
    )
    for name, reader in metric.readers.items():
        say.require(
            name != STUDENT and isinstance(reader, Reader),
            f"readers has a {type(reader).__name__} under the name '{name}'",
            f"Give objects that satisfy distill_sampler.Reader; '{STUDENT}' is the model that is trained",
        )
    exact = metric.approximates
    say.require(
        exact is None or (isinstance(exact, Metric) and not set(exact.columns) & set(columns)),
        "the metric that it approximates has a column of the same name",
        "Give the exact metric another name, so that both can be scored together",
    )


def _numbers(metric: Metric, sample: Sample, say: Verdict, seed: int) -> dict[str, float] | None:
    """A metric's numbers for a sample, from random statistics that depend on the sample's index. None: it abstains."""
    abstain = "Return None for a sample that the metric does not apply to"
    with say.calling("views", abstain):
        views = metric.views(sample)
    if views is None:
        return None
    say.require(isinstance(views, Sequence), f"views returns a {type(views).__name__}", "Return a list or a tuple")
    rng = np.random.default_rng([seed, sample.index])
    stats = []
    for view in views:
        _check_view(view, metric, say)
        offered: Iterable[str] = STATISTICS
        if view.reader != STUDENT:
            offered = metric.readers[view.reader].statistics
        given = set(offered) & {*ALWAYS, *metric.uses_statistics}
        stats.append(_stats(int(view.scored.sum()), given, rng, certain=_certain(sample)))
    with say.calling("reduce", f"Statistics that uses_statistics does not list are None. {abstain}"):
        numbers = metric.reduce(sample, stats)
    if numbers is None:
        return None
    returned = list(numbers) if isinstance(numbers, Mapping) else numbers
    say.require(
        isinstance(numbers, Mapping) and set(numbers) == set(metric.columns),
        f"reduce returns {returned!r}",
        f"Return exactly {list(metric.columns)}, or None where the metric does not apply",
    )
    score = float(numbers[metric.name])
    say.require(
        bool(np.isfinite(score)),
        f"the score of a sample is {score}",
        "Return None from views or reduce where the metric does not apply, and guard against division by zero",
    )
    return {name: float(numbers[name]) for name in metric.columns}


def _check_view(view: View, metric: Metric, say: Verdict) -> None:
    say.require(isinstance(view, View), f"views holds a {type(view).__name__}", "Make distill_sampler.View objects")
    ids, scored = view.input_ids, view.scored
    arrays = isinstance(ids, np.ndarray) and isinstance(scored, np.ndarray)
    say.require(
        arrays and ids.dtype == np.int64 and scored.dtype == np.bool_ and ids.ndim == 1 and ids.shape == scored.shape,
        "a view's input_ids and scored are not arrays [length] of int64 and bool",
        "Slice the sample's arrays, or convert: np.array(tokens, np.int64), np.array(flags, bool)",
    )
    say.require(
        bool(scored.any()), "a view has no scored token", "Omit it, or return None where the metric does not apply"
    )
    say.require(
        not scored[0],
        "a view's first token is scored, but nothing predicts it",
        "Set scored[0] to False, or put a token of context before it",
    )
    say.require(
        view.reader == STUDENT or view.reader in metric.readers,
        f"a view names the reader '{view.reader}'",
        f"Its readers are {[STUDENT, *metric.readers]}; add it to the property readers",
    )


def _check_aggregate(metric: Metric, numbers: Mapping[str, float], say: Verdict) -> None:
    for size in (1, 7):
        with say.calling("aggregate", "It is given an array for each of its columns, all of them finite"):
            group = metric.aggregate({name: np.full(size, value, np.float32) for name, value in numbers.items()})
        say.require(
            bool(np.isclose(group, numbers[metric.name], rtol=1e-4, atol=1e-6)),
            f"a group of {size} equal samples has the score {group:.6g}, each of them {numbers[metric.name]:.6g}",
            "Make aggregate a mean of some kind: for a ratio, the ratio of the sums",
        )


class _Listed(dict[str, Any]):
    """The columns of a sample that the metric lists. Reading another one is a broken contract."""

    def __init__(self, columns: Mapping[str, Any], metric: Metric, say: Verdict) -> None:
        super().__init__({name: columns[name] for name in metric.uses_columns if name in columns})
        self._say = say

    def __missing__(self, name: str) -> Any:
        self._say.require(False, f"it reads the column '{name}' of a sample", "List it in uses_columns")

    def get(self, name: str, default: Any = None) -> Any:
        return self[name]


def _certain(sample: Sample) -> bool:
    """Whether this is the sample with surprisals of 0 for every token, at which a ratio would divide by zero."""
    return sample.index == 0


def _stats(tokens: int, given: set[str], rng: np.random.Generator, *, certain: bool) -> TokenStats:
    """Random statistics of `tokens` tokens; those that are not in `given` are None."""
    none = np.zeros(tokens, np.float32)
    drawn: dict[str, Any] = {
        "surprisal": none if certain else rng.exponential(size=tokens).astype(np.float32),
        "rank": np.ones(tokens, np.int64) if certain else rng.integers(1, 400, tokens),
        "ties": np.zeros(tokens, np.int64),
        "entropy": none if certain else rng.exponential(size=tokens).astype(np.float32),
        "near_first": none + 1 if certain else rng.uniform(size=tokens).astype(np.float32),
        "near_second": none + 1 if certain else rng.uniform(size=tokens).astype(np.float32),
        "top1": none + 1 if certain else rng.uniform(size=tokens).astype(np.float32),
        "top50": none + 1 if certain else rng.uniform(0.5, 1, tokens).astype(np.float32),
        "top50_sum_p2": none + 1 if certain else rng.uniform(0, 0.25, tokens).astype(np.float32),
        "sum_p2": none + 1 if certain else rng.uniform(size=tokens).astype(np.float32),
    }
    return TokenStats(**{name: values for name, values in drawn.items() if name in given or name == "surprisal"})


_WORDS = ("so", "first", "we", "check", "that", "two", "plus", "three", "is", "five", "because", "wait", "therefore")


def _samples(metric: Metric, columns: Mapping[str, Sequence[Any]], rng: np.random.Generator) -> list[Sample]:
    """Samples of a few sentences: responses of one or many tokens, in one or two turns, with and without a prompt."""
    for name in metric.uses_columns:
        if name not in columns:
            raise ValueError(
                f"{type(metric).__name__} reads the column '{name}'. Give the values that it may have: "
                f"check_metric(…, columns={{'{name}': […]}})."
            )
    samples = []
    for index in range(16):
        sentences = [" ".join(rng.choice(_WORDS, rng.integers(2, 9))).capitalize() for _ in range(1 + index % 5)]
        text = "A question? " + ". ".join(sentences) + ".\nDone."
        input_ids = Characters()(text)["input_ids"]
        scored = np.arange(len(input_ids)) >= (1 if index == 1 else 12)
        if index == 2:  # a response of one token
            scored = np.arange(len(input_ids)) == len(input_ids) - 1
        if index % 4 == 3:  # another turn of the user in the middle
            scored[14:18] = False
        values = {name: columns[name][int(rng.integers(len(columns[name])))] for name in metric.uses_columns}
        samples.append(Sample(index=index, input_ids=np.array(input_ids, np.int64), scored=scored, columns=values))
    return samples


class Characters:
    """A tokenizer with one token for each character."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids: Iterable[int], **options: Any) -> str:
        return "".join(map(chr, ids))

    def batch_decode(self, rows: Iterable[Iterable[int]], **options: Any) -> list[str]:
        return [self.decode(ids) for ids in rows]
