"""The budget for scoring: when the student scores again, and which samples.

Fresh scores cost forward passes; stale scores lead to worse choices. This file is pure arithmetic: `Rescore` says what
the user wants, and `candidates_to_score` picks the samples. `scoring.py` runs the passes.
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
from distill_sampler.types import HashArray, IntArray, is_whole


@dataclass(kw_only=True)
class Clock:
    """Time that a run has spent since its first scoring pass."""

    run: float = 0.0
    """Seconds of the run since its first scoring pass."""
    scoring: float = 0.0
    """How many of these seconds were spent on scoring."""
    tokens_per_second: float = 0.0
    """Tokens of samples scored per second in the last pass."""
    _last: float = field(default_factory=lambda: time.perf_counter(), repr=False, compare=False)

    def tick(self) -> float:
        """Add the time since the last tick to the run's time. Returns the current time."""
        now = time.perf_counter()
        self.run += now - self._last
        self._last = now
        return now

    def add_pass(self, seconds: float, tokens: int, *, first: bool) -> None:
        """Count a scoring pass that has ended.

        Args:
            seconds: how long it took.
            tokens: number of tokens in the samples that it scored; 0 if it only collected observed scores.
            first: whether it was the run's first pass, whose time does not count.
        """
        if tokens:
            self.tokens_per_second = tokens / seconds
        if first:
            self.run = 0.0
        else:
            self.scoring += seconds

    @property
    def share(self) -> float:
        """Share of the run's time so far that scoring took."""
        return self.scoring / self.run if self.run else 0.0

    def affordable_tokens(self, max_share: float) -> int:
        """How many tokens of samples can be scored now without scoring exceeding its share of the run's time."""
        seconds = (max_share * self.run - self.scoring) / max(1 - max_share, 1e-9)
        return int(max(0.0, seconds) * self.tokens_per_second)

    def state_dict(self) -> dict[str, float]:
        """The clock as plain JSON values."""
        return {"run": self.run, "scoring": self.scoring, "tokens_per_second": self.tokens_per_second}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self.run, self.scoring = state["run"], state["scoring"]
        self.tokens_per_second = state["tokens_per_second"]


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Rescore:
    """A budget for scoring. By default, every candidate is scored before every epoch.

    The first pass always scores every candidate. After that, samples that are not scored again get an estimate: their
    last score, moved by the median change of the scores that were measured again.

    Raises:
        ValueError: an argument is out of its range.
    """

    every_epochs: int | None = 1
    """Score before every n-th epoch. None: only before the first."""
    every_steps: int | None = None
    """Also score after every n-th optimizer step of an epoch, and replan the rest of the epoch."""
    fraction: float = 1.0
    """Share of the candidates to score each time."""
    choose: Literal["stalest", "uncertain", "random"] = "stalest"
    """Which candidates to score, if not all: `"stalest"`, those with the oldest scores; `"uncertain"`, those whose last
    measurement was furthest from its estimate; or `"random"`."""
    max_share: float | None = None
    """Largest share of the run's time that scoring may take, not counting the first pass. Each time, as many candidates
    are scored as fit into it. This depends on the clock, so two runs, or a run and its continuation after an
    interruption, may score different samples. A resumed epoch keeps its plan in any case."""
    lag: int = 8
    """Optimizer steps between scoring inside an epoch and the first step that the new plan changes. Data loaders read
    ahead, and what they have read cannot change any more: `attach` refuses a lag that is too short for the trainer's
    data loader. The lag is declared, not measured, so that the order does not depend on the number of workers."""

    def __post_init__(self) -> None:
        for name in ("every_epochs", "every_steps", "lag"):
            value = getattr(self, name)
            if value is not None and (not is_whole(value) or value < 1):
                raise ValueError(f"Rescore({name}={value!r}): give a positive whole number.")
        for name in ("fraction", "max_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"Rescore({name}={value}): give a share above 0 and at most 1.")
        if self.choose not in ("stalest", "uncertain", "random"):
            raise ValueError(f"Rescore(choose={self.choose!r}): choose one of 'stalest', 'uncertain', 'random'.")

    @classmethod
    def never(cls) -> Rescore:
        """Score before the first epoch, and never again."""
        return cls(every_epochs=None)

    def due(self, *, epoch: int, into_epoch: int) -> bool:
        """Whether it is time to score.

        Args:
            epoch: the epoch, from 0.
            into_epoch: optimizer steps taken in this epoch; 0 at its beginning.
        """
        every = self.every_steps if into_epoch else self.every_epochs
        return every is not None and (into_epoch or epoch) % every == 0


def candidates_to_score(
    rescore: Rescore, store: ScoreStore, candidates: IntArray, content_hash: HashArray, *, seed: int
) -> IntArray:
    """`[n]` the candidates to score, the most urgent first.

    All candidates that were never scored come first, even if they are more than the fraction.

    Args:
        rescore: the budget.
        store: the scores so far. Scores observed since the last pass count as measured.
        candidates: the samples to choose from.
        content_hash: `[samples]` breaks ties, so that the choice does not depend on the order of the rows.
        seed: seed of the random choices; a different one for each pass.
    """
    measured_at = np.maximum(store.step, store.observed.step)[candidates]
    noise = splitmix64(content_hash[candidates] ^ np.uint64(seed))
    if rescore.choose == "stalest":
        urgency = measured_at.astype(np.float64)
    elif rescore.choose == "uncertain":
        urgency = -np.nan_to_num(store.change[candidates].astype(np.float64), nan=np.inf, posinf=np.inf)
    else:
        urgency = np.zeros(len(candidates))
    order = np.lexsort((noise, urgency, measured_at >= 0))
    number = max(int(np.ceil(rescore.fraction * len(candidates))), int((measured_at < 0).sum()))
    return candidates[order[:number]]
