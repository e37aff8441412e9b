"""Attention transfer (Zagoruyko and Komodakis 2016, arXiv:1612.03928): the student looks where the teacher looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from distill_sampler.field_docs import documents_fields
from distill_sampler.objectives.following import FollowsTeacher, require_model, scheduled
from distill_sampler.objectives.live import Seen, Setting, Watch, attention_of, chosen_layers, layers_of
from distill_sampler.protocols import Objective, ObjectiveTap
from distill_sampler.reading.structure import unwrap


@documents_fields
@dataclass(frozen=True)
class AttentionTransfer(Objective):
    """weight · the mean over layers of ‖Q_student / ‖Q_student‖ - Q_teacher / ‖Q_teacher‖‖², added to the loss.

    Q of a position is its attention to itself and the positions before it, averaged over the heads, so student and
    teacher may have different numbers of heads. This is the paper's equation 2, for one row of the map at a time. It is
    computed at every position whose next token is trained on, and normalised as the trainer normalises its loss.

    Both models must compute their attention maps, which fused attention does not do: load them with
    `attn_implementation="eager"`. The memory for the maps grows with the square of the length.
    """

    teacher: nn.Module
    """A causal language model with the student's tokens and eager attention. It is frozen, put into evaluation mode
    and, unless ZeRO-3 or FSDP2 has sharded it, moved to the student's device."""
    layers: Mapping[int, int] = field(default_factory=lambda: {-1: -1})
    """The teacher's layer for each layer of the student. Layers count from 0; -1 is the last one."""
    weight: float | Callable[[float], float] = 1.0
    """Weight in the loss, or a function that returns it for the progress of the run, from 0 to 1. At 0, the teacher
    does not run."""

    def __post_init__(self) -> None:
        require_model(self.teacher, what="AttentionTransfer")
        if not isinstance(self.layers, Mapping) or not self.layers:
            raise ValueError(
                f"AttentionTransfer(layers={self.layers!r}): give the student's layers with the teacher's, such as "
                "{-1: -1}."
            )
        for progress in (0.0, 0.5, 1.0):
            scheduled(self.weight, progress, argument="AttentionTransfer(weight=)")

    @property
    def name(self) -> str:
        return "attention_transfer"

    def prepare(self, student: nn.Module) -> None:
        """Check that both models compute their attention maps.

        Raises:
            ValueError: one of them has fused attention, or a layer does not exist or has no attention.
        """
        layers = chosen_layers(self.layers, student, self.teacher, what="AttentionTransfer")
        for whose, model, numbers in (
            ("student", student, layers.keys()),
            ("teacher", self.teacher, layers.values()),
        ):
            config = unwrap(model).config.get_text_config()
            if config._attn_implementation != "eager":
                raise ValueError(
                    f"AttentionTransfer: the {whose} uses '{config._attn_implementation}' attention, which never "
                    "computes the maps that are compared. Load it with attn_implementation='eager'."
                )
            for number in numbers:
                attention_of(layers_of(model)[number])

    def tap(self, setting: Setting) -> ObjectiveTap:
        return _AttentionTransferTap(self, setting)


class _AttentionTransferTap(FollowsTeacher):
    def __init__(self, objective: AttentionTransfer, setting: Setting) -> None:
        super().__init__(objective.name, setting, objective.teacher)
        self.objective = objective
        self._layers: dict[int, int] = {}

    def factor_at(self, progress: float) -> float:
        return scheduled(self.objective.weight, progress, argument="AttentionTransfer(weight=)")

    def begin(self, student: Watch) -> None:
        self._layers = chosen_layers(
            self.objective.layers, student.model, self.teacher.watch.model, what="AttentionTransfer"
        )
        student.ask(attention=self._layers)
        self.teacher.watch.ask(attention=self._layers.values())

    def compare(self, student: Seen, shown: Seen, counted: Tensor, weights: Tensor) -> Tensor:
        if not any(student.attention[own].requires_grad for own in self._layers):
            raise ValueError(
                "AttentionTransfer: the student's attention maps have no gradients, as under reentrant gradient "
                "checkpointing. Set gradient_checkpointing_kwargs={'use_reentrant': False}, or leave it out."
            )
        total = weights.new_zeros(())
        for own, other in self._layers.items():
            maps = [
                nn.functional.normalize(attention.float().mean(1)[counted], dim=1)
                for attention in (student.attention[own], shown.attention[other])
            ]
            total = total + (weights * (maps[0] - maps[1]).square().sum(1)).sum() / len(self._layers)
        return total
