"""TRL's own SFT script, as it is installed, with the two lines."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests import tiny

LINES = """
    from distill_sampler import BestOf, Curriculum, RankSurprisalRatio, Shuffle, attach
    attach(trainer, Curriculum(metrics=[RankSurprisalRatio()],
                               policies=[BestOf("rank_surprisal_ratio", per="prompt_id"), Shuffle()]))
"""


def with_two_lines(source: str) -> str:
    """The script with our lines after the trainer is made."""
    made = source.index("trainer = SFTTrainer(")
    end = source.index("\n    )\n", made) + len("\n    )\n")
    return source[:end] + LINES + source[end:]


@pytest.mark.slow
def test_trls_own_script_trains_with_two_lines_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec("trl.scripts.sft")
    assert found is not None
    assert found.origin is not None
    source = with_two_lines(Path(found.origin).read_text(encoding="utf-8"))
    tiny.model().save_pretrained(tmp_path / "student")
    tiny.tokenizer().save_pretrained(tmp_path / "student")
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data" / "train.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in tiny.candidates(8))
    settings = {
        "model_name_or_path": tmp_path / "student",
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "dtype": "float32",
    }
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["sft.py", *arguments])
    exec(compile(source, "sft.py", "exec"), {"__name__": "__main__"})
    state = json.loads((tmp_path / "out" / "checkpoint-8" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 8  # 2 epochs of 8 of the 24 candidates, two in a step
    assert (tmp_path / "out" / "scores.parquet").exists()
