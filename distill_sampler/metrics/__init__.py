"""Metrics, one published metric per file: the views it needs, how it scores them, and which direction is better.

To add one, add a file here with a frozen dataclass that satisfies `distill_sampler.types.Metric`; the contract tests
find it by listing this folder.
"""

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
from distill_sampler.metrics.rank_surprisal_ratio import RankSurprisalRatio
from distill_sampler.metrics.rho1_share import Rho1Share
from distill_sampler.metrics.scas import Scas
from distill_sampler.metrics.teacher_sentences import TeacherSentences
from distill_sampler.metrics.teacher_student_gap import TeacherStudentGap

METRICS = (
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
)
"""Names of the metric classes."""

__all__ = [
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
]
