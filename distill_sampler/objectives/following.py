"""The base of objectives that compare the student with a teacher inside the student's forward pass."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill_sampler.objectives.live import Seen, Setting, Watch
from distill_sampler.objectives.places import predicting, weights_of_positions
from distill_sampler.protocols import ObjectiveTap
from distill_sampler.reading.structure import unwrap
from distill_sampler.types import Batch
from distill_sampler.vocabulary import shared_columns


class FollowsStudent(ObjectiveTap):
    """An objective that computes a number from what the student shows at each position that counts.

    Args:
        name: the objective's name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.student: Any = None
        self.batch: Batch | None = None
        """The samples of the batch that is trained on."""
        self.factor = 0.0
        """The objective's weight in the loss of this batch. At 0, nothing is computed."""
        self._expected = False
        """Whether the next forward pass of the student is that of a training batch."""
        self._counted: Tensor | None = None
        self._shown: Any = None
        self._value: Tensor | None = None
        self._sums = torch.zeros(2, dtype=torch.float64)
        """The sum of the weighted values, and the sum of the weights, since the last report."""

    @abstractmethod
    def factor_at(self, progress: float) -> float:
        """The objective's weight in the loss at this point of the run."""

    @abstractmethod
    def begin(self, student: Watch) -> None:
        """Called when training starts: check that student and teacher fit, and request what is compared.

        Raises:
            ValueError: they do not fit.
        """

    @abstractmethod
    def look(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """`[rows, width]` True at the positions of a batch that count, and what to compare the student with there."""

    @abstractmethod
    def compare(self, student: Seen, shown: Any, counted: Tensor, weights: Tensor) -> Tensor:
        """The objective of a batch, summed over its positions: a scalar with gradients for the student.

        Called inside the student's forward pass, where sharded weights can be gathered.

        Args:
            student: the student's states and attention.
            shown: the second value that `look` returned.
            counted: `[rows, width]` True at the positions that count.
            weights: `[positions]` loss weights, where `counted` is True.
        """

    @contextmanager
    def open(self, model: nn.Module, *, step: int) -> Iterator[None]:
        self.student = unwrap(model)
        watch = Watch(model)
        self.begin(watch)
        with watch.open(self._see):
            yield

    def before(self, batch: Batch) -> None:
        self.batch = batch

    def after(self, batch: Batch) -> None:
        self.batch = None

    def expect(self, inputs: Mapping[str, Any], *, progress: float) -> None:
        self._value = self._counted = self._shown = None
        self._expected = True
        self.factor = self.factor_at(progress)
        if self.factor:
            self._counted, self._shown = self.look(inputs)

    def idle(self) -> Tensor | None:
        """Zero with the objective's own parameters in its graph, for batches in which the factor is 0. DDP waits for
        the gradient of every parameter. None: the objective has no parameters."""
        return None

    def added_to(self, loss: Tensor, *, scale: float | Tensor) -> Tensor:
        """The loss of the batch.

        Raises:
            ValueError: the trainer did not run the student's decoder.
        """
        self._expected = False
        if not self.factor:
            value, self._value = self._value, None
            return loss if value is None else loss + value
        if self._value is None:
            raise ValueError(
                f"objective={self.name}: this trainer's forward pass did not run the decoder of "
                f"{type(self.student).__name__}, so there is nothing to compare with the teacher. Leave it out."
            )
        value, self._value, self._counted, self._shown = self._value, None, None, None
        return self.joined(loss, self.factor * scale * value)

    def joined(self, loss: Tensor, own: Tensor) -> Tensor:
        """The loss with the objective's part."""
        return loss + own

    def sums(self) -> Mapping[str, tuple[float, float]]:
        total, weight = self._sums.tolist()
        self._sums.zero_()
        return {self.name: (total, weight)}

    def _see(self, seen: Seen) -> Tensor | None:
        counted = self._counted
        if not self._expected or self._value is not None or not torch.is_grad_enabled():
            return None  # evaluation, or a second forward of the same batch
        if counted is None:
            self._value = self.idle()
            return None if self._value is None else _held(seen.last, self._value)
        if seen.last.shape[:2] != counted.shape:
            raise ValueError(
                f"objective={self.name}: the student has states for {tuple(seen.last.shape[:2])} positions, but the "
                f"batch has {tuple(counted.shape)} tokens (prompt tuning?). Leave it out for this student."
            )
        weights = torch.ones(counted.shape) if self.batch is None else weights_of_positions(self.batch)
        chosen = weights.to(counted.device)[counted]
        self._value = self.compare(seen, self._shown, counted, chosen)
        self._sums += torch.stack([self._value.detach().double(), chosen.double().sum()]).cpu()
        return _held(seen.last, self._value)


class FollowsTeacher(FollowsStudent):
    """An objective that compares the student with a live teacher at each token that is trained on.

    Args:
        name: the objective's name.
        setting: what is known of the run.
        teacher: reads the same batches.
        predicts: whether its predictions are needed, and not only its states and attention.
    """

    columns: int
    """How many columns the output heads of student and teacher have in common. Known when training starts."""

    def __init__(self, name: str, setting: Setting, teacher: nn.Module, *, predicts: bool = False) -> None:
        super().__init__(name)
        self.teacher = setting.live(teacher, predicts=predicts)
        self._num_tokens = None if setting.tokenizer is None else len(setting.tokenizer)

    @contextmanager
    def open(self, model: nn.Module, *, step: int) -> Iterator[None]:
        student, teacher = unwrap(model), self.teacher.watch.model
        sizes = [each.config.get_text_config().vocab_size for each in (student, teacher)]
        self.columns = shared_columns(
            *sizes,
            tokens=self._num_tokens,
            otherwise=f"objective={self.name} (teacher=): the student predicts {sizes[0]} tokens and the teacher "
            f"{sizes[1]}, so they have different vocabularies, and the teacher cannot read the student's tokens. Use a "
            "teacher with the student's tokenizer. To choose traces with another teacher, use TeacherSentences, which "
            "compares text.",
        )
        with super().open(model, step=step):
            yield

    def look(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Seen]:
        return predicting(inputs), self.teacher.read(inputs)


class _Holding(torch.autograd.Function):
    """Returns the states unchanged, and adds the objective to their graph.

    DDP searches the graph of the model's output for unused parameters. Without this, parameters that only the objective
    uses would count as unused.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, value: Tensor) -> Tensor:
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _held(states: Tensor, value: Tensor) -> Tensor:
    held: Tensor = _Holding.apply(states, value)  # type: ignore[no-untyped-call]
    return held


def scheduled(value: Any, progress: float, *, argument: str, highest: float = math.inf) -> float:
    """A number, or a function of progress, at this point of the run.

    Raises:
        ValueError: it is no number, negative, or above `highest`.
    """
    given = value(progress) if callable(value) else value
    try:
        number = math.nan if isinstance(given, str) else float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= highest or number == math.inf:
        bounds = "of 0 or more" if highest == math.inf else f"from 0 to {highest:g}"
        raise ValueError(f"{argument}: the value at progress {progress} is {given!r}. Give numbers {bounds}.")
    return number


def require_model(teacher: Any, *, what: str) -> None:
    """Refuse a teacher that is not a model in memory.

    Raises:
        ValueError: it is not an `nn.Module`.
    """
    if not isinstance(teacher, nn.Module):
        raise ValueError(
            f"{what}(teacher={teacher!r}): give a causal language model, such as "
            "AutoModelForCausalLM.from_pretrained(…)."
        )
