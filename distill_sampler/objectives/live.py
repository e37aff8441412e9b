"""A teacher that is loaded beside the student and reads each batch that the student is trained on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill_sampler.objectives.divergence import Cells, Targets
from distill_sampler.reading.forward import unwrap
from distill_sampler.reading.observer import transform_of
from distill_sampler.reading.token_stats import linear


class LiveTeacher:
    """A frozen causal language model: what it predicts at the positions of a batch.

    Args:
        model: whole in each process.
        columns: how many columns of its output head count; see `shared_columns`.

    Raises:
        ValueError: its logits are not made from its decoder's hidden states by its output head.
    """

    def __init__(self, model: nn.Module, *, columns: int) -> None:
        self._model = model.eval().requires_grad_(False)
        self._inner = unwrap(model)
        self._decoder: nn.Module = self._inner.get_decoder()
        self._takes = set(inspect.signature(self._decoder.forward).parameters)
        self._transform = transform_of(model, purpose="SoftTargets(teacher=)")
        self._columns = columns

    @torch.no_grad()
    def states(self, inputs: Mapping[str, Any], counted: Tensor) -> Tensor:
        """`[positions, hidden]` the teacher's hidden states where `counted` is True.

        Args:
            inputs: the batch as the student gets it.
            counted: `[rows, width]`.
        """
        own = {name: value for name, value in inputs.items() if name in self._takes and name != "use_cache"}
        output = self._decoder(**own, use_cache=False)
        states: Tensor = output[0][counted]
        return states

    def targets(self, states: Tensor, *, temperature: float) -> Targets:
        """The teacher's predictions at these positions."""
        head = self._inner.get_output_embeddings()
        project = linear(head.weight, head.bias, self._transform)

        def cells(start: int, stop: int) -> Cells:
            with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
                logits = project(states[start:stop])[:, : self._columns].div_(temperature)
                return Cells(log_probs=logits.sub_(logits.logsumexp(1, keepdim=True)))

        return cells


def shared_columns(student: nn.Module, teacher: nn.Module, *, tokens: int | None = None) -> int:
    """How many columns, from the first, student and teacher have in common. Vocabularies are often padded.

    Args:
        student: the student.
        teacher: the teacher.
        tokens: how many tokens the student's tokenizer has; None: unknown.

    Raises:
        ValueError: one of the two has no column for some tokens, so they have different vocabularies.
    """
    sizes = [len(unwrap(model).get_output_embeddings().weight) for model in (student, teacher)]
    columns = min(sizes)
    if columns < (tokens or 0) or (tokens is None and max(sizes) - columns > _PADDING):
        raise ValueError(
            f"SoftTargets(teacher=): the student predicts {sizes[0]} tokens and the teacher {sizes[1]}, so they have "
            "different vocabularies and their distributions cannot be compared. Use a teacher with the student's "
            "tokenizer, or choose traces by another teacher with TeacherSentences, which compares text."
        )
    return columns


_PADDING = 1024
"""Columns by which one vocabulary may be padded beyond another, where the tokenizer is unknown."""
