"""What is measured on held-out prompts: pure functions of the student's losses on the responses to each prompt.

The losses of correct answers by all teachers, each teacher counted equally, are the primary measure: no arm is favoured
for copying one style. Whether a correct answer is more likely than an incorrect one to the same prompt does not depend
on style alone. The loss of a human solution is a guard against a student that only learns to write like a model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distill_sampler.field_docs import documents_fields
from distill_sampler.types import FloatArray


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Answer:
    """A held-out response, read by a trained student."""

    prompt: str
    """The prompt's name."""
    teacher: str
    """Who wrote it; `HUMAN` for the human solution."""
    correct: bool | None
    """None: unknown."""
    loss: float
    """Mean surprisal of the response's tokens, in nats."""


HUMAN = "human solution"
MEASURES: Mapping[str, tuple[str, int]] = {
    "loss": ("loss of correct answers, all teachers", -1),
    "ranking": ("correct above incorrect", 1),
    "human": ("loss of a human solution", -1),
    "solved": ("solved", 1),
}
"""By name: what it is, and 1 if higher is better, else -1. The first is the primary one."""


def balanced_loss(answers: Sequence[Answer]) -> dict[str, float]:
    """For each prompt with a correct answer, its part of the teacher-balanced loss.

    The mean over prompts is the mean over teachers of each teacher's mean over prompts, although not every teacher
    answers every prompt correctly: an answer of a teacher with few correct ones weighs more. If no answer's correctness
    is known, all count.
    """
    judged = any(answer.correct is not None for answer in answers)
    of: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        if answer.teacher != HUMAN and (answer.correct or not judged):
            of[answer.prompt][answer.teacher].append(answer.loss)
    number = defaultdict[str, int](int)
    for teachers in of.values():
        for teacher in teachers:
            number[teacher] += 1
    return {
        prompt: sum(float(np.mean(losses)) * len(of) / number[teacher] for teacher, losses in teachers.items())
        / len(number)
        for prompt, teachers in of.items()
    }


def ranking(answers: Sequence[Answer]) -> dict[str, float]:
    """For each prompt with answers of both kinds, the share of pairs in which the correct one has the lower mean loss.
    Equal losses count half."""
    right, wrong = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for answer in answers:
        if answer.teacher != HUMAN and answer.correct is not None:
            (right if answer.correct else wrong)[answer.prompt].append(answer.loss)
    return {
        prompt: float(np.mean((np.subtract.outer(right[prompt], wrong[prompt]) < 0)
                              + 0.5 * (np.subtract.outer(right[prompt], wrong[prompt]) == 0)))
        for prompt in right
        if prompt in wrong
    }  # fmt: skip


def human_loss(answers: Sequence[Answer]) -> dict[str, float]:
    """For each prompt that has one, the loss of its human solution."""
    return {answer.prompt: answer.loss for answer in answers if answer.teacher == HUMAN}


def measured(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Every measure that these answers allow: by its name, a number for each prompt."""
    every = {"loss": balanced_loss(answers), "ranking": ranking(answers), "human": human_loss(answers)}
    return {name: values for name, values in every.items() if values}


def losses_by_teacher(answers: Sequence[Answer]) -> dict[str, float]:
    """Mean loss of each teacher's correct answers. Circular: it shows whom the student has copied."""
    of = defaultdict[str, list[float]](list)
    judged = any(answer.correct is not None for answer in answers)
    for answer in answers:
        if answer.teacher != HUMAN and (answer.correct or not judged):
            of[answer.teacher].append(answer.loss)
    return {teacher: float(np.mean(losses)) for teacher, losses in sorted(of.items())}


def gains(measure: str, arm: Mapping[str, float], control: Mapping[str, float]) -> FloatArray:
    """`[prompts]` how much better an arm is than a control on each prompt that both were measured on."""
    sign = MEASURES[measure][1]
    shared = [prompt for prompt in arm if prompt in control]
    return np.array([sign * (arm[prompt] - control[prompt]) for prompt in shared])
