"""Policies: each one turns a plan into a plan. They compose in a list, first to last.

To add one, add a file here with a frozen dataclass that satisfies `distill_sampler.types.Policy`; the contract tests
find it by listing this folder. A plan may hold several copies of a sample. Policies keep, drop or draw each copy on its
own, together with its weight.
"""

from distill_sampler.policies.best_of import BestOf
from distill_sampler.policies.best_single_teacher import BestSingleTeacher
from distill_sampler.policies.best_teacher import BestTeacher
from distill_sampler.policies.competence_pacing import CompetencePacing
from distill_sampler.policies.composition import apply_one_by_one, apply_policies
from distill_sampler.policies.drop_degenerate import DropDegenerate
from distill_sampler.policies.expressions import Column, Lexicographic, MetricExpression, RankAverage
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
from distill_sampler.policies.weight_by_softmax import WeightBySoftmax, effective_sample_size
from distill_sampler.policies.within_length import WithinLength

__all__ = [
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
    "MetricExpression",
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
    "apply_one_by_one",
    "apply_policies",
    "effective_sample_size",
]
