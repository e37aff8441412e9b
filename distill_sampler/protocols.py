"""What plugs in: readers, metrics, policies and taps. Nothing here acts.

`Metric`, `Policy` and `Reader` are protocols with defaults: subclass one and write only what differs.
`distill_sampler.testing` tests the contract of each.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.types import (
    Batch,
    BoolArray,
    EncodedColumn,
    EpochPlan,
    FloatArray,
    HashArray,
    IntArray,
    Sample,
    TokenStats,
    View,
    unknown_name,
)

Read = Callable[[Sequence[View]], Sequence[TokenStats]]
"""The function of an open reader: views in, the statistics of each out, in the same order."""


def _no_progress(tokens: int) -> None:
    """Do nothing: nobody follows the progress."""


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class PassInfo:
    """What a reader knows about a pass before it begins."""

    statistics: Collection[str] = ()
    """Fields of `TokenStats` that are wanted besides `surprisal`, `rank` and `ties`."""
    tokens: int = 0
    """About how many scored tokens there will be."""
    examples: Sequence[View] = ()
    """Some views like those to come, the same on every process."""
    progress: Callable[[int], None] = _no_progress
    """The reader calls it with the number of tokens of the views that it has just read."""


@runtime_checkable
class Reader(Protocol):
    """Reads views and gives the statistics of their scored tokens.

    The student in this process is one (`reading.ModelReader`); a frozen teacher, a base model or an engine in another
    process are others. How it batches, retries or caches is its own business. Subclass this protocol for the defaults.
    """

    @property
    @abstractmethod
    def identity(self) -> str:
        """What the numbers depend on besides the views, as text: for a frozen reader, a hash of its weights. Scores of
        readers with different identities are never mixed, and a resume with another identity is refused."""
        ...

    @property
    def frozen(self) -> bool:
        """Whether it always gives the same numbers. A frozen reader's statistics are kept, so it reads a view once."""
        return True

    @property
    def numerics(self) -> Mapping[str, str]:
        """Settings that change its numbers by more than rounding: dtypes, tie rule, quantization. Scores that differ in
        them are not compared."""
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
        """Its tokenizer; None if it shares the student's."""
        return None

    @property
    def vocabulary(self) -> int | None:
        """How many columns its output has, or how many different tokens it can read. A reader without a tokenizer that
        has another vocabulary than the student is refused. None: unknown."""
        return None

    @property
    def block_tokens(self) -> int:
        """How many tokens of views it wants at a time. Must be the same in all processes."""
        return 16384

    @property
    def shares_prompts(self) -> bool:
        """Whether it is faster if it gets views that share a prompt together."""
        return False

    @abstractmethod
    def open(self, info: PassInfo) -> AbstractContextManager[Read]:
        """Prepare a pass. The context gives the function that reads views.

        With several processes, each calls the function the same number of times, perhaps with no views at all.
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
        """The name that users type in policies, and the column of the score."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all numbers that `reduce` returns, including the score."""
        return (self.name,)

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher score is better."""
        return True

    @property
    def uses_columns(self) -> tuple[str, ...]:
        """Columns of the data set whose values it reads from `Sample.columns`. They are part of the scores' identity:
        when they change, old scores are refused."""
        return ()

    @property
    def uses_statistics(self) -> tuple[str, ...]:
        """Fields of `TokenStats` that it needs besides `surprisal`, `rank` and `ties`."""
        return ()

    @property
    def readers(self) -> Mapping[str, Reader]:
        """The readers of its views, other than the student, by the names that the views use."""
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
    columns: Mapping[str, EncodedColumn]
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

    def column(self, name: str) -> EncodedColumn:
        """The column `name` of the data set.

        Raises:
            ValueError: the data set has no such column.
        """
        if name not in self.columns:
            raise ValueError(unknown_name("column", name, self.columns, "that are available"))
        return self.columns[name]


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
    def explained_by(self) -> tuple[str, ...]:
        """Names of the metrics and columns whose values tell why it left a sample out. By default all that it reads."""
        return (*self.uses_metrics, *self.uses_columns)

    @property
    def length_depends_on_scores(self) -> bool:
        """Whether the values of the scores decide how many samples it keeps. Users must then give the length of an
        epoch, because trainers need it before anything is scored."""
        return False

    def samples_to_score(self, plan: EpochPlan, pool: Pool) -> IntArray | None:
        """The samples whose scores it will read, if not all of the plan; None: all of them.

        Called before anything is scored. The result must not depend on scores or on the order of the data set.

        Args:
            plan: the plan of the policies before this one, made without scores.
            pool: what is known of the samples; all scores are a constant.
        """
        return None

    @abstractmethod
    def __call__(self, plan: EpochPlan, pool: Pool, rng: np.random.Generator) -> EpochPlan:
        """The new plan.

        Args:
            plan: the plan of the policies before this one.
            pool: what is known of the samples.
            rng: the only source of randomness, seeded by the run's seed, the epoch and the policy's position.
        """
        ...


@runtime_checkable
class Tap(Protocol):
    """Is called for every batch of training: loss weights, observed scores, the sample log, a distillation loss.

    A host opens its taps when training starts, calls `before` and `after` around the forward and backward pass of each
    batch, and closes them when training ends, also after an error. The host checks beforehand that the batch holds the
    planned samples.
    """

    def open(self, model: Any, *, step: int) -> AbstractContextManager[Any]:
        """Called when training starts or continues. The context that it returns ends with training.

        Args:
            model: the student as the host calls it.
            step: optimizer steps taken so far.
        """
        ...

    def before(self, batch: Batch) -> None:
        """Called before the forward pass of a batch."""
        ...

    def after(self, batch: Batch) -> None:
        """Called after the backward pass of the batch."""
        ...

    def sums(self) -> Mapping[str, tuple[float, float]]:
        """What to log since the last call: by name, a sum of this process, and the weight to divide it by. Every
        process gives the same names."""
        return {}


@runtime_checkable
class ObjectiveTap(Tap, Protocol):
    """The tap of an objective: it sees each batch before the forward pass, and changes the loss after it.

    A host calls `before(batch)` and `expect(inputs)`, runs the forward pass, and calls `added_to(loss)`.
    """

    def expect(self, inputs: Mapping[str, Any], *, progress: float) -> None:
        """Called before the host computes the loss of a batch.

        Args:
            inputs: the batch as the model gets it, with labels.
            progress: which part of the run is over, from 0 to 1.
        """
        ...

    def added_to(self, loss: Any, *, scale: Any) -> Any:
        """The loss to train on, with the objective added.

        Args:
            loss: the host's own loss, a scalar tensor; other objectives may already be added.
            scale: the factor with which the host normalises a sum over the tokens of this batch: 1 / (tokens in the
                optimizer step), times the number of processes if gradients are averaged over them.
        """
        ...


@runtime_checkable
class Objective(Protocol):
    """A loss in addition to the host's own. It is the configuration from which `tap` makes an `ObjectiveTap`."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name in logs."""
        ...

    def prepare(self, student: Any) -> None:
        """The student is about to be trained: add what is learned beside it, before its optimizer is made."""

    def withdraw(self, student: Any) -> None:
        """Training is over: take away what `prepare` added."""

    @abstractmethod
    def tap(self, setting: Any) -> ObjectiveTap:
        """The objective at work in one run.

        Args:
            setting: the run's `objectives.live.Setting`: its data set, the student's tokenizer, shared teachers.
        """
        ...
