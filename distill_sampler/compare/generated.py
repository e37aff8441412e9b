"""Does a trained student solve held-out prompts? It answers them greedily, and a verifier judges each answer."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from distill_sampler.compare.arms import GROUP
from distill_sampler.compare.candidates import Candidates
from distill_sampler.compare.student import Training
from distill_sampler.dataset import IGNORED_LABEL
from distill_sampler.distributed import Ranks
from distill_sampler.plugins import imported
from distill_sampler.types import IntArray

Verifier = Callable[[str, Mapping[str, Any]], bool]
"""Whether an answer solves a prompt, from its text and the columns of the prompt's first row."""

_BATCH = 8
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def verifier(name: str, *, human: str | None) -> Verifier:
    """A verifier from what the user typed.

    Args:
        name: `"last_number"`, which compares the last number of the answer with the last one of the human solution, or
            `"package.module:function"`, a function of the answer's text and the row.
        human: the column with human solutions.

    Raises:
        ValueError: there is no such verifier, or it needs human solutions and there are none.
    """
    if name == "last_number":
        if human is None:
            raise ValueError("--verifier last_number compares with human solutions: give --human-column too.")
        return partial(_last_number, column=human)
    if ":" not in name:
        raise ValueError(f"--verifier {name}: give last_number, or a function of your own as package.module:function.")
    found: Verifier = imported(name)
    return found


def _last_number(answer: str, row: Mapping[str, Any], *, column: str) -> bool:
    """`"So she pays $1,200.00." solves "… #### 1200"`"""
    wanted, found = (_NUMBER.findall(text) for text in (str(row[column]), answer))
    return bool(wanted and found) and _value(found[-1]) == _value(wanted[-1])


def _value(number: str) -> float:
    return float(number.replace(",", ""))


@torch.no_grad()
def solved(
    model: Any,
    tokenizer: Any,
    candidates: Candidates,
    rows: IntArray,
    verify: Verifier,
    *,
    end_token_ids: Sequence[int],
    max_new_tokens: int,
    training: Training,
    ranks: Ranks,
) -> tuple[dict[str, bool], float]:
    """Which held-out prompts the student solves; seconds.

    Args:
        model: the student.
        tokenizer: the student's.
        candidates: the data.
        rows: the held-out rows. The first row of each prompt is what the verifier sees.
        verify: judges the answers.
        end_token_ids: end-of-turn markers; an answer ends at the first one.
        max_new_tokens: of an answer; a longer one is judged as it stands then.
        training: how the student computes.
        ranks: the processes, which share the prompts.
    """
    started, was_training = time.perf_counter(), model.training
    model.eval()
    names = candidates.dataset.column(GROUP)
    first = {str(names.values[names.codes[row]]): row for row in reversed(rows.tolist())}
    asked: dict[str, list[int]] = {}
    for name, row in first.items():
        sample: Any = candidates.dataset.rows[row]
        asked[name] = sample["input_ids"][: int(np.argmax(np.asarray(sample["labels"]) != IGNORED_LABEL))]
    found: dict[str, bool] = {}
    by_length = sorted(asked, key=lambda name: (len(asked[name]), name))[ranks.rank :: ranks.world_size]
    for start in range(0, len(by_length), _BATCH):
        some = by_length[start : start + _BATCH]
        longest = max(len(asked[name]) for name in some)
        # on the left: answers begin where prompts end
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(asked[name])) + asked[name] for name in some])
        mask = torch.tensor([[0] * (longest - len(asked[name])) + [1] * len(asked[name]) for name in some])
        device = next(model.parameters()).device
        with training.autocast(model):
            written = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=list(end_token_ids),
            )
        answers = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
        for name, answer in zip(some, answers, strict=True):
            found[name] = bool(verify(answer, candidates.references[name]))
    model.train(was_training)
    every = {name: value for part in ranks.gather(found) for name, value in part.items()}
    return dict(sorted(every.items())), time.perf_counter() - started
