"""SFT with a curriculum and TRL, on one process or many.

    python recipes/sft.py --config recipes/configs/best_of_n.yaml --data candidates.jsonl
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/sft.py \\
        --config recipes/configs/best_of_n.yaml --data candidates.jsonl

Every field of TRL's `SFTConfig` and `ModelConfig` is an option, on the command line or in the YAML file; `--help` lists
them. Name metrics and policies with their arguments, or give a Python factory `module:function` that returns a
`Curriculum`. With `--teacher`, the student also learns from that model's distributions. After an interruption, run it
again with `--resume_from_checkpoint true`.
"""

import importlib
from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM

from distill_sampler import Curriculum, SoftTargets, attach
from distill_sampler.specs import parse_metrics, parse_policies, parse_rescore

try:
    from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config
except ImportError as error:
    raise SystemExit(f"{error}. This recipe needs pip install 'distill_sampler[trl]'.") from error


@dataclass
class CurriculumArguments:
    """What to score, how to plan, and when to score again."""

    data: str = field(metadata={"help": "Candidates: a JSONL or Parquet file, or a data set's name on the hub."})
    metrics: str = field(default="rank_surprisal_ratio", metadata={"help": "What to score, separated by commas."})
    policy: list[str] = field(
        default_factory=lambda: ["BestOf(rank_surprisal_ratio, per=prompt_id)", "Shuffle()"],
        metadata={"help": "Policies, applied in this order."},
    )
    rescore: str = field(default="Rescore()", metadata={"help": "When the student scores again, and which samples."})
    observe: bool = field(default=False, metadata={"help": "Also take scores from the forward passes of training."})
    num_samples: int | None = field(default=None, metadata={"help": "Length of an epoch. By default it is found."})
    curriculum: str | None = field(
        default=None, metadata={"help": "module:function that returns a Curriculum, instead of metrics and policies."}
    )


@dataclass
class TeacherArguments:
    """A model whose soft targets the student learns, beside the traces."""

    teacher: str | None = field(
        default=None, metadata={"help": "A model with the student's tokenizer, or a store of one (NAME.arrow)."}
    )
    temperature: float = field(default=2.0, metadata={"help": "Softens both models' distributions."})
    alpha: float = field(default=0.5, metadata={"help": "Share of the soft targets in the loss."})
    divergence: str = field(default="forward", metadata={"help": "forward, reverse or js."})
    tail: str = field(default="renormalise", metadata={"help": "Of a store: renormalise or bucket."})


def make_objectives(chosen: TeacherArguments, dtype: str | None) -> list[SoftTargets]:
    if chosen.teacher is None:
        return []
    teacher = chosen.teacher
    if not teacher.endswith(".arrow"):
        teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=dtype or "auto")
    return [
        SoftTargets(
            teacher,
            temperature=chosen.temperature,
            alpha=chosen.alpha,
            divergence=chosen.divergence,
            tail=chosen.tail,
        )
    ]


def make_curriculum(chosen: CurriculumArguments, seed: int) -> Curriculum:
    if chosen.curriculum:
        name, _, function = chosen.curriculum.partition(":")
        return getattr(importlib.import_module(name), function)()
    metrics = parse_metrics(chosen.metrics)
    return Curriculum(
        metrics=metrics,
        policies=parse_policies(chosen.policy, [metric.name for metric in metrics]),
        rescore=parse_rescore(chosen.rescore),
        observe=chosen.observe,
        num_samples=chosen.num_samples,
        seed=seed,
    )


def main() -> None:
    parser = TrlParser((CurriculumArguments, TeacherArguments, SFTConfig, ModelConfig))
    chosen, teaching, args, model = parser.parse_args_and_config()
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    kind = next((kinds[ending] for ending in kinds if chosen.data.endswith(ending)), None)
    rows = (
        load_dataset(kind, data_files=chosen.data, split="train") if kind else load_dataset(chosen.data, split="train")
    )

    if model.dtype is not None:
        args.model_init_kwargs = {**(args.model_init_kwargs or {}), "dtype": model.dtype}
    trainer = SFTTrainer(
        model=model.model_name_or_path, args=args, train_dataset=rows, peft_config=get_peft_config(model)
    )
    attach(trainer, make_curriculum(chosen, args.seed), objective=make_objectives(teaching, model.dtype))
    # "true" resumes from the last checkpoint in the output folder, a path from that checkpoint
    resume = {None: None, "true": True, "false": None}.get(args.resume_from_checkpoint, args.resume_from_checkpoint)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if torch.distributed.is_initialized():
        trainer.accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
