"""The nouns of the library. Nothing here acts; the protocols are in `protocols.py`.

Vocabulary, used everywhere with these meanings:

- a **sample** is one prompt with one response, a row of the prepared data set; its *index* is its row number there;
- a **group** is the set of rows that answer the same prompt; a **teacher** is the model that wrote a response;
- a **view** is one token sequence that a reader reads, and which of its tokens count;
- a **reader** turns views into token statistics: the student, a frozen teacher, an engine in another process;
- a **metric** turns the statistics of a sample's views into numbers;
- a **policy** turns a plan into a plan; an **epoch plan** lists what one epoch trains on, in order, with weights;
- a **tap** is called for every batch of training, and knows which samples it holds.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from numbers import Integral
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from distill_sampler.field_docs import documents_fields
from distill_sampler.showing import html_table

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.floating[Any]]
BoolArray = npt.NDArray[np.bool_]
HashArray = npt.NDArray[np.uint64]

STUDENT = "student"
"""The default reader of a view: the model that is being trained, in its current state."""


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One row of the prepared data set, as the trainer will see it."""

    index: int
    """Row number in the prepared data set."""
    input_ids: IntArray
    """`[length]` token ids."""
    scored: BoolArray
    """`[length]` True where the token is response content: labelled, and not an end-of-turn marker. False at 0."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's values in the columns that metrics list in `uses_columns`."""


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """One token sequence that a reader reads, and which of its tokens count."""

    input_ids: IntArray
    """`[length]` token ids of the reader's own vocabulary."""
    scored: BoolArray
    """`[length]` True where the token's statistics are wanted. False at 0, because nothing predicts the first token."""
    reader: str = STUDENT
    """Which reader reads it: `"student"`, or a name in the metric's `readers`."""
    shared: int | None = None
    """How many tokens at its start other views may share, such as the prompt, so that a reader may read them once.
    None: all tokens before the one that predicts the first scored token."""

    parts: IntArray | None = None
    """`[length]` which of two parts of the view a token belongs to, 0 or 1, for the statistics `near_first` and
    `near_second`; -1: to neither. Only scored tokens belong to one. None: there are no parts."""

    @cached_property
    def identity(self) -> tuple[bytes, bytes]:
        """Equal for views with the same tokens and the same scored tokens, which a reader needs to read only once."""
        return self.input_ids.tobytes(), self.scored.tobytes() + (b"" if self.parts is None else self.parts.tobytes())

    @property
    def shareable(self) -> IntArray:
        """The tokens at its start that a reader may read once for several views. None of them is scored."""
        first = max(0, int(self.scored.argmax()) - 1)
        return self.input_ids[: first if self.shared is None else min(first, self.shared)]


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class TokenStats:
    """A reader's statistics of the scored tokens of one view, in the order of the tokens.

    A metric lists the statistics beyond surprisal and rank that it needs in `uses_statistics`; the others are None.
    """

    surprisal: FloatArray
    """`[tokens]` -log p(token | preceding tokens of the view), in nats, float32."""
    rank: IntArray | FloatArray | None = None
    """`[tokens]` 1 + the number of vocabulary entries with a strictly larger logit, not clipped. With `ties="mid"` half
    of `ties` is added, and ranks are floats. None: the reader has no ranks."""
    ties: IntArray | None = None
    """`[tokens]` the number of other vocabulary entries with exactly the token's logit."""
    entropy: FloatArray | None = None
    """`[tokens]` entropy of the prediction, in nats."""
    top1: FloatArray | None = None
    """`[tokens]` probability of the most likely token (the token itself where its rank is 1)."""
    top50: FloatArray | None = None
    """`[tokens]` sum of the probabilities of the 50 most likely tokens."""
    top50_sum_p2: FloatArray | None = None
    """`[tokens]` sum of the squared probabilities of the 50 most likely tokens."""
    sum_p2: FloatArray | None = None
    """`[tokens]` sum of the squared probabilities."""
    near_first: FloatArray | None = None
    """`[tokens]` mean cosine between the token's activation in the last layer's `mlp.up_proj` and those of the view's
    first part; 0 if that has no token. Only for views with `parts`."""
    near_second: FloatArray | None = None
    """`[tokens]` the same for the view's second part."""
    top_ids: IntArray | None = None
    """`[tokens, k]` the likeliest tokens, the likeliest first, from a reader that was asked for its `top_k`."""
    top_logprobs: FloatArray | None = None
    """`[tokens, k]` their log-probabilities, in nats."""
    cost: float | None = None
    """How many tokens the reader processed for this view. A prompt that several views share counts in equal parts.
    None: every token of the view."""


class Missing(IntEnum):
    """Why a sample has no score by a metric."""

    NO = 0
    """It has a score."""
    NOT_APPLICABLE = 1
    """The metric does not apply to this sample."""
    NON_FINITE = 2
    """The reader's logits were NaN or infinite."""
    TOO_LONG = 3
    """A view has more tokens than the reader has positions for."""
    UNREAD = 4
    """It has not been scored yet."""
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
class EncodedColumn:
    """A column of the data set, dictionary-encoded. (`policies.Column` is what users type to name a numeric one.)"""

    codes: IntArray
    """`[samples]` the position of each sample's value in `values`."""
    values: Sequence[Any]
    """The distinct values, in order of first appearance."""


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class EpochPlan:
    """What one epoch trains on: which samples, in which order, with which weight in the loss. Immutable."""

    indices: IntArray
    """`[length]` sample indices in training order. A repeated index is trained on repeatedly."""
    weights: FloatArray = field(default_factory=lambda: np.ones(0, np.float32))
    """`[length]` loss weights of mean 1 (not probabilities of being drawn). By default all ones."""
    packs: IntArray | None = None
    """`[packs + 1]` the place at which each pack begins, and the end. The samples of a pack are trained in one row, end
    to end. None: every sample has a row of its own."""

    def __post_init__(self) -> None:
        indices = np.array(self.indices, np.int64)
        weights = np.array(self.weights, np.float32) if len(self.weights) else np.ones(len(indices), np.float32)
        assert indices.ndim == 1, "a plan is one sequence"
        assert weights.shape == indices.shape, "one weight for each index"
        assert len(weights) == 0 or abs(weights.mean(dtype=np.float64) - 1) < 1e-3, "weights have mean 1"
        arrays: dict[str, npt.NDArray[Any]] = {"indices": indices, "weights": weights}
        if self.packs is not None:
            arrays["packs"] = packs = np.array(self.packs, np.int64)
            assert (packs[0], packs[-1]) == (0, len(indices)), "packs share out the plan"
            assert (np.diff(packs) > 0).all(), "no pack is empty"
        for name, array in arrays.items():
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        packs = "" if self.packs is None else f" in {self.num_rows:,} packs"
        weights = ", weighted" if bool((self.weights != 1).any()) else ""
        distinct = len(np.unique(self.indices))
        return f"EpochPlan({len(self):,} samples{packs}, {distinct:,} distinct{weights}, {self.fingerprint})"

    def _repr_html_(self) -> str:
        """The first samples, for a notebook."""
        rows = list(zip(range(10), self.indices[:10].tolist(), self.weights[:10].tolist(), strict=False))
        more = f"and {len(self) - 10:,} more" if len(self) > 10 else ""
        return html_table(repr(self), ("position", "sample", "weight"), rows, note=more)

    @property
    def num_rows(self) -> int:
        """Rows that the trainer gets: packs, or without packs, samples."""
        return len(self) if self.packs is None else len(self.packs) - 1

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What it was made of, by the names of the fields."""
        packs = {} if self.packs is None else {"packs": self.packs}
        return {"indices": self.indices, "weights": self.weights, **packs}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EpochPlan):
            return NotImplemented
        own, others = self.arrays(), other.arrays()
        return own.keys() == others.keys() and all(np.array_equal(own[name], others[name]) for name in own)

    __hash__ = None  # type: ignore[assignment]  # compared by content; use `fingerprint` as a key

    def take(self, positions: npt.NDArray[Any]) -> EpochPlan:
        """The plan with only these positions of this one, in this order. Weights are rescaled to mean 1. No packs."""
        weights = self.weights[positions]
        mean = weights.mean(dtype=np.float64) if len(weights) else 1.0
        return EpochPlan(indices=self.indices[positions], weights=weights if mean == 1.0 else weights / mean)

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits that two plans share only if they are the same."""
        digest = hashlib.blake2b(self.indices.tobytes(), digest_size=6)
        digest.update(self.weights.tobytes())
        if self.packs is not None:
            digest.update(self.packs.tobytes())
        return digest.hexdigest()


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Which samples a batch of training holds, and where their tokens are in its `input_ids`."""

    samples: IntArray
    """`[rows]` indices of the samples. Their tokens were compared with the batch's."""
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
    """Number of optimizer steps before the one that this batch belongs to."""


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether something is a whole number, of Python or numpy. True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def unknown_name(what: str, name: str, known: Iterable[str], which: str) -> str:
    """The message for an unknown name, with the known names and the closest of them.

    Args:
        what: the kind of thing: `"metric"`.
        name: the unknown name.
        known: the known names.
        which: completes "those …": `"that are scored"`.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    listing = ", ".join(f"'{other}'" for other in known) or "none"
    return f"There is no {what} '{name}'; those {which}: {listing}.{hint}"
