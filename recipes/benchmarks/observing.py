"""What observed scores cost: a training step that observes its samples, compared with the same step that does not.

    python recipes/benchmarks/observing.py [--rounds 8] [--student FOLDER]

`Curriculum(observe=True)` costs one more product of scored positions with the output head, so the cost depends on the
head's share of the model. TRL's `SFTTrainer` (forward, fused head, backward, optimizer step) trains random Llamas with
different shares. Each batch is trained on twice in a row, with and without observing, in alternating order. The table
has the median ratio of the two times. `--student` measures a model of your own, loaded in float32. With `--bf16 --lora`
it is the set-up that most people train in.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from distill_sampler import RankSurprisalRatio, ScoredDataset
from distill_sampler.cli import demo_parts
from distill_sampler.integrations.batches import batch_of
from distill_sampler.reading.observer import Observer
from distill_sampler.types import EpochPlan


def llama(vocab: int) -> LlamaForCausalLM:
    """A body of 14 million weights with a head of `256 · vocab` weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=13,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
    )


def head_share(model: Any) -> float:
    """Share of the forward's floating-point operations, without attention scores."""
    head = model.get_output_embeddings().weight.numel()
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    body = sum(parameter.numel() for parameter in model.parameters()) - embedding - (0 if tied else head)
    return float(head / (head + body))


def measure(model: Any, tokenizer: Any, options: argparse.Namespace) -> tuple[float, list[float]]:
    """Seconds of a stock step (median), and the ratio for each round."""
    rng = np.random.default_rng(0)
    vocab = model.config.vocab_size
    rows = []
    for _ in range(options.rounds * options.batch_size):
        ids = rng.integers(0, vocab, options.length).tolist()
        prompt = options.length // 3
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear") if options.lora else None,
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=options.batch_size,
                max_length=None,
                bf16=options.bf16,
                gradient_checkpointing=False,
                use_cpu=not torch.accelerator.is_available(),
                report_to="none",
            ),
        )
        dataset = ScoredDataset(trainer.train_dataset)
        plan = EpochPlan(indices=np.arange(len(rows)))
        batches = [
            trainer._prepare_inputs(
                trainer.data_collator(
                    [trainer.train_dataset[index] for index in range(start, start + options.batch_size)]
                )
            )
            for start in range(0, len(rows), options.batch_size)
        ]
        trainer.model_wrapped = trainer.model = trainer.accelerator.prepare(model)
        trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
        trainer.current_gradient_accumulation_steps = 1

        def step(inputs: dict[str, Any], number: int, observer: Observer | None) -> float:
            started = time.perf_counter()
            if observer is not None:
                observer.expect(batch_of(inputs, plan, dataset, place=number * options.batch_size, epoch=0, step=0))
            trainer.training_step(trainer.model, dict(inputs))
            if observer is not None:
                observer.take()
            trainer.optimizer.step()
            trainer.model.zero_grad()
            return time.perf_counter() - started

        stock, ratios = [], []
        with Observer(trainer.model, dataset, [RankSurprisalRatio()]) as observer:
            step(batches[0], 0, observer)  # warm up
            for number, inputs in enumerate(batches):
                seconds = {}
                for observing in (number % 2 == 0, number % 2 == 1):
                    seconds[observing] = step(inputs, number, observer if observing else None)
                stock.append(seconds[False])
                ratios.append(seconds[True] / seconds[False])
    return statistics.median(stock), ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="batches, each trained on twice")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample; two thirds of them are scored")
    parser.add_argument("--student", type=Path, help="a folder or hub name")
    parser.add_argument("--bf16", action="store_true", help="float32 weights, multiplied in bfloat16: TRL's default")
    parser.add_argument("--lora", action="store_true", help="train an adapter of all linear layers")
    options = parser.parse_args()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options.student or demo_parts.student_folder())
    if options.student:
        models = [AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32)]
    else:
        models = [llama(vocab) for vocab in (2_000, 6_000, 16_000)]
    table = Table(title=f"{options.batch_size} samples of {options.length} tokens, {torch.get_num_threads()} threads")
    for heading in ("vocabulary", "head's share of the forward", "stock step", "observing / stock", "quartiles"):
        table.add_column(heading, justify="right")
    for model in models:
        seconds, ratios = measure(model, tokenizer, options)
        low, median, high = statistics.quantiles(ratios, n=4)
        table.add_row(
            f"{model.config.vocab_size:,}",
            f"{head_share(model):.1%}",
            f"{seconds:.2f} s",
            f"{median:.3f}",
            f"{low:.3f} to {high:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
