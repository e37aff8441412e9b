"""When the student scores again, and whom: fresh scores cost forwards, stale ones cost choices.

Pure arithmetic: a `Rescore` says what the user wants, `candidates_to_score` picks the samples.
The cycle that obeys them is in `curriculum.py`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.hashing import splitmix64
from distill_sampler.store import ScoreStore
from distill_sampler.types import HashArray, IntArray


@dataclass(kw_only=True)
class Clock:
    """What a run has spent so far, its first scoring pass left out."""

    run: float = 0.0
    """Seconds of the run."""
    scoring: float = 0.0
    """Seconds of them that scoring took."""
    tokens_per_second: float = 0.0
    """Tokens of samples in a second of scoring, in the last pass."""
    _last: float = field(default_factory=lambda: time.perf_counter(), repr=False, compare=False)

    def tick(self) -> float:
        """Count the time since the last tick as the run's. Gives the time of now."""
        now = time.perf_counter()
        self.run += now - self._last
        self._last = now
        return now

    def add_pass(self, seconds: float, tokens: int, *, first: bool) -> None:
        """A scoring pass is over.

        Args:
            seconds: that it took.
            tokens: of the samples that it scored; 0 if it only took in what was observed.
            first: whether it was the run's first, whose time is not counted.
        """
        if tokens:
            self.tokens_per_second = tokens / seconds
        if first:
            self.run = 0.0
        else:
            self.scoring += seconds

    @property
    def share(self) -> float:
        """Of the run's time so far that scoring took."""
        return self.scoring / self.run if self.run else 0.0

    def affordable_tokens(self, max_share: float) -> int:
        """Tokens of samples that can be scored now so that scoring stays within its share of the run's time."""
        seconds = (max_share * self.run - self.scoring) / max(1 - max_share, 1e-9)
        return int(max(0.0, seconds) * self.tokens_per_second)

    def state_dict(self) -> dict[str, float]:
        """As plain JSON values."""
        return {"run": self.run, "scoring": self.scoring, "tokens_per_second": self.tokens_per_second}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take back what `state_dict` gave."""
        self.run, self.scoring = state["run"], state["scoring"]
        self.tokens_per_second = state["tokens_per_second"]


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Rescore:
    """A budget for scores. Left as it is: every candidate at the beginning of every epoch.

    Whatever it says, the first pass scores every candidate. What is not scored again is carried on as an estimate: its
    last score, moved by the drift of those that are.

    Raises:
        ValueError: an argument is out of its range.
    """

    every_epochs: int | None = 1
    """Score at the beginning of every so many epochs. None: of the first alone."""
    every_steps: int | None = None
    """Score after every so many optimizer steps of an epoch too, and plan the rest of the epoch anew."""
    fraction: float = 1.0
    """Share of the candidates to score each time."""
    choose: Literal["stalest", "uncertain", "random"] = "stalest"
    """Which, if not all: those whose last score is oldest; those that were furthest from what was expected when they
    were last scored; or any."""
    max_share: float | None = None
    """Most that scoring may take of the run's time so far, the first pass not counted: each time as many candidates
    are scored as that pays for. It goes by the clock, so two runs, or a run and its continuation after an
    interruption, may choose others to score; the plan of an epoch that was begun is kept all the same."""
    lag: int = 8
    """Optimizer steps from a scoring inside an epoch to the first step that its plan changes. Data loaders read ahead,
    and what they have read is trained as it was planned: `attach` refuses a lag that is too short for the trainer's.
    Declared, not measured, so that the order does not depend on the number of workers."""

    def __post_init__(self) -> None:
        for name in ("every_epochs", "every_steps", "lag"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Rescore({name}={value}): give a positive whole number.")
        for name in ("fraction", "max_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"Rescore({name}={value}): give a share, larger than 0 and at most 1.")
        if self.choose not in ("stalest", "uncertain", "random"):
            raise ValueError(f"Rescore(choose={self.choose!r}): choose one of 'stalest', 'uncertain', 'random'.")

    @classmethod
    def never(cls) -> Rescore:
        """After the first pass, never again."""
        return cls(every_epochs=None)

    def due(self, *, epoch: int, into_epoch: int) -> bool:
        """Whether it is time to score.

        Args:
            epoch: from 0.
            into_epoch: optimizer steps taken in it; 0 at its beginning.
        """
        every = self.every_steps if into_epoch else self.every_epochs
        return every is not None and (into_epoch or epoch) % every == 0


def candidates_to_score(
    rescore: Rescore, store: ScoreStore, candidates: IntArray, content_hash: HashArray, *, seed: int
) -> IntArray:
    """`[n]` the candidates to score, those that need it most first.

    The never scored are always among them, before all others, however small the fraction.

    Args:
        rescore: how many, and by what.
        store: the scores so far; what training has shown since the last pass counts as scored.
        candidates: samples that may be scored.
        content_hash: `[samples]`; breaks ties, so that the choice does not depend on the order of the rows.
        seed: of what is random, another for each pass.
    """
    step = np.maximum(store.step, store.observed.step)[candidates]
    noise = splitmix64(content_hash[candidates] ^ np.uint64(seed))
    if rescore.choose == "stalest":
        urgency = step.astype(np.float64)
    elif rescore.choose == "uncertain":
        urgency = -np.nan_to_num(store.change[candidates].astype(np.float64), nan=np.inf, posinf=np.inf)
    else:
        urgency = np.zeros(len(candidates))
    order = np.lexsort((noise, urgency, step >= 0))
    wanted = max(int(np.ceil(rescore.fraction * len(candidates))), int((step < 0).sum()))
    return candidates[order[:wanted]]
