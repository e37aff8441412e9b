"""Soft targets (Hinton et al. 2015, arXiv:1503.02531): the student learns from a teacher's whole distributions."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from distill_sampler.engines.stored_teacher import StoredTeacher
from distill_sampler.field_docs import documents_fields
from distill_sampler.objectives.divergence import Divergence, Head, Targets, soft_target_loss
from distill_sampler.objectives.following import FollowsStudent, FollowsTeacher, require_model, scheduled
from distill_sampler.objectives.live import Seen, Setting, Watch, require_plain_head
from distill_sampler.objectives.stored import StoredTargets, Tail
from distill_sampler.protocols import Objective, ObjectiveTap
from distill_sampler.reading.head import LogitTransform
from distill_sampler.reading.observer import transform_of
from distill_sampler.reading.structure import autocast_dtype, forward_of


@documents_fields
@dataclass(frozen=True)
class SoftTargets(Objective):
    """alpha · T² · D(teacher, student) + (1 - alpha) · the trainer's own loss.

    D is computed at every token that is trained on, and normalised as the trainer normalises its loss. The logits of
    both models only exist for a chunk of positions at a time.
    """

    teacher: nn.Module | StoredTeacher | str
    """A causal language model with the student's vocabulary. It is frozen, put into evaluation mode and, unless ZeRO-3
    or FSDP2 has sharded it, moved to the student's device. Or a store that `distill-sampler teacher-logprobs --top-k`
    wrote from this data: its path, or a `StoredTeacher`. The store covers the tokens of the response, without end
    markers."""
    temperature: float = 2.0
    """T, which softens both distributions. T² keeps the size of the gradient when T changes."""
    alpha: float | Callable[[float], float] = 0.5
    """Share of the soft targets in the loss, from 0 to 1, or a function that returns it for the progress of the run,
    from 0 to 1. At 0, the teacher does not run, and training is the same as without the objective."""
    divergence: Divergence = "forward"
    """`"forward"`: KL(teacher ‖ student), which makes the student cover everything that the teacher may say.
    `"reverse"`: KL(student ‖ teacher), which makes it avoid what the teacher would not say. `"js"`: Jensen-Shannon,
    between the two."""

    tail: Tail = "renormalise"
    """What becomes of the probability that the teacher gives to tokens that are not stored. `"renormalise"`: the stored
    tokens get it, in proportion. `"bucket"`: all other tokens are one outcome, for teacher and student. This is exact,
    but only possible at the temperature of the store. Has no effect with a live teacher."""

    def __post_init__(self) -> None:
        if isinstance(self.teacher, str):
            object.__setattr__(self, "teacher", StoredTeacher(self.teacher))
        if not isinstance(self.teacher, StoredTeacher):
            require_model(self.teacher, what="SoftTargets")
        elif self.divergence == "reverse" and self.tail == "renormalise":
            raise ValueError(
                "SoftTargets(divergence='reverse', tail='renormalise'): the teacher would give tokens that are not "
                "stored no probability, and the divergence would be infinite. Use tail='bucket' at the store's "
                "temperature, or divergence='js'."
            )
        if self.tail not in get_args(Tail):
            raise ValueError(f"SoftTargets(tail={self.tail!r}): choose 'renormalise' or 'bucket'.")
        if not isinstance(self.temperature, numbers.Real) or not 0 < self.temperature < math.inf:
            raise ValueError(f"SoftTargets(temperature={self.temperature!r}): give a number above 0, such as 2.0.")
        object.__setattr__(self, "temperature", float(self.temperature))
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

    def tap(self, setting: Setting) -> ObjectiveTap:
        if isinstance(self.teacher, StoredTeacher):
            return _FromStore(self, setting, self.teacher)
        assert isinstance(self.teacher, nn.Module)
        return _FromModel(self, setting, self.teacher)


class _SoftTargetsTap(FollowsStudent):
    """What a live and a stored teacher have in common: the student's side."""

    objective: SoftTargets
    columns: int
    _transform: LogitTransform

    def factor_at(self, progress: float) -> float:
        return self.objective.share(progress)

    def joined(self, loss: Tensor, own: Tensor) -> Tensor:
        return (1 - self.factor) * loss + own

    def begin(self, student: Watch) -> None:
        require_plain_head(student.model, what="SoftTargets")
        self._transform = transform_of(student.model, purpose="SoftTargets")

    def divergence(self, states: Tensor, targets: Targets, weights: Tensor) -> Tensor:
        """Σ w T² D over positions.

        Args:
            states: `[positions, hidden]` the student's hidden states.
            targets: the teacher's predictions at these positions.
            weights: `[positions]` w, the loss weights.
        """
        head: nn.Module = self.student.get_output_embeddings()
        operands = autocast_dtype(states.device)

        def diverge(states: Tensor) -> Tensor:
            return soft_target_loss(
                states,
                Head(
                    weight=head.weight,  # type: ignore[arg-type]
                    bias=head.bias,  # type: ignore[arg-type]
                    transform=self._transform,
                    columns=self.columns,
                    operands=operands,
                ),
                targets,
                weights,
                temperature=self.objective.temperature,
                divergence=self.objective.divergence,
            )

        # through the head, whose hooks gather its weights where they are sharded
        with forward_of(head, diverge):
            value: Tensor = head(states)
        return value


class _FromModel(_SoftTargetsTap, FollowsTeacher):
    def __init__(self, objective: SoftTargets, setting: Setting, teacher: nn.Module) -> None:
        super().__init__(objective.name, setting, teacher, predicts=True)
        self.objective = objective

    def compare(self, student: Seen, shown: Seen, counted: Tensor, weights: Tensor) -> Tensor:
        targets = self.teacher.targets(
            shown.last[counted], temperature=self.objective.temperature, columns=self.columns
        )
        return self.divergence(student.last[counted], targets, weights)


class _FromStore(_SoftTargetsTap):
    def __init__(self, objective: SoftTargets, setting: Setting, store: StoredTeacher) -> None:
        super().__init__(objective.name)
        self.objective = objective
        if setting.tokenizer is None:
            raise ValueError(
                f"SoftTargets(teacher='{store.path}'): responses are found by their text, which needs the student's "
                "tokenizer. Give the trainer processing_class=, or the loop tokenizer=."
            )
        self._candidates = np.flatnonzero(setting.dataset.scorable)
        self._stored = StoredTargets(
            store,
            setting.dataset,
            setting.tokenizer,
            temperature=objective.temperature,
            tail=objective.tail,
        )

    def begin(self, student: Watch) -> None:
        super().begin(student)
        self.columns = student.model.config.get_text_config().vocab_size
        self._stored.check(self._candidates, self.columns)

    def look(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Targets]:
        assert self.batch is not None
        ids: Tensor = inputs["input_ids"]
        places, targets = self._stored.of(self.batch, ids.device)
        counted = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device)
        counted[torch.from_numpy(places).to(ids.device)] = True
        return counted.reshape(ids.shape), targets

    def sums(self) -> Mapping[str, tuple[float, float]]:
        return {**super().sums(), f"{self.name}_coverage": self._stored.coverage()}

    def compare(self, student: Seen, shown: Targets, counted: Tensor, weights: Tensor) -> Tensor:
        return self.divergence(student.last[counted], shown, weights)
