"""Every Python block of the README runs, as a stranger would copy it, on a tiny student."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from tests import tiny

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def stage(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the README's reader has: a student, a file of candidates, and for the loop the usual objects."""
    tiny.model().save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    with open(folder / "candidates.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in tiny.candidates())
    model = tiny.model()
    tokenised = tiny.tokenised(tiny.candidates(), tokenizer).select_columns(["input_ids", "labels"])
    return {
        "tokenizer": tokenizer,
        "tokenised": tokenised,
        "collate": DataCollatorForSeq2Seq(tokenizer),
        "model": model,
        "teacher_model": tiny.model(1),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_readmes_python_runs(
    number: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = stage(tmp_path, tokenizer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    code = BLOCKS[number].replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path / "student"))
    code = code.replace("num_train_epochs=2", "num_train_epochs=2, use_cpu=True")  # TRL's default wants a GPU
    exec(compile(code, f"README.md, Python block {number}", "exec"), names)


def test_the_readme_has_the_two_commands_that_ci_runs() -> None:
    commands = re.findall(r"^python3 -m venv .*$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [command.rsplit("&& ", 1)[1] for command in commands] == [
        "distill-sampler demo",
        "pytest -n auto --dist loadfile",
    ]
