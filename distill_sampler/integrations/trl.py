"""What is specific to TRL's `SFTTrainer`: which settings hide samples, and how a row becomes text."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from typing import Any

from distill_sampler.sources.templates import Markers, Written, conversation, plain_text, prompt_and_completion


def is_sft_trainer(trainer: object) -> bool:
    """Whether it is a `trl.SFTTrainer`. Does not import TRL: if nothing else has, it cannot be one."""
    trl = sys.modules.get("trl")
    return trl is not None and isinstance(trainer, trl.SFTTrainer)


def refuse_sft_settings(trainer: Any) -> None:
    """Refuse settings that hide which samples a batch holds.

    Raises:
        ValueError: `packing=True`, or a vision-language data set.
    """
    if trainer.args.packing:
        raise ValueError(
            "packing=True merges several samples into one row, so they can no longer be chosen one by one. Use "
            "packing=False; padding_free=True (with max_length=None) also trains without padding and keeps the samples."
        )
    if trainer._is_vision_dataset:
        raise ValueError(
            "train_dataset has images. TRL tokenises such data sets batch by batch, so there are no token ids to score "
            "before training. Use a data set of text."
        )


def as_trl_writes(
    row: Mapping[str, Any], tokenizer: Any, chat_template: str | None, marks: Markers | None, text_column: str
) -> Written | None:
    """The text that TRL makes of a row before tokenising it; None if the row has no text."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt_and_completion(prompt, completion, marks)
    if prompt is None and row.get("messages") is None:
        text = row.get(text_column)
        return plain_text(text, marks) if isinstance(text, str) else None
    messages = [*prompt, *(completion or [])] if prompt is not None else row["messages"]
    tools = row.get("tools")
    options: dict[str, Any] = {
        "chat_template": chat_template,
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }
    return conversation(messages, len(prompt or []), tokenizer, marks, **options)


def keeps_text(columns: Collection[str], text_column: str) -> bool:
    """Whether the columns that the trainer made the tokens from are still there."""
    return {"prompt", "completion"} <= set(columns) or "messages" in columns or text_column in columns
