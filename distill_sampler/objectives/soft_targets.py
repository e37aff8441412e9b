"""Soft targets (Hinton et al. 2015, arXiv:1503.02531): the student learns from a teacher's whole distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from distill_sampler.field_docs import documents_fields
from distill_sampler.objectives.divergence import Divergence, Head, soft_target_loss
from distill_sampler.objectives.live import LiveTeacher, shared_columns
from distill_sampler.objectives.places import predicting, weights_of_positions
from distill_sampler.protocols import Objective, ObjectiveTap
from distill_sampler.reading.forward import autocast_dtype, forward_of, unwrap
from distill_sampler.reading.observer import transform_of
from distill_sampler.types import Batch


@documents_fields
@dataclass(frozen=True)
class SoftTargets(Objective):
    """alpha · T² · D(teacher, student) + (1 - alpha) · the trainer's own loss.

    D is taken at every token that is trained on, and normalised as the trainer normalises its loss. No logits of either
    model are kept: their product with the output heads is made a chunk of positions at a time.
    """

    teacher: nn.Module
    """A causal language model with the student's vocabulary. It is frozen, put into evaluation mode and moved to the
    student's device."""
    temperature: float = 2.0
    """T, which softens both distributions. T² keeps the size of the gradient when T changes."""
    alpha: float | Callable[[float], float] = 0.5
    """Share of the soft targets in the loss, from 0 to 1. A function gives it for the progress of the run, which goes
    from 0 to 1. At 0 the teacher is not read, and training is what it is without the objective."""
    divergence: Divergence = "forward"
    """`"forward"` KL(teacher ‖ student) covers all that the teacher says; `"reverse"` KL(student ‖ teacher) avoids what
    the teacher does not say; `"js"`, Jensen-Shannon, lies between."""

    def __post_init__(self) -> None:
        if isinstance(self.teacher, type) or not isinstance(self.teacher, nn.Module):
            raise ValueError(
                f"SoftTargets(teacher={self.teacher!r}): give a causal language model, such as "
                "AutoModelForCausalLM.from_pretrained(…)."
            )
        if not self.temperature > 0:
            raise ValueError(f"SoftTargets(temperature={self.temperature}): give a number above 0, such as 2.0.")
        if self.divergence not in get_args(Divergence):
            known = ", ".join(map(repr, get_args(Divergence)))
            raise ValueError(f"SoftTargets(divergence={self.divergence!r}): choose one of {known}.")
        for progress in (0.0, 0.5, 1.0):
            self.share(progress)

    @property
    def name(self) -> str:
        return "soft_targets"

    def share(self, progress: float) -> float:
        """alpha at this point of the run.

        Raises:
            ValueError: it is not between 0 and 1.
        """
        alpha = self.alpha(progress) if callable(self.alpha) else self.alpha
        if not 0 <= alpha <= 1:
            raise ValueError(f"SoftTargets(alpha=): it is {alpha} at progress {progress}. Give numbers from 0 to 1.")
        return float(alpha)

    def tap(self, *, num_tokens: int | None = None) -> ObjectiveTap:
        return _SoftTargetsTap(self, num_tokens=num_tokens)


class _SoftTargetsTap(ObjectiveTap):
    """Computes the divergence inside the student's forward pass, where a sharded output head is whole."""

    def __init__(self, objective: SoftTargets, *, num_tokens: int | None) -> None:
        self.objective = objective
        self._num_tokens = num_tokens
        self._student: Any = None
        self._batch: Batch | None = None
        self._counted: Tensor | None = None
        self._targets: Any = None
        self._alpha = 0.0
        self._value: Tensor | None = None
        self._sums = torch.zeros(2, dtype=torch.float64)
        """Sum of weighted divergences since the last report, and of weights."""

    @contextmanager
    def open(self, model: nn.Module, *, step: int) -> Iterator[None]:
        self._student = unwrap(model)
        teacher = self.objective.teacher.to(next(self._student.parameters()).device)
        self._columns = shared_columns(model, teacher, tokens=self._num_tokens)
        self._teacher = LiveTeacher(teacher, columns=self._columns)
        self._transform = transform_of(model, purpose="SoftTargets")
        handle = self._student.get_decoder().register_forward_hook(self._see)
        try:
            yield
        finally:
            handle.remove()

    def before(self, batch: Batch) -> None:
        self._batch = batch

    def after(self, batch: Batch) -> None:
        self._batch = None

    def expect(self, inputs: Mapping[str, Any], *, progress: float) -> None:
        self._value = self._counted = None
        self._alpha = self.objective.share(progress)
        if self._alpha == 0:
            return
        counted = predicting(inputs)
        states = self._teacher.states(inputs, counted)
        self._targets = self._teacher.targets(states, temperature=self.objective.temperature)
        self._counted = counted

    def added_to(self, loss: Tensor, *, scale: float | Tensor) -> Tensor:
        """The loss of the batch.

        Raises:
            ValueError: the student's decoder was not run.
        """
        if self._alpha == 0:
            return loss
        if self._value is None:
            raise ValueError(
                f"SoftTargets: this trainer's forward pass did not run the decoder of {type(self._student).__name__}, "
                "so there is nothing to compare with the teacher (torch_compile=True?). Leave objective= out."
            )
        value, self._value, self._counted, self._targets = self._value, None, None, None
        return (1 - self._alpha) * loss + self._alpha * scale * value

    def sums(self) -> Mapping[str, tuple[float, float]]:
        total, weight = self._sums.tolist()
        self._sums.zero_()
        return {self.objective.name: (total, weight)}

    def _see(self, decoder: nn.Module, args: Any, output: Any) -> None:
        counted = self._counted
        if counted is None or self._value is not None or not torch.is_grad_enabled():
            return  # evaluation, or a host's second look at the same batch
        hidden: Tensor = output[0]
        if hidden.shape[:2] != counted.shape:
            raise ValueError(
                f"SoftTargets: the student has states for {tuple(hidden.shape[:2])} positions, but the batch has "
                f"{tuple(counted.shape)} tokens (prompt tuning?). Leave objective= out for this student."
            )
        weights = torch.ones(counted.shape) if self._batch is None else weights_of_positions(self._batch)
        coefficients = weights.to(hidden.device)[counted]
        head: nn.Module = self._student.get_output_embeddings()
        operands = autocast_dtype(hidden.device)

        def diverge(states: Tensor) -> Tensor:
            return soft_target_loss(
                states,
                Head(
                    weight=head.weight,  # type: ignore[arg-type]
                    bias=head.bias,  # type: ignore[arg-type]
                    transform=self._transform,
                    columns=self._columns,
                    operands=operands,
                ),
                self._targets,
                coefficients,
                temperature=self.objective.temperature,
                divergence=self.objective.divergence,
            )

        with forward_of(head, diverge):
            self._value = head(hidden[counted])
        self._sums += torch.stack([self._value.detach().double(), coefficients.double().sum()]).cpu()
