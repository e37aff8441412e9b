"""The plain `transformers.Trainer` with a curriculum, without TRL.

    python recipes/trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data candidates.jsonl --output student
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/trainer.py --model … --data …

`candidates.jsonl` has rows with `prompt` and `completion` (both lists of messages), `prompt_id` and `teacher`.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from distill_sampler import BestOf, Curriculum, RankSurprisalRatio, Shuffle, attach

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output", default="student")
parser.add_argument("--epochs", type=float, default=2)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--learning-rate", type=float, default=2e-5)
parser.add_argument("--resume", action="store_true", help="Resume from the last checkpoint in the output folder.")
options = parser.parse_args()

args = TrainingArguments(
    output_dir=options.output,
    num_train_epochs=options.epochs,
    per_device_train_batch_size=options.batch_size,
    learning_rate=options.learning_rate,
    logging_steps=1,
    report_to="none",
    use_cpu=not torch.accelerator.is_available(),
)
tokenizer = AutoTokenizer.from_pretrained(options.model)


def tokenise(row):
    """Train on the completion alone."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
    return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


with args.main_process_first():
    rows = load_dataset("json", data_files=options.data, split="train").map(tokenise)

trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(options.model),
    args=args,
    train_dataset=rows,  # the trainer drops unused columns later; the curriculum still sees them
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
)
attach(
    trainer,
    Curriculum(
        metrics=[RankSurprisalRatio()],
        policies=[BestOf("rank_surprisal_ratio", per="prompt_id"), Shuffle()],
    ),
)
trainer.train(resume_from_checkpoint=options.resume)
trainer.save_model()
