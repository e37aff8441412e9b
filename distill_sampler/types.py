"""The nouns of the library and its protocols. Nothing here acts.

Vocabulary, used everywhere with these meanings:

- a **sample** is one prompt with one response, a row of the prepared data set; its *index* is its row number there;
- a **group** is the set of rows that answer the same prompt; a **teacher** is who wrote a response;
- a **view** is one token sequence that a reader is shown, and which of its tokens count;
- a **reader** turns views into token statistics: the student, a frozen teacher, an engine in another process;
- a **metric** turns the statistics of a sample's views into numbers;
- a **policy** turns a plan into a plan; an **epoch plan** lists what one epoch trains on, in order, with weights;
- a **tap** follows the batches of training and knows which samples each one holds.

`Metric`, `Policy` and `Reader` are protocols with defaults: subclass one and write only what differs.
"""

from __future__ import annotations

import difflib
import hashlib
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from distill_sampler.field_docs import documents_fields

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.floating[Any]]
BoolArray = npt.NDArray[np.bool_]
HashArray = npt.NDArray[np.uint64]

STUDENT = "student"
"""The reader of a view that names no other: the model that is being trained, as it is now."""


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One row of the prepared data set, as the trainer will see it."""

    index: int
    """Row number in the prepared data set."""
    input_ids: IntArray
    """`[length]` token ids."""
    scored: BoolArray
    """`[length]` True where the token is response content: labelled, and not an end-of-turn marker. Never True at 0."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's values of the data set's columns that the metrics asked for with `uses_columns`."""


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """One token sequence that a reader is shown, and which of its tokens count."""

    input_ids: IntArray
    """`[length]` token ids, of the reader's own vocabulary."""
    scored: BoolArray
    """`[length]` True where the token's statistics are wanted. Never True at 0: nothing predicts the first token."""
    reader: str = STUDENT
    """Who reads it: `"student"`, or a name from the metric's `readers`."""
    shared: int | None = None
    """Tokens at its start that other views may begin with too, such as the prompt, so that a reader may read them once.
    None: all tokens before the one that predicts the first scored token."""

    @cached_property
    def identity(self) -> tuple[bytes, bytes]:
        """Equal for two views that one forward pass of one reader can serve."""
        return self.input_ids.tobytes(), self.scored.tobytes()

    @property
    def shareable(self) -> IntArray:
        """The tokens at its start that may be read once for several views; none of them is scored."""
        first = max(0, int(self.scored.argmax()) - 1)
        return self.input_ids[: first if self.shared is None else min(first, self.shared)]


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class TokenStats:
    """What a reader made of the scored tokens of one view, in the order of the tokens.

    A metric lists the statistics beyond surprisal and rank that it needs in `uses_statistics`; the others are None.
    """

    surprisal: FloatArray
    """`[tokens]` -log p(token | what precedes it in the view), in nats, float32."""
    rank: IntArray | FloatArray | None = None
    """`[tokens]` 1 + the number of vocabulary entries with a strictly larger logit, not clipped. With `ties="mid"` half
    of `ties` is added, and ranks are floats. None: the reader has no ranks."""
    ties: IntArray | None = None
    """`[tokens]` how many other vocabulary entries have exactly the token's logit."""
    entropy: FloatArray | None = None
    """`[tokens]` entropy of the prediction, in nats."""
    top1: FloatArray | None = None
    """`[tokens]` probability of the most likely token. (The token itself is the most likely where its rank is 1.)"""
    sum_p2: FloatArray | None = None
    """`[tokens]` sum of the squared probabilities."""
    cost: float | None = None
    """Tokens that went through the reader for this view. A prompt that several views share counts in equal parts.
    None: every token of the view."""


Read = Callable[[Sequence[View]], Sequence[TokenStats]]
"""What an open reader gives: views in, the statistics of each out, in the same order."""


def _no_progress(tokens: int) -> None:
    """Tell nobody."""


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class PassInfo:
    """What a reader is told of a pass before it begins."""

    statistics: Collection[str] = ()
    """Fields of `TokenStats` that are wanted besides `surprisal`, `rank` and `ties`."""
    tokens: int = 0
    """About how many scored tokens there will be."""
    examples: Sequence[View] = ()
    """Some views like those to come, the same ones on every process."""
    progress: Callable[[int], None] = _no_progress
    """To be called with the number of tokens of the views that have been read."""


@runtime_checkable
class Reader(Protocol):
    """Reads views and gives the statistics of their scored tokens.

    The student in this process is one (`reading.ModelReader`); a frozen teacher, a base model or an engine in another
    process are others. How it batches, retries or caches is its own business. Subclass this protocol for the defaults.
    """

    @property
    @abstractmethod
    def identity(self) -> str:
        """What the numbers depend on besides the views, as text: for a frozen reader its weights by content. Scores of
        readers with different identities are never mixed, and another one on a resume is refused."""
        ...

    @property
    def frozen(self) -> bool:
        """Whether it always gives the same numbers. What a frozen reader gave is kept and never read again."""
        return True

    @property
    def numerics(self) -> Mapping[str, str]:
        """What decides its numbers beyond rounding: dtypes, tie rule, quantization. Scores that differ in it must not
        be compared."""
        return {}

    @property
    def positions(self) -> float:
        """The longest view that it can read, in tokens."""
        return float("inf")

    @property
    def statistics(self) -> Collection[str]:
        """Which fields of `TokenStats` it can give."""
        return ("surprisal",)

    @property
    def tokenizer(self) -> Any:
        """Turns text into its tokens and back; None if it shares the student's."""
        return None

    @property
    def block_tokens(self) -> int:
        """How many tokens of views it wants at a time. All processes must say the same."""
        return 16384

    @property
    def shares_prompts(self) -> bool:
        """Whether it gains by getting the views of equal prompts together."""
        return False

    @abstractmethod
    def open(self, info: PassInfo) -> AbstractContextManager[Read]:
        """Get ready for a pass.

        With several processes, each one calls the function that it gets equally often, perhaps with no views at all.
        """
        ...


@runtime_checkable
class Metric(Protocol):
    """A score of a sample: which views it needs, how their statistics become numbers, and which way is better.

    Write a frozen dataclass that subclasses this protocol; its fields are its configuration. Only `name` and `reduce`
    have no default:

        @dataclass(frozen=True, kw_only=True)
        class MeanEntropy(Metric):
            name: str = "mean_entropy"

            @property
            def uses_statistics(self):
                return ("entropy",)

            def reduce(self, sample, stats):
                return {self.name: float(stats[0].entropy.mean())}

    `distill_sampler.testing.check_metric` tests the contract.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What users type in policies, and the column of the score."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Every number that `reduce` gives, the score among them."""
        return (self.name,)

    @property
    def higher_is_better(self) -> bool:
        return True

    @property
    def uses_columns(self) -> tuple[str, ...]:
        """Columns of the data set whose values it reads from `Sample.columns`. They belong to the score's identity:
        when they change, old scores are refused."""
        return ()

    @property
    def uses_statistics(self) -> tuple[str, ...]:
        """Fields of `TokenStats` that it needs besides `surprisal`, `rank` and `ties`."""
        return ()

    @property
    def readers(self) -> Mapping[str, Reader]:
        """Readers of its views other than the student, by the name that the views use."""
        return {}

    @property
    def approximates(self) -> Metric | None:
        """The exact metric that this one approximates, under another name; None if it is exact. The scorer reports how
        well the two agree before it uses the approximation."""
        return None

    def with_tokenizer(self, tokenizer: Any) -> Self:
        """The metric with the student's tokenizer, if it reads text and has none yet."""
        return self

    def views(self, sample: Sample) -> Sequence[View] | None:
        """The token sequences that must be read; equal views of several metrics share one forward pass. None: the
        metric does not apply to this sample."""
        return (View(input_ids=sample.input_ids, scored=sample.scored),)

    @abstractmethod
    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float] | None:
        """The sample's numbers, one for each of `columns`, from the statistics of its views, in the views' order. None:
        the metric does not apply to this sample, which is counted and reported as such."""
        ...

    def aggregate(self, columns: Mapping[str, FloatArray]) -> float:
        """The score of a *group* of samples (a teacher, say), from their columns (each `[samples]`, all finite)."""
        return float(columns[self.name].mean(dtype=float))


class Missing(IntEnum):
    """Why a sample has no score by a metric."""

    NO = 0
    """It has one."""
    NOT_APPLICABLE = 1
    """The metric says that it does not apply to this sample."""
    NON_FINITE = 2
    """The reader's logits were NaN or infinite."""
    TOO_LONG = 3
    """A view has more tokens than the reader has positions for."""
    UNREAD = 4
    """It was not scored yet."""
    NO_RESPONSE = 5
    """It has no response token to score."""

    @property
    def reason(self) -> str:
        """The end of a sentence that begins with `it has no score: `."""
        return {
            Missing.NOT_APPLICABLE: "the metric does not apply to it",
            Missing.NON_FINITE: "the logits for it are NaN or infinite",
            Missing.TOO_LONG: "it has more tokens than the model has positions for",
            Missing.UNREAD: "it was not scored",
            Missing.NO_RESPONSE: "it has no response token to score",
        }.get(self, "")


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """A categorical column of the data set, dictionary-encoded."""

    codes: IntArray
    """`[samples]` for each row the position of its value in `values`."""
    values: Sequence[Any]
    """The distinct values, in order of first appearance."""


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """Everything a policy may know about the candidates: one array for each fact, indexed by sample."""

    epoch: int
    """The epoch that is being planned, from 0."""
    metrics: Mapping[str, Metric]
    """The metrics that are scored, by name."""
    scores: Mapping[str, FloatArray]
    """Every number the metrics gave, `[samples]` each; NaN where a sample has no finite score."""
    columns: Mapping[str, Column]
    """The data set's columns that the policies asked for."""
    lengths: IntArray
    """`[samples]` tokens in the row, prompt included."""
    content_hash: HashArray
    """`[samples]` a hash of the row's tokens. It breaks ties, so that plans do not depend on the order of the rows."""
    times_trained: IntArray | None = None
    """`[samples]` how often each sample was trained on before this plan. None: never."""
    score_step: IntArray | None = None
    """`[samples]` the optimizer step at which each score was measured; -1: never. None: unknown."""
    estimated: BoolArray | None = None
    """`[samples]` True where the score is an estimate, carried on from an older measurement. None: nowhere."""
    cut: BoolArray | None = None
    """`[samples]` True where truncation cut off the response. None: nowhere."""
    step: int = 0
    """Optimizer steps taken so far."""
    num_epochs: int | None = None
    """Epochs of the whole run; None if the host does not know."""
    dry_run: bool = False
    """True while only the plan's length is wanted: the scores are then a constant in place of what is not scored yet.
    Bounds on the value of a score must let everything pass."""

    def __post_init__(self) -> None:
        num_samples = len(self.lengths)
        for name, default in (
            ("times_trained", np.zeros(num_samples, np.int64)),
            ("score_step", np.full(num_samples, -1, np.int64)),
            ("estimated", np.zeros(num_samples, bool)),
            ("cut", np.zeros(num_samples, bool)),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

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


@documents_fields
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

    Write a frozen dataclass that subclasses this protocol; its fields are its configuration, and only `__call__` has no
    default. `distill_sampler.testing.check_policy` tests the contract.
    """

    @property
    def uses_metrics(self) -> tuple[str, ...]:
        """Names of the metrics it reads from the pool."""
        return ()

    @property
    def uses_columns(self) -> tuple[str, ...]:
        """Names of the data set's columns it reads from the pool."""
        return ()

    @property
    def group_by(self) -> str | None:
        """The column whose equal values it treats as alternatives to each other, such as the responses to a prompt;
        None if it chooses among no groups. When the rest of an epoch is planned anew, a sample that was trained counts
        for its whole group."""
        return None

    @property
    def length_depends_on_scores(self) -> bool:
        """Whether the values of the scores decide how many samples it gives. The length of an epoch must then be given,
        because trainers lay it out before anything is scored."""
        return False

    def samples_to_score(self, plan: EpochPlan, pool: Pool) -> IntArray | None:
        """The samples whose scores it will read, where it does not need them all; None: all of the plan.

        Asked once, before anything is scored. Must not depend on scores, and not on the order of the data set.

        Args:
            plan: what the policies before this one make without scores.
            pool: what is known of the samples; the scores are a constant.
        """
        return None

    @abstractmethod
    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        """The new plan.

        Args:
            plan: what the policies before this one made.
            pool: what is known of the samples.
            rng: the only source of randomness, seeded from the run's seed, the epoch and the policy's position.
        """
        ...


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Which samples a batch of training holds, and where their tokens are in its `input_ids`."""

    samples: IntArray
    """`[rows]` indices of the data set. The batch was compared with their tokens."""
    weights: FloatArray
    """`[rows]` the weight of each sample in the loss."""
    starts: IntArray
    """`[rows]` position of each sample's first token in the flattened `input_ids`."""
    lengths: IntArray
    """`[rows]` tokens of each sample, without padding."""
    shape: tuple[int, ...]
    """Shape of the batch's `input_ids`."""
    place: int
    """Position of its first sample in the epoch's plan."""
    epoch: int
    """Counted from 0."""
    step: int
    """Optimizer steps taken before the one that this batch is for."""


@runtime_checkable
class Tap(Protocol):
    """Follows the batches of training: loss weights, observed scores, the sample log, a distillation loss.

    A host opens its taps when training starts, calls `before` and `after` around the forward and backward pass of each
    batch, and closes them however training ends. A batch with other tokens than planned stops the run before.
    """

    def open(self, model: Any, *, step: int) -> AbstractContextManager[Any]:
        """Training starts, or goes on, after `step` optimizer steps. The context ends with training.

        Args:
            model: the student as the host calls it.
            step: optimizer steps taken so far.
        """
        ...

    def before(self, batch: Batch) -> None:
        """The host is about to run the forward pass of this batch."""
        ...

    def after(self, batch: Batch) -> None:
        """Its backward pass is over."""
        ...


def unknown_name(what: str, name: str, known: Iterable[str], which: str) -> str:
    """The sentence for a misspelt name: what there is, and the closest to what was typed."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    listing = ", ".join(f"'{other}'" for other in known) or "none"
    return f"There is no {what} '{name}'; those {which}: {listing}.{hint}"
