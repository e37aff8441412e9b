"""What a teacher beside the student costs: a pass with TeacherSentences against one with RankSurprisalRatio alone.

    python recipes/benchmarks/second_model.py [--traces 6] [--rounds 3]

The student is SmolLM2-135M-Instruct in float32, the traces are CHAMP's (the extra `demo`). The stored teacher's numbers
are made up: what they say costs nothing. A live teacher (here of the student's size) costs its own forwards, once. CPU
time of this process, rounds in turn, median of the ratios; so that other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_sampler import Metric, ModelReader, RankSurprisalRatio, ScoredDataset, Scorer, TeacherSentences
from distill_sampler.cli.demo_parts import candidates, student_folder
from distill_sampler.engines.writing import StoredRow, write_store


def prepared(rows: list[dict[str, Any]], tokenizer: Any) -> ScoredDataset:
    found = []
    for row in rows:
        prompt, whole = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=generate, return_dict=True)["input_ids"]
            for messages, generate in ((row["prompt"], True), (row["prompt"] + row["completion"], False))
        )
        found.append({"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]})
    return ScoredDataset(found, end_token_ids=[tokenizer.eos_token_id])


def seconds(student: Any, dataset: ScoredDataset, metrics: list[Metric]) -> float:
    started = time.process_time()
    for _ in Scorer(progress=False).score(student, dataset, metrics, np.arange(len(dataset))):
        pass
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    folder = student_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    rows = candidates(tokenizer, prompts=-(-chosen.traces // 4), max_length=640).to_list()[: chosen.traces]
    dataset = prepared(rows, tokenizer)
    rng = np.random.default_rng(0)
    stored = []
    for row in rows:
        text = row["completion"][0]["content"].strip()
        begins = np.arange(0, len(text.encode()), 4)
        stored.append(StoredRow(text=text, begins=begins, surprisal=rng.exponential(size=len(begins))))
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "store.arrow"
        write_store(path, stored, {"model": "made up"})
        alone: list[Metric] = [RankSurprisalRatio()]
        beside: dict[str, list[Metric]] = {
            "stored": [*alone, TeacherSentences(teacher=str(path), tokenizer=tokenizer)],
            "live": [*alone, TeacherSentences(teacher=ModelReader(teacher), tokenizer=tokenizer)],
        }
        ratios: dict[str, list[float]] = {name: [] for name in beside}
        for _ in range(chosen.rounds):
            base = seconds(student, dataset, alone)
            for name, metrics in beside.items():
                ratios[name].append(seconds(student, dataset, metrics) / base)
        work = beside["stored"][1]
        sample = [dataset.sample(index) for index in range(len(dataset))]
        started = time.process_time()
        assert all(work.views(each) is not None for each in sample)
        per_token = (time.process_time() - started) / dataset.num_scored.sum()
    print(f"{len(rows)} traces, {int(dataset.lengths.sum()):,} tokens, last pass alone {base:.1f} s of CPU time")
    for name, found in ratios.items():
        print(f"{name}: {np.median(found):.3f} ({min(found):.3f} to {max(found):.3f}) times the pass without it")
    print(f"finding and laying out a stored teacher: {1e6 * per_token:.1f} us for each response token")


if __name__ == "__main__":
    main()
