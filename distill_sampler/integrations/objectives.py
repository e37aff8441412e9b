"""The objectives of a run, set up for a host; and a notice where a teacher was trained with another chat template."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import AutoTokenizer

from distill_sampler.contract import checked_objectives
from distill_sampler.dataset import ScoredDataset
from distill_sampler.objectives.live import Setting
from distill_sampler.protocols import Objective, ObjectiveTap
from distill_sampler.reading.structure import unwrap

logger = logging.getLogger(__name__)

_ENGINE = "_distill_sampler_engine"
_CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def set_up(
    objective: Objective | Sequence[Objective], dataset: ScoredDataset, tokenizer: Any
) -> tuple[tuple[Objective, ...], list[ObjectiveTap], list[nn.Module]]:
    """The objectives, the taps of their live teachers and their own, and the models of these teachers.

    Args:
        objective: one objective, or several.
        dataset: the data set that is trained on.
        tokenizer: the student's; None: unknown.

    Raises:
        ValueError: something is not an objective, or does not fit the run.
    """
    objectives = checked_objectives(objective)
    for each in objectives:
        if isinstance(teacher := getattr(each, "teacher", None), nn.Module):
            gather_in_forward(teacher)
    setting = Setting(dataset, tokenizer)
    taps = [each.tap(setting) for each in objectives]
    models = [teacher.model for teacher in setting.teachers]
    for teacher in models:
        if another_template(teacher, tokenizer):
            logger.warning(
                "The chat template of the teacher %s writes a conversation differently from the student's. The teacher "
                "reads what the student's template wrote, which it may predict badly. If it does, give the student's "
                "tokenizer the teacher's chat_template before training, or read the teacher in its own template once: "
                "distill-sampler teacher-logprobs --top-k 32, and SoftTargets('teacher.arrow').",
                _name(teacher),
            )
    return objectives, [*setting.teachers, *taps], models


def refuse_shared_weights(student: nn.Module | None, teachers: Sequence[nn.Module]) -> None:
    """Refuse live teachers that would be trained, and a student that would be frozen, because they share weights.

    Raises:
        ValueError: a teacher is the student, or has some of its weights.
    """
    trained = set() if student is None else {id(each) for each in student.parameters()}
    if any(id(each) in trained for teacher in teachers for each in teacher.parameters()):
        raise ValueError(
            "objective= (teacher=): the teacher shares weights with the student, so they would be frozen, and the "
            "teacher would change with the student. Load the teacher a second time."
        )


def gather_in_forward(teacher: nn.Module) -> None:
    """Let a teacher that ZeRO-3 has sharded gather its weights in its forward passes, as training does the student's.

    ZeRO-3 shards every model that is loaded after the `TrainingArguments`; it is DeepSpeed's engine that gathers them.
    """
    sharded = [each for each in teacher.parameters() if hasattr(each, "ds_tensor")]
    if not sharded or type(teacher).__name__ == "DeepSpeedEngine" or hasattr(teacher, _ENGINE):
        return
    import deepspeed  # type: ignore[import-untyped]

    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        config[name] = {"enabled": sharded[0].dtype == dtype}
    engine, *_ = deepspeed.initialize(model=teacher, config=config)
    object.__setattr__(teacher, _ENGINE, engine)  # not as a module of the teacher's


def another_template(teacher: nn.Module, tokenizer: Any) -> bool:
    """Whether the tokenizer in the teacher's folder writes a conversation differently from the student's tokenizer.

    False if that is not known: a teacher without a folder or a cached tokenizer, a tokenizer without a template.
    """
    name = _name(teacher)
    if not name or not getattr(tokenizer, "chat_template", None):
        return False
    try:
        own: Any = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        if not own.chat_template:
            return False
        texts = [each.apply_chat_template(_CHAT, tokenize=False) for each in (own, tokenizer)]
    except (OSError, ValueError, ImportError, TemplateError):  # it is a notice: nothing may end here
        return False
    return bool(texts[0] != texts[1])


def _name(teacher: nn.Module) -> str:
    return str(getattr(unwrap(teacher).config, "_name_or_path", "") or "")
