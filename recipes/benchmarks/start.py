"""What `attach` costs before any scoring: `python recipes/benchmarks/start.py [--data FILE] [--rows 2000]`.

A tiny student in TRL's `SFTTrainer` gets the same traces as messages, as a conversational prompt and completion, and as
plain text. Processor time a row, in one process: of TRL's own preparation (constructing the trainer), and of `attach`,
which finds the responses and reads the tokens.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from scoring import traces
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from distill_sampler import Curriculum, Shuffle, attach
from distill_sampler.cli import demo_parts


def measure(rows: list[dict[str, Any]], tokenizer: Any) -> tuple[float, float, float]:
    """Milliseconds a row of TRL's preparation and of `attach`, and tokens a row."""
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(output_dir=folder, max_length=4096, report_to="none", bf16=False, use_cpu=True)
        begun = time.process_time()
        trainer = SFTTrainer(
            LlamaForCausalLM(shape), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        prepared = time.process_time()
        curriculum = Curriculum(metrics=[], policies=[Shuffle()])
        attach(trainer, curriculum)
        attached = time.process_time()
    tokens = float(curriculum.dataset.lengths.mean())
    return 1e3 * (prepared - begun) / len(rows), 1e3 * (attached - prepared) / len(rows), tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="traces, .jsonl or .jsonl.gz (default: the demo's)")
    parser.add_argument("--rows", type=int, default=2000)
    options = parser.parse_args()
    disable_progress_bars()
    tokenizer: Any = AutoTokenizer.from_pretrained(demo_parts.student_folder())
    found = (
        traces(options.data, options.rows, 4096)
        if options.data
        else demo_parts.candidates(tokenizer, prompts=50, max_length=1024).to_list()
    )
    pairs = [([*row["prompt"]], [*row["completion"]]) for row in itertools.islice(itertools.cycle(found), options.rows)]
    layouts = {
        "messages": [{"messages": prompt + completion} for prompt, completion in pairs],
        "prompt and completion, messages": [
            {"prompt": prompt, "completion": completion} for prompt, completion in pairs
        ],
        "prompt and completion, text": [
            {"prompt": prompt[-1]["content"], "completion": completion[0]["content"]} for prompt, completion in pairs
        ],
    }
    print("| rows | tokens a row | TRL's preparation, ms a row | attach, ms a row |\n|---|---:|---:|---:|")
    for name, rows in layouts.items():
        measure(rows[:50], tokenizer)
        trl, ours, tokens = measure(rows, tokenizer)
        print(f"| {name} | {tokens:.0f} | {trl:.2f} | {ours:.2f} |", flush=True)


if __name__ == "__main__":
    main()
