"""What is particular to TRL's `SFTTrainer`: which settings hide samples, and where the responses are."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from distill_sampler.dataset import IGNORED_LABEL

logger = logging.getLogger(__name__)

RESPONSE_LABELS = "response_labels"
"""Column of our own copy of the data set: labels as they would be if only responses were trained on."""


def is_sft_trainer(trainer: object) -> bool:
    """Whether it is TRL's `SFTTrainer`, without importing TRL for those who do not use it."""
    trl = sys.modules.get("trl")
    return trl is not None and isinstance(trainer, trl.SFTTrainer)


def refuse_sft_settings(trainer: Any) -> None:
    """Refuse what would hide the identity of samples.

    Raises:
        ValueError: `packing=True`, or a vision-language data set.
    """
    if trainer.args.packing:
        raise ValueError(
            "packing=True merges several samples into one row, so they can no longer be chosen one by one. Use "
            "packing=False; padding_free=True (with max_length=None) also trains without padding and keeps the samples."
        )
    if trainer._is_vision_dataset:
        raise ValueError("Data sets with images are tokenised batch by batch, so there are no token ids to score yet.")


def with_response_labels(trainer: Any, rows: Any) -> tuple[Any, str]:
    """Where the trainer trains on prompts too: the data set with a column that labels the responses alone.

    Conversations (`messages`, or prompt and completion as messages) are rendered turn by turn with the trainer's chat
    template; a turn of the assistant is what a turn adds to the conversation before it with the generation prompt.
    Prompt and completion as strings are told apart where their tokens first differ from the prompt's own, as TRL does.

    Returns:
        The data set and the name of its label column: `"labels"` and the data set itself if there is nothing to do.
    """
    columns = rows.column_names
    completions_alone = trainer.completion_only_loss and "prompt" in columns
    has_turns = "messages" in columns or {"prompt", "completion"} <= set(columns)
    if trainer.args.assistant_only_loss or completions_alone or not has_turns:
        return rows, "labels"
    labelled = rows.map(
        _response_labels,
        fn_kwargs={"tokenizer": trainer.processing_class, "chat_template": trainer.chat_template},
        desc="Finding the responses",
    )
    lost = sum(1 for found in labelled["response_found"] if not found)
    if lost:
        logger.warning(
            "The responses of %d of %d rows could not be found in their tokens (the chat template renders turns "
            "differently on their own); all their tokens are scored, prompts too.",
            lost,
            len(rows),
        )
    return labelled, RESPONSE_LABELS


def _response_labels(row: Mapping[str, Any], tokenizer: Any, chat_template: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"chat_template": chat_template, **(row.get("chat_template_kwargs") or {})}
    if row.get("tools"):
        options["tools"] = row["tools"]
    input_ids = list(row["input_ids"])
    if isinstance(row.get("completion"), str):
        prompt = _ids(tokenizer(row["prompt"]))
        whole = _ids(tokenizer(row["prompt"] + row["completion"]))
        spans = [(_common_prefix(prompt, whole), len(whole))]
    else:
        messages = row.get("messages") or [*row["prompt"], *row["completion"]]
        first = 0 if row.get("messages") else len(row["prompt"])
        whole = _ids(tokenizer.apply_chat_template(messages, return_dict=True, **options))
        spans = []
        for turn in range(first, len(messages)):
            if messages[turn]["role"] != "assistant":
                continue
            before = tokenizer.apply_chat_template(
                messages[:turn], add_generation_prompt=True, return_dict=True, **options
            )
            until = tokenizer.apply_chat_template(messages[: turn + 1], return_dict=True, **options)
            if _ids(until) != whole[: len(_ids(until))]:
                spans = []
                break
            spans.append((_common_prefix(_ids(before), whole), len(_ids(until))))
    cut = _cut_off(whole, input_ids)
    if not spans or cut is None:
        return {RESPONSE_LABELS: list(row["labels"]), "response_found": False}
    labels = [IGNORED_LABEL] * len(input_ids)
    for start, stop in spans:
        for place in range(max(start - cut, 0), min(stop - cut, len(input_ids))):
            labels[place] = row["labels"][place]
    return {RESPONSE_LABELS: labels, "response_found": True}


def _ids(encoded: Mapping[str, Sequence[int]]) -> list[int]:
    return list(encoded["input_ids"])


def _cut_off(whole: list[int], kept: list[int]) -> int | None:
    """How many tokens truncation took from the front (`keep_start`: 0); None if `kept` is not a piece of `whole`.

    A row may end in an EOS that TRL added to the text: `whole` is then a prefix of it.
    """
    length = min(len(whole), len(kept))
    if whole[:length] == kept[:length] and len(kept) <= len(whole) + 1:
        return 0
    if kept == whole[len(whole) - length :]:
        return len(whole) - length
    return None


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return place
    return min(len(left), len(right))
