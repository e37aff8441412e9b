"""Finds which tokens of a trainer's prepared rows are the response, and adds them as a second column of labels."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence, Sized
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch.utils.data
from transformers import ProcessorMixin

from distill_sampler.dataset import IGNORED_LABEL
from distill_sampler.integrations.trl import as_trl_writes, is_sft_trainer, keeps_text
from distill_sampler.integrations.versions import training_template
from distill_sampler.sources.templates import (
    Markers,
    Written,
    cut_off,
    markers,
    responses_of,
    tokenised,
    written_in,
)
from distill_sampler.truncation import UNKNOWN, response_tokens_cut
from distill_sampler.types import IntArray

logger = logging.getLogger(__name__)

RESPONSE_LABELS = "response_labels"
"""The added column: the labels with everything but the responses masked."""

_FOUND = "response_found"
_LOST_TURNS = "response_turns_lost"
_TOKENS_CUT = "response_tokens_cut"


def with_response_labels(
    trainer: Any,
    rows: Any,
    labels: str | None,
    *,
    score_whole_text: bool = False,
    end_token_ids: Collection[int] = (),
) -> tuple[Any, str | None, IntArray | None]:
    """The data set with a column that labels only those trained tokens that belong to a response.

    With `SFTTrainer`, the columns that a row was made from are still there, and are read as TRL reads them: `prompt`
    and `completion`, else `messages`, else the text. `sources.templates` finds the response in them. Where these
    columns do not reproduce a row's tokens, and with a plain `Trainer`, only the tokens can be used: if the labels mask
    some of them, the labelled ones are the response; if every token is labelled, the response is found between the chat
    template's markers.

    Args:
        trainer: its tokenizer is `processing_class`.
        rows: the prepared data set.
        labels: its column of labels; None: every token is trained on.
        score_whole_text: label all of a row in which no response can be found.
        end_token_ids: the end-of-turn markers, which end a response that truncation did not cut.

    Returns:
        The data set and the name of its label column; both unchanged if the labels are the responses already. Then
        `[rows]` how many tokens of each response truncation has cut off, `truncation.UNKNOWN` where the text of a row
        is not there; None if no text was read.

    Raises:
        ValueError: nothing shows which tokens of a row are the response.
    """
    if not isinstance(rows, Sized) or not len(rows) or not {"input_ids", labels or "input_ids"} <= set(_columns(rows)):
        return rows, labels, None  # ScoredDataset will say what is missing
    sft = is_sft_trainer(trainer) and labels == "labels" and keeps_text(_columns(rows), trainer.args.dataset_text_field)
    if not sft and labels is not None and _leaves_out(rows, labels):
        return rows, labels, None
    tokenizer: Any = trainer.processing_class
    chat_template: Any = training_template(trainer) if is_sft_trainer(trainer) else None
    if isinstance(tokenizer, ProcessorMixin):
        chat_template, tokenizer = chat_template or tokenizer.chat_template, tokenizer.tokenizer
    settings: dict[str, Any] = {
        "labels": labels,
        "tokenizer": tokenizer if tokenizer is not None and tokenizer.is_fast else None,
        "chat_template": chat_template,
        "text_column": trainer.args.dataset_text_field if sft else None,
    }
    settings["end_token_ids"] = tuple(end_token_ids)
    settings["marks"] = settings["tokenizer"] and markers(tokenizer, chat_template)
    with trainer.args.main_process_first(desc="finding the responses"):
        if isinstance(rows, datasets.Dataset):
            labelled = rows.with_format(None).map(
                _response_labels,
                batched=True,
                batch_size=256,
                num_proc=trainer.args.dataset_num_proc if sft else None,
                fn_kwargs=settings,
                desc="Finding the responses",
            )
            found, lost = np.asarray(labelled[_FOUND][:]), sum(labelled[_LOST_TURNS][:])
            tokens_cut = np.asarray(labelled[_TOKENS_CUT][:], np.int64)
            labelled = labelled.remove_columns([_FOUND, _LOST_TURNS, _TOKENS_CUT])
        else:
            each: list[Mapping[str, Any]] = [rows[row] for row in range(len(rows))]  # type: ignore[index]
            columns = _response_labels({name: [row[name] for row in each] for name in each[0]}, **settings)
            found, lost = np.asarray(columns[_FOUND]), sum(columns[_LOST_TURNS])
            tokens_cut = np.asarray(columns[_TOKENS_CUT], np.int64)
            labelled = _WithColumn(rows, RESPONSE_LABELS, columns[RESPONSE_LABELS])
    if lost:
        logger.warning(
            "%d earlier turns of the assistant are not scored: the chat template writes them differently when another "
            "turn follows.",
            lost,
        )
    if not found.all():
        _allow_whole_text(np.flatnonzero(~found), len(rows), settings, score_whole_text)
    return labelled, RESPONSE_LABELS, tokens_cut


def _allow_whole_text(missing: Any, num_rows: int, settings: Mapping[str, Any], allowed: bool) -> None:
    """Warn that rows without a recognisable response are scored whole, or refuse them.

    Raises:
        ValueError: `allowed` is False.
    """
    marks: Markers | None = settings["marks"]
    if settings["tokenizer"] is None:
        why = "the trainer has no fast tokenizer (processing_class=) to find it with"
    elif marks is None or not marks.header.strip():
        why = "the tokenizer has no chat template whose markers would show it"
    else:
        why = f"they hold no assistant turn in the tokenizer's chat template ({marks.header.strip()!r})"
    rows = f"{len(missing)} of {num_rows} rows (first: row {missing[0]})"
    if not allowed:
        raise ValueError(
            f"Nothing shows which part of {rows} is the response: every token is trained on, and {why}. Give the data "
            "as messages or as prompt and completion, mask the prompts in the labels with -100, or use the chat "
            "template that the text is written in. attach(score_whole_text=True) scores such rows whole, with their "
            "prompts."
        )
    logger.warning("score_whole_text=True: %s are scored whole, with their prompts, because %s.", rows, why)


def _response_labels(
    batch: Mapping[str, Sequence[Any]],
    *,
    labels: str | None,
    tokenizer: Any,
    chat_template: str | None,
    marks: Markers | None,
    text_column: str | None,
    end_token_ids: tuple[int, ...],
) -> dict[str, list[Any]]:
    """For some rows: the labels of their responses, whether a response was found, how many turns were not, and how many
    tokens of it truncation has cut off."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    written: list[Written | None] = [None] * len(rows)
    if text_column is not None and tokenizer is not None:
        written = [as_trl_writes(row, tokenizer, chat_template, marks, text_column) for row in rows]
    all_ids = [_as_list(ids) for ids in batch["input_ids"]]
    known = [
        None if text is None else written_in(text, ids, tokenizer) for text, ids in zip(written, all_ids, strict=True)
    ]
    again = [text for text, found in zip(written, known, strict=True) if text is not None and found is None]
    read = iter(tokenised(again, tokenizer))
    result: dict[str, list[Any]] = {RESPONSE_LABELS: [], _FOUND: [], _LOST_TURNS: [], _TOKENS_CUT: []}
    for row, text, input_ids, found_there in zip(rows, written, all_ids, known, strict=True):
        trained = _as_list(row[labels or "input_ids"])
        is_response, tokens_cut = None, UNKNOWN
        if found_there is not None and text is not None and text.responses:
            is_response, tokens_cut = found_there, 0
        elif text is not None and found_there is None:
            tokens = next(read)
            cut = cut_off(tokens.input_ids, input_ids)
            if cut is not None and text.responses:
                is_response = np.zeros(len(input_ids), bool)
                part = slice(cut, cut + len(input_ids))
                kept = tokens.is_response[part]
                is_response[: len(kept)] = kept
                tokens_cut = response_tokens_cut(tokens.input_ids, tokens.is_response, part, end_token_ids)
        if is_response is None and IGNORED_LABEL not in trained and tokenizer is not None:
            is_response = responses_of(input_ids, tokenizer, marks)
            is_response = is_response if is_response.any() else None
        found = is_response is not None or IGNORED_LABEL in trained
        if is_response is not None:
            trained = np.where(is_response, trained, IGNORED_LABEL).tolist()
        result[RESPONSE_LABELS].append(trained)
        result[_FOUND].append(found)
        result[_TOKENS_CUT].append(tokens_cut)
        result[_LOST_TURNS].append(0 if text is None else text.lost_turns)
    return result


def _as_list(values: Any) -> list[int]:
    return values if isinstance(values, list) else np.asarray(values).tolist()


def _leaves_out(rows: Any, labels: str) -> bool:
    """Whether the labels mask any token of the data set; then they say what the response is."""
    if not isinstance(rows, datasets.Dataset):
        return any(IGNORED_LABEL in rows[row][labels] for row in range(len(rows)))
    tables = rows.select_columns([labels]).with_format("arrow").iter(batch_size=4096)
    return any(pc.any(pc.equal(pc.list_flatten(table.column(labels)), IGNORED_LABEL)).as_py() for table in tables)


def _columns(rows: Any) -> list[str]:
    return list(rows.column_names) if isinstance(rows, datasets.Dataset) else list(rows[0])


class _WithColumn(torch.utils.data.Dataset[Any]):
    """A data set of rows (not a `datasets.Dataset`) with an additional column."""

    def __init__(self, rows: Any, name: str, values: Sequence[Any]) -> None:
        self._rows, self._name, self._values = rows, name, values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self._rows[row], self._name: self._values[row]}
