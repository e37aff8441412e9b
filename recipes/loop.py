"""A plain accelerate loop with a curriculum: score, plan, train, and resume after an interruption.

    python recipes/loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data candidates.jsonl
    accelerate launch --config_file accelerate_configs/zero2.yaml recipes/loop.py --model … --data candidates.jsonl

`candidates.jsonl` has rows with `prompt` and `completion` (both lists of messages), `prompt_id` and `teacher`. To
resume after the last finished epoch, run it again with `--resume`.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from distill_sampler import BestOf, Curriculum, CurriculumLoop, RankSurprisalRatio, ScoredDataset, Shuffle

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output", type=Path, default=Path("student"))
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--learning-rate", type=float, default=2e-5)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()

if not torch.accelerator.is_available():
    PartialState(cpu=True)  # connects processes without a GPU; Accelerator(cpu=True) would turn DeepSpeed off
# one batch per step; "auto" in a DeepSpeed configuration file then means the same
accelerator = Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)


def tokenise(row):
    """Train on the completion alone."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
    return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


with accelerator.main_process_first():
    rows = load_dataset("json", data_files=args.data, split="train").map(tokenise)

curriculum = Curriculum(
    metrics=[RankSurprisalRatio()],
    policies=[BestOf("rank_surprisal_ratio", per="prompt_id"), Shuffle()],
)
curriculum.use_tokenizer(tokenizer)
dataset = ScoredDataset(rows, end_token_ids=[tokenizer.eos_token_id])
loop = CurriculumLoop(curriculum, dataset, accelerator, output_dir=args.output)
loader = torch.utils.data.DataLoader(
    rows.select_columns(["input_ids", "labels"]),
    batch_size=args.batch_size,
    sampler=loop.sampler,
    collate_fn=DataCollatorForSeq2Seq(tokenizer),
)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
accelerator.register_for_checkpointing(loop)  # checkpoints then hold plan, scores and the place in the epoch

checkpoint = args.output / "checkpoint"
if args.resume and checkpoint.exists():
    accelerator.load_state(str(checkpoint))

for epoch in loop.epochs(args.epochs):
    for batch in loop.batches(model, loader):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}: last loss {loss.item():.3f}")
    accelerator.save_state(str(checkpoint))

loop.finish()
accelerator.unwrap_model(model).save_pretrained(
    args.output,
    is_main_process=accelerator.is_main_process,
    state_dict=accelerator.get_state_dict(model),  # gathered from all processes if it is sharded
)
if accelerator.is_main_process:
    tokenizer.save_pretrained(args.output)
accelerator.end_training()
