"""After training, the run's scores and plans lie in its output folder, for reports."""

from pathlib import Path

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from distill_sampler import Rescore
from tests.online.test_replanning import last_plans, run


def test_a_run_leaves_its_scores_and_its_last_plans(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    _, curriculum = run("SFTTrainer", tmp_path, tokenizer, rescore=Rescore(every_steps=2, lag=2, fraction=0.5))
    scores, plans = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("scores", "plans"))
    assert scores.num_rows == curriculum.history().num_rows == 18 + 3 * 9
    assert {"sample", "teacher", "prompt_id", "step", "rank_surprisal_ratio"} <= set(scores.column_names)
    assert plans["sample"].to_pylist() == last_plans(curriculum)
