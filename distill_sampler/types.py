"""The nouns of the library and its two protocols. Nothing here acts.

Vocabulary, used everywhere with these meanings:

- a **sample** is one prompt with one response, a row of the prepared data set; its *index* is its row number there;
- a **group** is the set of rows that answer the same prompt, a **teacher** is who wrote a response;
- a **view** is one token sequence shown to the student, and which of its tokens count;
- a **metric** turns what the student made of a sample's views into numbers;
- a **policy** turns a plan into a plan; an **epoch plan** is what one epoch trains on, in order, with weights.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.floating[Any]]
BoolArray = npt.NDArray[np.bool_]
HashArray = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One row of the prepared data set, as the trainer will see it."""

    index: int
    """Row number in the prepared data set."""
    input_ids: IntArray
    """`[length]` token ids."""
    scored: BoolArray
    """`[length]` True where the token is response content: labelled, and not an end-of-turn marker. Never True at 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """One token sequence shown to the student, and which of its tokens count."""

    input_ids: IntArray
    """`[length]` token ids."""
    scored: BoolArray
    """`[length]` True where the token's statistics are wanted. Never True at 0: nothing predicts the first token."""

    @cached_property
    def identity(self) -> tuple[bytes, bytes]:
        """Equal for two views that one forward can serve."""
        return self.input_ids.tobytes(), self.scored.tobytes()


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenStats:
    """What the student made of the scored tokens of one view, in the order of the tokens.

    The fields that may be None are computed for the metrics that ask for them: a metric that has an attribute
    `uses_statistics`, a tuple of their names, gets them with the statistics of all of its views.
    """

    surprisal: FloatArray
    """`[tokens]` -log p(token | what precedes it in the view), in nats, float32."""
    rank: IntArray | FloatArray
    """`[tokens]` 1 + the number of vocabulary entries with a strictly larger logit. Not clipped. With `ties="mid"` of
    the scorer half of `ties` is added, and the ranks are floats."""
    ties: IntArray | None = None
    """`[tokens]` how many other vocabulary entries have exactly the token's logit."""
    entropy: FloatArray | None = None
    """`[tokens]` entropy of the prediction, in nats."""
    top1: FloatArray | None = None
    """`[tokens]` probability of the likeliest token. (The token itself is the likeliest where its rank is 1.)"""
    sum_p2: FloatArray | None = None
    """`[tokens]` sum of the squared probabilities."""


@runtime_checkable
class Metric(Protocol):
    """A published score of a sample: which views it needs, how their statistics become numbers, which way is better.

    A frozen dataclass whose fields are its configuration. `name` is what users type in policies; it is also the
    column of the score. `columns` lists every number that `reduce` returns, the score among them.

    Two attributes are optional: `uses_statistics` (see `TokenStats`), and `exact`, the metric that it approximates
    under another name, or None; the scorer then reports how well the two agree before it uses the approximation.
    """

    @property
    def name(self) -> str: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def higher_is_better(self) -> bool: ...

    def views(self, sample: Sample) -> Sequence[View]:
        """The token sequences the student must read. Equal views of several metrics share one forward."""
        ...

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        """The sample's numbers, one for each of `columns`, from the statistics of its views, in the views' order."""
        ...

    def aggregate(self, columns: Mapping[str, FloatArray]) -> float:
        """The score of a *group* of samples (a teacher, say), from their columns (each `[samples]`, all finite)."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """A categorical column of the data set, dictionary-encoded."""

    codes: IntArray
    """`[samples]` for each row the position of its value in `values`."""
    values: Sequence[Any]
    """The distinct values, in order of first appearance."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """Everything a policy may know about the candidates: one array per fact, indexed by sample."""

    epoch: int
    """The epoch that is being planned, from 0."""
    metrics: Mapping[str, Metric]
    """The metrics that are scored, by name."""
    scores: Mapping[str, FloatArray]
    """Every number the metrics gave, `[samples]` each; NaN where a sample has no (finite) score."""
    columns: Mapping[str, Column]
    """The data set's columns that the policies asked for."""
    lengths: IntArray
    """`[samples]` tokens in the row, prompt included."""
    content_hash: HashArray
    """`[samples]` a hash of the row's tokens: breaks ties, so that plans do not depend on the order of the rows."""

    dry_run: bool = False
    """True while only the length of the plan is wanted: the scores are a constant that stands in for what is not scored
    yet. Bounds on the value of a score then let everything pass."""

    def goodness(self, metric: str | Callable[[Pool], FloatArray]) -> FloatArray:
        """`[samples]` the score of `metric` (a name or an expression), turned so that higher is better; NaN: no score.

        Raises:
            ValueError: nothing by that name is scored.
        """
        if not isinstance(metric, str):
            return metric(self)
        if metric not in self.metrics:
            raise ValueError(unknown_name("metric", metric, self.metrics, "that are scored"))
        scores = self.scores[metric]
        return scores if self.metrics[metric].higher_is_better else -scores

    def column(self, name: str) -> Column:
        """The data set's column `name`.

        Raises:
            ValueError: the data set has no such column.
        """
        if name not in self.columns:
            raise ValueError(unknown_name("column", name, self.columns, "that are available"))
        return self.columns[name]


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochPlan:
    """What one epoch trains on: which samples, in which order, with which weight in the loss. Immutable."""

    indices: IntArray
    """`[length]` sample indices in training order. A repeated index is trained on repeatedly."""
    weights: FloatArray = field(default_factory=lambda: np.ones(0, np.float32))
    """`[length]` loss weights of mean 1 (never draw probabilities). Left out: all ones."""

    def __post_init__(self) -> None:
        indices = np.array(self.indices, np.int64)
        weights = np.array(self.weights, np.float32) if len(self.weights) else np.ones(len(indices), np.float32)
        assert indices.ndim == 1, "a plan is one sequence"
        assert weights.shape == indices.shape, "one weight for each index"
        assert len(weights) == 0 or abs(weights.mean(dtype=np.float64) - 1) < 1e-3, "weights have mean 1"
        for name, array in (("indices", indices), ("weights", weights)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.indices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EpochPlan):
            return NotImplemented
        return np.array_equal(self.indices, other.indices) and np.array_equal(self.weights, other.weights)

    __hash__ = None  # type: ignore[assignment]  # compared by content; use `fingerprint` as a key

    def take(self, positions: npt.NDArray[Any]) -> EpochPlan:
        """The plan that keeps these positions of this one, in this order, weights scaled back to mean 1."""
        weights = self.weights[positions]
        mean = weights.mean(dtype=np.float64) if len(weights) else 1.0
        return EpochPlan(indices=self.indices[positions], weights=weights if mean == 1.0 else weights / mean)

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits that two plans share only if they are the same."""
        digest = hashlib.blake2b(self.indices.tobytes(), digest_size=6)
        digest.update(self.weights.tobytes())
        return digest.hexdigest()


@runtime_checkable
class Policy(Protocol):
    """A plan in, a plan out: selects, orders, mixes or weights. Pure: equal arguments give equal plans on every rank.

    A frozen dataclass whose fields are its configuration. Randomness comes from `rng` alone.
    """

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        """Names of the metrics it reads from the pool."""
        ...

    @property
    def uses_columns(self) -> tuple[str, ...]:
        """Names of the data set's columns it reads from the pool."""
        ...

    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan: ...


def unknown_name(what: str, name: str, known: Iterable[str], which: str) -> str:
    """The sentence for a misspelt name: what there is, and the closest to what was typed."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    listing = ", ".join(f"'{other}'" for other in known) or "none"
    return f"There is no {what} '{name}'; those {which}: {listing}.{hint}"
