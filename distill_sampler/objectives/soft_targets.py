"""Soft targets (Hinton et al. 2015, arXiv:1503.02531): the student learns from a teacher's whole distributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from torch import Tensor, nn

from distill_sampler.field_docs import documents_fields
from distill_sampler.objectives.divergence import Divergence, Head, soft_target_loss
from distill_sampler.objectives.following import FollowsTeacher, require_model, scheduled
from distill_sampler.objectives.live import Seen, Teachers, Watch, shared_columns
from distill_sampler.protocols import Objective, ObjectiveTap
from distill_sampler.reading.forward import autocast_dtype, forward_of
from distill_sampler.reading.observer import transform_of


@documents_fields
@dataclass(frozen=True)
class SoftTargets(Objective):
    """alpha · T² · D(teacher, student) + (1 - alpha) · the trainer's own loss.

    D is computed at every token that is trained on, and normalised as the trainer normalises its loss. The logits of
    both models only exist for a chunk of positions at a time.
    """

    teacher: nn.Module
    """A causal language model with the student's vocabulary. It is frozen, put into evaluation mode and moved to the
    student's device."""
    temperature: float = 2.0
    """T, which softens both distributions. T² keeps the size of the gradient when T changes."""
    alpha: float | Callable[[float], float] = 0.5
    """Share of the soft targets in the loss, from 0 to 1, or a function that returns it for the progress of the run,
    from 0 to 1. At 0, the teacher does not run, and training is the same as without the objective."""
    divergence: Divergence = "forward"
    """`"forward"`: KL(teacher ‖ student), which makes the student cover everything that the teacher may say.
    `"reverse"`: KL(student ‖ teacher), which makes it avoid what the teacher would not say. `"js"`: Jensen-Shannon,
    between the two."""

    def __post_init__(self) -> None:
        require_model(self.teacher, what="SoftTargets")
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
        return scheduled(self.alpha, progress, argument="SoftTargets(alpha=)", highest=1)

    def tap(self, teachers: Teachers, *, num_tokens: int | None = None) -> ObjectiveTap:
        return _SoftTargetsTap(self, teachers, num_tokens=num_tokens)


class _SoftTargetsTap(FollowsTeacher):
    def __init__(self, objective: SoftTargets, teachers: Teachers, *, num_tokens: int | None) -> None:
        super().__init__(objective.name, teachers.live(objective.teacher))
        self.objective = objective
        self._num_tokens = num_tokens

    def factor_at(self, progress: float) -> float:
        return self.objective.share(progress)

    def begin(self, student: Watch) -> None:
        self._columns = shared_columns(student.model, self.teacher.watch.model, tokens=self._num_tokens)
        self._transform = transform_of(student.model, purpose="SoftTargets")

    def compare(self, student: Seen, teacher: Seen, counted: Tensor, weights: Tensor) -> Tensor:
        head: nn.Module = self.student.get_output_embeddings()
        operands = autocast_dtype(counted.device)
        targets = self.teacher.targets(
            teacher.last[counted], temperature=self.objective.temperature, columns=self._columns
        )

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
                targets,
                weights,
                temperature=self.objective.temperature,
                divergence=self.objective.divergence,
            )

        # through the head, whose hooks gather its weights where they are sharded
        with forward_of(head, diverge):
            value: Tensor = head(student.last[counted])
        return value

    def joined(self, loss: Tensor, own: Tensor) -> Tensor:
        return (1 - self.factor) * loss + own
