"""distill_sampler: train a student on the traces that it can learn from.

Scores the samples of an SFT run with the current student (`metrics`), and selects, orders or reweights them each
epoch (`policies`) through a torch sampler. Add it to a trainer with two lines:

    from distill_sampler import BestOf, Curriculum, RankSurprisalRatio, Shuffle, attach

    attach(trainer, Curriculum(metrics=[RankSurprisalRatio()],
                               policies=[BestOf("rank_surprisal_ratio", per="prompt_id"), Shuffle()]))

Everything is loaded when it is first used, so importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_sampler.curriculum import Curriculum
    from distill_sampler.dataset import ScoredDataset
    from distill_sampler.integrations.accelerate import CurriculumLoop
    from distill_sampler.integrations.attached import attached
    from distill_sampler.integrations.rows import score_rows
    from distill_sampler.integrations.transformers import attach, detach
    from distill_sampler.metrics.aslec_drop import AslecDrop
    from distill_sampler.metrics.aslec_parts import AslecParts
    from distill_sampler.metrics.compression_ratio import CompressionRatio
    from distill_sampler.metrics.controls import Random, ResponseLength, RuleQuality
    from distill_sampler.metrics.excess_loss import ExcessLoss
    from distill_sampler.metrics.global_naturalness import GlobalNaturalness
    from distill_sampler.metrics.instruction_following_difficulty import InstructionFollowingDifficulty
    from distill_sampler.metrics.lark import Lark
    from distill_sampler.metrics.local_naturalness import LocalNaturalness
    from distill_sampler.metrics.min_hash import MinHash
    from distill_sampler.metrics.provenance import Provenance
    from distill_sampler.metrics.rank_surprisal_ratio import RankSurprisalRatio
    from distill_sampler.metrics.rho1_share import Rho1Share
    from distill_sampler.metrics.scas import Scas
    from distill_sampler.metrics.teacher_sentences import TeacherSentences
    from distill_sampler.metrics.teacher_student_gap import TeacherStudentGap
    from distill_sampler.objectives.attention_transfer import AttentionTransfer
    from distill_sampler.objectives.hidden_hints import HiddenHints
    from distill_sampler.objectives.soft_targets import SoftTargets
    from distill_sampler.planning.rescore import Rescore
    from distill_sampler.planning.sampler import DistillSampler
    from distill_sampler.policies.best_of import BestOf
    from distill_sampler.policies.best_single_teacher import BestSingleTeacher
    from distill_sampler.policies.best_teacher import BestTeacher
    from distill_sampler.policies.competence_pacing import CompetencePacing
    from distill_sampler.policies.drop_degenerate import DropDegenerate
    from distill_sampler.policies.expressions import Column, Lexicographic, RankAverage
    from distill_sampler.policies.group_by_length import GroupByLength
    from distill_sampler.policies.interleave import Interleave
    from distill_sampler.policies.keep_by_margin import KeepByMargin
    from distill_sampler.policies.keep_correct import KeepCorrect
    from distill_sampler.policies.keep_top import KeepTop
    from distill_sampler.policies.match_teachers import MatchTeachers
    from distill_sampler.policies.mix_domains import MixDomains
    from distill_sampler.policies.mix_teachers import MixTeachers
    from distill_sampler.policies.pool_scores import AslecCasl, LarkGain
    from distill_sampler.policies.sample_by_softmax import SampleBySoftmax
    from distill_sampler.policies.shuffle import Shuffle
    from distill_sampler.policies.sort_by import SortBy
    from distill_sampler.policies.stages import Anneal, During, Stage, Stages
    from distill_sampler.policies.weight_by_column import WeightByColumn
    from distill_sampler.policies.weight_by_softmax import WeightBySoftmax
    from distill_sampler.policies.within_length import WithinLength
    from distill_sampler.protocols import Metric, Objective, Policy, Pool, Reader, Tap
    from distill_sampler.reading.model_reader import ModelReader
    from distill_sampler.reading.scorer import Scorer
    from distill_sampler.sources.unpacking import unpack
    from distill_sampler.types import Batch, EpochPlan, Sample, TokenStats, View

__version__ = "0.2.0"

_HOMES = {
    "curriculum": ("Curriculum",),
    "dataset": ("ScoredDataset",),
    "integrations.accelerate": ("CurriculumLoop",),
    "integrations.rows": ("score_rows",),
    "integrations.attached": ("attached",),
    "integrations.transformers": ("attach", "detach"),
    "metrics": (
        "AslecDrop",
        "AslecParts",
        "CompressionRatio",
        "ExcessLoss",
        "GlobalNaturalness",
        "InstructionFollowingDifficulty",
        "Lark",
        "LocalNaturalness",
        "MinHash",
        "Random",
        "RankSurprisalRatio",
        "ResponseLength",
        "Rho1Share",
        "RuleQuality",
        "Scas",
        "TeacherSentences",
        "TeacherStudentGap",
    ),
    "metrics.provenance": ("Provenance",),
    "objectives.attention_transfer": ("AttentionTransfer",),
    "objectives.hidden_hints": ("HiddenHints",),
    "objectives.soft_targets": ("SoftTargets",),
    "planning.rescore": ("Rescore",),
    "planning.sampler": ("DistillSampler",),
    "policies": (
        "Anneal",
        "AslecCasl",
        "BestOf",
        "BestSingleTeacher",
        "BestTeacher",
        "Column",
        "CompetencePacing",
        "DropDegenerate",
        "During",
        "GroupByLength",
        "Interleave",
        "KeepByMargin",
        "KeepCorrect",
        "KeepTop",
        "LarkGain",
        "Lexicographic",
        "MatchTeachers",
        "MixDomains",
        "MixTeachers",
        "RankAverage",
        "SampleBySoftmax",
        "Shuffle",
        "SortBy",
        "Stage",
        "Stages",
        "WeightByColumn",
        "WeightBySoftmax",
        "WithinLength",
    ),
    "reading.model_reader": ("ModelReader",),
    "reading.scorer": ("Scorer",),
    "protocols": ("Metric", "Objective", "Policy", "Pool", "Reader", "Tap"),
    "sources.unpacking": ("unpack",),
    "types": ("Batch", "EpochPlan", "Sample", "TokenStats", "View"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Anneal",
    "AslecCasl",
    "AslecDrop",
    "AslecParts",
    "AttentionTransfer",
    "Batch",
    "BestOf",
    "BestSingleTeacher",
    "BestTeacher",
    "Column",
    "CompetencePacing",
    "CompressionRatio",
    "Curriculum",
    "CurriculumLoop",
    "DistillSampler",
    "DropDegenerate",
    "During",
    "EpochPlan",
    "ExcessLoss",
    "GlobalNaturalness",
    "GroupByLength",
    "HiddenHints",
    "InstructionFollowingDifficulty",
    "Interleave",
    "KeepByMargin",
    "KeepCorrect",
    "KeepTop",
    "Lark",
    "LarkGain",
    "Lexicographic",
    "LocalNaturalness",
    "MatchTeachers",
    "Metric",
    "MinHash",
    "MixDomains",
    "MixTeachers",
    "ModelReader",
    "Objective",
    "Policy",
    "Pool",
    "Provenance",
    "Random",
    "RankAverage",
    "RankSurprisalRatio",
    "Reader",
    "Rescore",
    "ResponseLength",
    "Rho1Share",
    "RuleQuality",
    "Sample",
    "SampleBySoftmax",
    "Scas",
    "ScoredDataset",
    "Scorer",
    "Shuffle",
    "SoftTargets",
    "SortBy",
    "Stage",
    "Stages",
    "Tap",
    "TeacherSentences",
    "TeacherStudentGap",
    "TokenStats",
    "View",
    "WeightByColumn",
    "WeightBySoftmax",
    "WithinLength",
    "attach",
    "attached",
    "detach",
    "score_rows",
    "unpack",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'distill_sampler' has no attribute '{name}'")
    found = getattr(import_module(f"distill_sampler.{_HOME_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
