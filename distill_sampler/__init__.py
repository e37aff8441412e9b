"""distill_sampler: train a student on the traces that it can learn from.

Scores the samples of an SFT run with the current student (`metrics`), and selects, orders or reweights them each
epoch (`policies`) through a torch sampler. Add it to a trainer with two lines:

    from distill_sampler import BestOf, Curriculum, RankSurprisalRatio, Shuffle, attach

    attach(trainer, Curriculum(metrics=[RankSurprisalRatio()],
                               policies=[BestOf("rank_surprisal_ratio", per="prompt_id"), Shuffle()]))
"""

from typing import TYPE_CHECKING, Any

from distill_sampler.curriculum import Curriculum
from distill_sampler.dataset import ScoredDataset
from distill_sampler.metrics import (
    AslecDrop,
    GlobalNaturalness,
    LocalNaturalness,
    Random,
    RankSurprisalRatio,
    ResponseLength,
    RuleQuality,
)
from distill_sampler.planning.rescore import Rescore
from distill_sampler.planning.sampler import DistillSampler
from distill_sampler.policies import (
    BestOf,
    BestTeacher,
    CompetencePacing,
    GroupByLength,
    Interleave,
    KeepCorrect,
    KeepTop,
    Lexicographic,
    MixDomains,
    MixTeachers,
    RankAverage,
    SampleBySoftmax,
    Shuffle,
    SortBy,
    WeightBySoftmax,
    WithinLength,
)
from distill_sampler.reading.scorer import Scorer
from distill_sampler.types import EpochPlan

if TYPE_CHECKING:
    from distill_sampler.integrations.transformers import attach

__version__ = "0.1.0"

__all__ = [
    "AslecDrop",
    "BestOf",
    "BestTeacher",
    "CompetencePacing",
    "Curriculum",
    "DistillSampler",
    "EpochPlan",
    "GlobalNaturalness",
    "GroupByLength",
    "Interleave",
    "KeepCorrect",
    "KeepTop",
    "Lexicographic",
    "LocalNaturalness",
    "MixDomains",
    "MixTeachers",
    "Random",
    "RankAverage",
    "RankSurprisalRatio",
    "Rescore",
    "ResponseLength",
    "RuleQuality",
    "SampleBySoftmax",
    "ScoredDataset",
    "Scorer",
    "Shuffle",
    "SortBy",
    "WeightBySoftmax",
    "WithinLength",
    "attach",
]


def __getattr__(name: str) -> Any:
    """`attach` is loaded on first use: transformers takes seconds to import, and not everyone needs it."""
    if name == "attach":
        from distill_sampler.integrations.transformers import attach

        return attach
    raise AttributeError(f"module 'distill_sampler' has no attribute '{name}'")
