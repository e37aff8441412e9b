"""Hints (FitNets, Romero et al. 2014, arXiv:1412.6550): the student's hidden states learn to match the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from distill_sampler.field_docs import documents_fields
from distill_sampler.objectives.following import FollowsTeacher, require_model, scheduled
from distill_sampler.objectives.live import Seen, Setting, Watch, chosen_layers
from distill_sampler.protocols import Objective, ObjectiveTap
from distill_sampler.reading.structure import unwrap
from distill_sampler.types import FloatArray

MODULE = "distillation_projections"
"""Name of the submodule of the student that holds the projections during training."""


@documents_fields
@dataclass(frozen=True)
class HiddenHints(Objective):
    """weight · the mean over layers of MSE(W h_student, h_teacher), added to the loss.

    The error of a position is the mean over the teacher's dimensions. It is computed at every position whose next token
    is trained on, and normalised as the trainer normalises its loss. If the two widths differ, W is a learned matrix.

    The matrices are part of the student while it is trained: they are in its optimizer and its checkpoints (for an
    adapter, beside the curriculum's state), and are restored on a resume. They are removed when training ends, so the
    saved student does not contain them.
    """

    teacher: nn.Module
    """A causal language model with the student's tokens. It is frozen, put into evaluation mode and, unless ZeRO-3 or
    FSDP2 has sharded it, moved to the student's device."""
    layers: Mapping[int, int] = field(default_factory=lambda: {-1: -1})
    """The teacher's layer for each layer of the student. Layers count from 0; -1 is the last one."""
    projection: Literal["auto", "always", "never"] = "auto"
    """Whether there is a W. `"auto"`: where the widths differ."""
    weight: float | Callable[[float], float] = 1.0
    """Weight in the loss, or a function that returns it for the progress of the run, from 0 to 1. At 0, the teacher
    does not run."""

    def __post_init__(self) -> None:
        require_model(self.teacher, what="HiddenHints")
        if not isinstance(self.layers, Mapping) or not self.layers:
            raise ValueError(
                f"HiddenHints(layers={self.layers!r}): give the student's layers with the teacher's, such as {{-1: -1}}"
            )
        if self.projection not in get_args(Literal["auto", "always", "never"]):
            raise ValueError(f"HiddenHints(projection={self.projection!r}): choose 'auto', 'always' or 'never'.")
        for progress in (0.0, 0.5, 1.0):
            scheduled(self.weight, progress, argument="HiddenHints(weight=)")

    @property
    def name(self) -> str:
        return "hidden_hints"

    def prepare(self, student: nn.Module) -> None:
        """Add the projections to the student, before its optimizer is created.

        Raises:
            ValueError: a layer does not exist, or the widths differ and `projection="never"`.
        """
        inner, teacher = unwrap(student), unwrap(self.teacher)
        layers = chosen_layers(self.layers, inner, teacher, what="HiddenHints")
        widths = [model.config.get_text_config().hidden_size for model in (inner, teacher)]
        if self.projection == "never" and widths[0] != widths[1]:
            raise ValueError(
                f"HiddenHints(projection='never'): the student's states have {widths[0]} dimensions and the teacher's "
                f"{widths[1]}. Use projection='auto', which learns a projection."
            )
        if self.projection == "never" or (self.projection == "auto" and widths[0] == widths[1]):
            return
        like = next(inner.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same matrices in every process and after a restart
            made = {
                str(layer): nn.Linear(widths[0], widths[1], bias=False).to(like.device, like.dtype) for layer in layers
            }
        inner.add_module(MODULE, nn.ModuleDict(made))

    def withdraw(self, student: nn.Module) -> None:
        """Remove the projections from the student."""
        unwrap(student)._modules.pop(MODULE, None)

    def tap(self, setting: Setting) -> ObjectiveTap:
        return _HiddenHintsTap(self, setting)


def sizes_of_projections(student: nn.Module) -> dict[str, list[int]]:
    """The widths of teacher and student in each projection, by layer. Empty if the student has none."""
    own = unwrap(student)._modules.get(MODULE)
    made: Any = {} if own is None else dict(own.named_children())
    return {layer: [linear.out_features, linear.in_features] for layer, linear in made.items()}


def require_sizes_of_projections(student: nn.Module, saved: Mapping[str, list[int]]) -> None:
    """Check that the student has the projections of a checkpoint.

    Raises:
        ValueError: it has others.
    """
    _require_same(saved, sizes_of_projections(student))


def _require_same(saved: Mapping[str, list[int]], here: Mapping[str, list[int]]) -> None:
    if saved != here:
        raise ValueError(
            f"The checkpoint has projections of HiddenHints of the shapes {saved}, but here they have {here}. Resume "
            "with the same objective="
        )


def projections_of(student: nn.Module) -> dict[str, FloatArray]:
    """Copies of the projections in float32, by layer. Empty if the student has none."""
    own = unwrap(student)._modules.get(MODULE)
    if own is None:
        return {}
    return {name: value.detach().float().cpu().numpy().copy() for name, value in own.named_parameters()}


@torch.no_grad()
def restore_projections(student: nn.Module, saved: Mapping[str, FloatArray]) -> None:
    """Set the projections to what `projections_of` returned.

    Raises:
        ValueError: the student has other projections.
    """
    own = unwrap(student)._modules.get(MODULE)
    here: dict[str, Tensor] = {} if own is None else dict(own.named_parameters())
    _require_same(*({name: list(value.shape) for name, value in each.items()} for each in (saved, here)))
    for name, value in here.items():
        value.copy_(torch.from_numpy(saved[name]))


class _HiddenHintsTap(FollowsTeacher):
    def __init__(self, objective: HiddenHints, setting: Setting) -> None:
        super().__init__(objective.name, setting, objective.teacher)
        self.objective = objective
        self._layers: dict[int, int] = {}

    def factor_at(self, progress: float) -> float:
        return scheduled(self.objective.weight, progress, argument="HiddenHints(weight=)")

    def begin(self, student: Watch) -> None:
        self._layers = chosen_layers(self.objective.layers, student.model, self.teacher.watch.model, what="HiddenHints")
        student.ask(layers=self._layers)
        self.teacher.watch.ask(layers=self._layers.values())

    def idle(self) -> Tensor | None:
        if MODULE not in self.student._modules:
            return None
        zero: Tensor = sum(parameter.sum() for parameter in self.student.get_submodule(MODULE).parameters()) * 0.0
        return zero

    def compare(self, student: Seen, shown: Seen, counted: Tensor, weights: Tensor) -> Tensor:
        total = weights.new_zeros(())
        for own, other in self._layers.items():
            states, hints = student.layers[own][counted], shown.layers[other][counted]
            if MODULE in self.student._modules:
                states = self.student.get_submodule(f"{MODULE}.{own}")(states)
            error = (states.float() - hints.float()).square().mean(1)
            total = total + (weights * error).sum() / len(self._layers)
        return total
