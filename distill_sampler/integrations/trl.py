"""What is specific to TRL's `SFTTrainer`: which settings hide samples, how a row becomes text, which rows it drops."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from distill_sampler.sources.templates import Markers, Written, conversation, plain_text, prompt_and_completion
from distill_sampler.types import IntArray


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
            "packing=True merges several samples into one row before training, so they can no longer be chosen one by "
            "one. Change two things: packing=False in SFTConfig, and attach(trainer, curriculum, "
            'pack_to="max_length"). Then each epoch\'s plan is packed after it was made.'
        )
    if trainer._is_vision_dataset:
        raise ValueError(
            "train_dataset has images. TRL tokenises such data sets batch by batch, so there are no token ids to score "
            "before training. Use a data set of text."
        )


def source_rows(rows: Any) -> IntArray:
    """`[rows]` the number of each row in the table that a data set is a selection of, its own number if it is none.

    `SFTTrainer` writes a table of all rows that it was given, in their order, and drops or shuffles rows by selecting.
    """
    selected = rows._indices if isinstance(rows, datasets.Dataset) else None
    return np.arange(len(rows)) if selected is None else np.asarray(selected.column(0), np.int64)


def dropped_rows(trainer: Any) -> pa.Table | None:
    """The rows that `SFTTrainer` dropped because `max_length` left nothing of them to train on; None if there are none.

    They are still in the table that its data set is a selection of. Lists, such as tokens and messages, are left out.
    """
    rows, args = trainer.train_dataset, trainer.args
    if args.max_length is None or (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return None  # it has cut nothing; whatever is selected, the user selected it
    if not isinstance(rows, datasets.Dataset) or rows.data.num_rows == len(rows):
        return None
    dropped = np.setdiff1d(np.arange(rows.data.num_rows), source_rows(rows))
    table = rows.data.table
    names = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
    return table.select(names).take(pa.array(dropped))


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
