"""The candidates of a comparison: prepared once, split into training and held-out prompts anew for each seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from distill_sampler.column_names import VERDICTS
from distill_sampler.compare.arms import CORRECT, GROUP, TEACHER, Arm
from distill_sampler.dataset import ScoredDataset
from distill_sampler.field_docs import documents_fields
from distill_sampler.hashing import content_uniform
from distill_sampler.sources.candidates import Candidate, Layout, read_candidates
from distill_sampler.sources.encoding import Encoder, choose_template
from distill_sampler.sources.files import Bad, Sources
from distill_sampler.types import IntArray, unknown_name


@documents_fields
@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """All candidates as the student reads them."""

    dataset: ScoredDataset
    """Rows with `input_ids`, `labels`, `prompt_id`, `teacher`, `correct`, and the data's other columns."""
    prompts: tuple[str, ...]
    """The prompts, in an order that depends on their names alone."""
    human: ScoredDataset | None
    """The human solutions, with `prompt_id`; None: there are none."""
    references: Mapping[str, Mapping[str, Any]]
    """By prompt: the other columns of its first row, the human solution among them, for a verifier."""
    notes: tuple[str, ...]
    """What was left out, in sentences."""

    def split(self, seed: int, *, held_out: int, train: int | None) -> tuple[IntArray, IntArray]:
        """Rows to train on and rows to measure on. Seeds hold out different prompts as long as there are enough.

        Args:
            seed: from 0.
            held_out: prompts to measure on.
            train: prompts to train on, drawn from the others; None: all others.

        Raises:
            ValueError: there are not enough prompts.
        """
        total = len(self.prompts)
        wanted = held_out + (1 if train is None else train)
        if held_out < 1 or wanted > total:
            raise ValueError(
                f"--held-out {held_out} with --train-prompts {train}: together at least 1 and {wanted} prompts, but "
                f"there are {total}. Give smaller numbers."
            )
        measured = {self.prompts[(seed * held_out + place) % total] for place in range(held_out)}
        others = [prompt for prompt in self.prompts if prompt not in measured]
        if train is not None:
            order = np.random.default_rng([seed, 2]).permutation(len(others))
            others = [others[place] for place in sorted(order[:train].tolist())]
        names, kept = self.dataset.column(GROUP), set(others)
        of_prompt = np.array([0 if name in kept else 1 if name in measured else 2 for name in names.values])
        return np.flatnonzero(of_prompt[names.codes] == 0), np.flatnonzero(of_prompt[names.codes] == 1)


def gather(
    sources: Sources, layout: Layout, *, arms: Sequence[Arm], correct: str | None = None, human: str | None = None
) -> list[Candidate]:
    """Read all candidates. What the data lack is refused here, before a model is loaded.

    Args:
        sources: the data.
        layout: the columns that the user has named.
        arms: what is going to be compared.
        correct: column that tells whether a response is correct; None: one of the usual names, if there is one.
        human: column with a human solution to the prompt.

    Raises:
        ValueError: the data cannot be used, or lack a column; the message names the column, the option or the arm.
    """
    found: list[Candidate] = []
    for item in read_candidates(sources, layout, read=[human] if human else [], option="--human-column"):
        if isinstance(item, Bad):
            raise ValueError(f"{item.where}: {item.reason}. Repair the row, or leave it out.")
        found.append(item)
    if not all(candidate.teacher for candidate in found):
        raise ValueError("--teacher-column: every response needs a teacher, to compare with the same mixture.")
    names = dict.fromkeys(name for candidate in found for name in candidate.extra)
    if correct is not None and correct not in names:
        raise ValueError(f"--correct-column {correct}: there is no such column with single values.")
    verdicts = _verdicts(found, correct)
    known = {*names, GROUP, TEACHER, *([CORRECT] if verdicts else [])}
    for arm in arms:
        for name in arm.uses_columns:
            if name not in known and name != CORRECT:
                raise ValueError(f"--arm {arm.name}: {unknown_name('column', name, known, 'with single values')}")
            if name not in known:
                raise ValueError(
                    f"--arm {arm.name} needs to know which responses are correct, but no column of the data says so. "
                    "Name it with --correct-column, or name the other arms with --arm."
                )
    return found


def _verdicts(found: Sequence[Candidate], correct: str | None) -> str | None:
    """The column that tells whether a response is correct; None: there is none."""
    return correct or next((name for name in VERDICTS if name in found[0].extra), None)


def prepare(
    found: Sequence[Candidate],
    tokenizer: Any,
    *,
    end_token_ids: Sequence[int],
    plain: bool = False,
    max_length: int | None = None,
    correct: str | None = None,
    human: str | None = None,
    prompts: int | None = None,
) -> Candidates:
    """Tokenise the candidates. Prompts that not every teacher answered, or with a cut response, are left out.

    Args:
        found: what `gather` returned.
        tokenizer: the student's.
        end_token_ids: end-of-turn markers, which are trained on but not scored.
        plain: read without a chat template.
        max_length: tokens of a row at most.
        correct: as given to `gather`.
        human: as given to `gather`.
        prompts: use only so many prompts, in the order of a hash of their names.

    Raises:
        ValueError: the data cannot be used; the message names the column or option.
    """
    correct = _verdicts(found, correct)
    template, _ = choose_template(found[0], tokenizer, plain=plain)
    encoder = Encoder(tokenizer, template=template, max_length=max_length)
    for candidate in found:
        if (misfit := encoder.misfit(candidate)) is not None:
            raise ValueError(f"{candidate.where}: {misfit}.")
    teachers = {candidate.teacher for candidate in found}
    groups = defaultdict[str, list[Candidate]](list)
    for candidate in found:
        groups[candidate.group].append(candidate)
    order = sorted(groups, key=lambda name: (content_uniform(np.frombuffer(name.encode(), np.uint8), 0), name))
    kept: list[tuple[str, list[dict[str, Any]], dict[str, Any] | None]] = []
    incomplete = cut = 0
    for name in order:
        if prompts is not None and len(kept) == prompts:
            break
        if {candidate.teacher for candidate in groups[name]} != teachers:
            incomplete += 1
            continue
        solution = _human(groups[name], human)
        encoded = encoder([*groups[name], *solution], end_token_ids)
        if any(each.tokens_cut for each in encoded):
            cut += 1
            continue
        rows = [
            {
                **candidate.extra,
                "input_ids": each.input_ids,
                "labels": each.labels,
                GROUP: name,
                TEACHER: candidate.teacher,
                CORRECT: None if correct is None else candidate.extra.get(correct),
            }
            for candidate, each in zip(groups[name], encoded, strict=False)
        ]
        own = {"input_ids": encoded[-1].input_ids, "labels": encoded[-1].labels, GROUP: name} if solution else None
        kept.append((name, rows, own))
    if not kept:
        raise ValueError(
            f"No prompt is left: of {len(groups)}, {incomplete} were not answered by all {len(teachers)} teachers, and "
            f"{cut} have a response that --max-length {max_length} cuts."
        )
    rows = [row for _, some, _ in kept for row in some]
    solutions = [own for _, _, own in kept if own is not None]
    notes = [f"{len(kept)} prompts with {len(rows)} responses of {len(teachers)} teachers."]
    if incomplete:
        notes.append(f"{incomplete} prompts were left out because not every teacher answered them.")
    if cut:
        notes.append(f"{cut} prompts were left out because --max-length {max_length} would cut a response.")
    return Candidates(
        dataset=ScoredDataset(Dataset.from_list(rows), end_token_ids=end_token_ids),
        prompts=tuple(name for name, _, _ in kept),
        human=ScoredDataset(Dataset.from_list(solutions), end_token_ids=end_token_ids) if solutions else None,
        references={name: {**groups[name][0].extra, **groups[name][0].read} for name, _, _ in kept},
        notes=tuple(notes),
    )


def _human(group: Sequence[Candidate], column: str | None) -> list[Candidate]:
    """The human solution as one more response, if the column has one."""
    text = group[0].read.get(column) if column else None
    if not text:
        return []
    first = group[0]
    if not first.messages:
        raise ValueError("--human-column needs a prompt and a response, or messages, not one text or tokens.")
    return [replace(first, messages=[*first.messages[: first.first], {"role": "assistant", "content": str(text)}])]
