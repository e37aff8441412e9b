"""SCAS, arXiv:2605.26872: the student's cost of learning a response, from losses and activations of a forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.protocols import Metric
from distill_sampler.types import IntArray, Sample, TokenStats, View


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Scas(Metric):
    """S = (1 - λ) d_A² s_AA + λ d_A d_Q s_AQ: the student's learning cost of a response. Lower is better.

    d_A and d_Q are the mean surprisals (nats) of the answer's and the question's tokens; s_AA is the mean cosine
    between the activations of two answer tokens, and s_AQ between those of an answer and a question token, in the last
    layer's `mlp.up_proj`. S approximates the size of the answer's gradient. The authors score again with the current
    student in each round of training, as a curriculum does. Needs a forward pass of its own, because the question's
    tokens are scored too. The activations are reduced during the forward pass and not kept.

    Columns: `scas_answer_nll`, `scas_question_nll`, `scas_answer_similarity`, `scas_question_similarity` and `scas`.

    What to keep in mind: the cost falls with the answer's surprisal, so it prefers what the student already says, as
    `GlobalNaturalness` does. Special tokens belong to neither part. The words of the chat template's header belong to
    the question. The authors choose among answers that are verified to be correct (`KeepCorrect`).
    """

    question_share: float = 0.5
    """λ: the weight of the question's term; 0.5 in the authors' code."""
    name: str = "scas"
    """Its name in policies, and the beginning of the columns' names."""
    tokenizer: Any = field(default=None, repr=False, compare=False)
    """Identifies the special tokens. `attach` and the command line fill it in; in your own loop, pass it yourself."""

    def __post_init__(self) -> None:
        if not 0 <= self.question_share <= 1:
            raise ValueError(f"Scas(question_share={self.question_share}): give a share in [0, 1]; 0.5 in the paper.")

    @property
    def columns(self) -> tuple[str, ...]:
        parts = ("answer_nll", "question_nll", "answer_similarity", "question_similarity")
        return (*(f"{self.name}_{part}" for part in parts), self.name)

    @property
    def higher_is_better(self) -> bool:
        return False

    @property
    def uses_statistics(self) -> tuple[str, ...]:
        return ("near_first", "near_second")

    def with_tokenizer(self, tokenizer: Any) -> Self:
        return replace(self, tokenizer=tokenizer) if self.tokenizer is None else self

    def views(self, sample: Sample) -> Sequence[View] | None:
        parts = self._parts(sample)
        if not (parts == 1).any():
            return None
        return (View(input_ids=sample.input_ids, scored=parts >= 0, parts=parts),)

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        (tokens,) = stats
        assert tokens.near_first is not None, "requested in uses_statistics"
        assert tokens.near_second is not None, "requested in uses_statistics"
        parts = self._parts(sample)
        answer = parts[parts >= 0] == 1
        surprisal = tokens.surprisal.astype(np.float64)
        of_answer = float(surprisal[answer].mean())
        of_question = float(surprisal[~answer].mean()) if not answer.all() else 0.0
        to_answer = float(tokens.near_second[answer].mean(dtype=np.float64))
        to_question = float(tokens.near_first[answer].mean(dtype=np.float64)) if not answer.all() else 0.0
        cost = (1 - self.question_share) * of_answer**2 * to_answer
        cost += self.question_share * of_answer * of_question * to_question
        return dict(zip(self.columns, (of_answer, of_question, to_answer, to_question, cost), strict=True))

    def _parts(self, sample: Sample) -> IntArray:
        """`[length]` 0 for tokens of the question, 1 for those of the answer, -1 for the others."""
        if self.tokenizer is None:
            raise ValueError(
                "Scas leaves out special tokens, so it needs a tokenizer: pass Scas(tokenizer=…). attach does this."
            )
        special = np.isin(sample.input_ids, list(getattr(self.tokenizer, "all_special_ids", ())))
        place = np.arange(len(sample.input_ids))
        before = (place > 0) & (place < place[sample.scored][-1]) & ~sample.scored
        parts = np.where(sample.scored, 1, np.where(before, 0, -1))
        parts[special] = -1
        return parts
