"""A real SFT run with a curriculum, as a script: started on one process or launched on several by the tests beside it.

    python sft_run.py STUDENT CANDIDATES OUTPUT [--resume CHECKPOINT] [--metrics TEXT] [--rank-1 dies] …

Every process writes `rank-R.json`: how it was distributed, the rows of each of its batches where the loss is computed,
the scores of each pass, the shape of each batch that was read for them, the bytes that it gave to collectives while an
epoch was planned, and with `--lora` the adapter and the projections at the end of training.
"""

import argparse
import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from distill_sampler import (
    BestOf,
    Curriculum,
    HiddenHints,
    Rescore,
    Scorer,
    Shuffle,
    SoftTargets,
    WeightBySoftmax,
    attach,
)
from distill_sampler.integrations.batches import rows_of
from distill_sampler.objectives.live import is_sharded
from distill_sampler.specs import parse_metrics

parser = argparse.ArgumentParser()
parser.add_argument("student")
parser.add_argument("candidates", type=Path)
parser.add_argument("output", type=Path)
parser.add_argument("--resume")
parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--batch-tokens", type=int, default=150)
parser.add_argument("--pack-to", type=int)
parser.add_argument("--rows", type=int, help="Only the first rows.")
parser.add_argument("--metrics", default="RankSurprisalRatio")
parser.add_argument("--scores", help="File of scores for the first pass.")
parser.add_argument("--lora", action="store_true")
parser.add_argument("--checkpointing", action="store_true")
parser.add_argument("--compile", action="store_true")
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--online", action="store_true", help="Observe, weigh, and plan anew after every step.")
parser.add_argument("--objectives", action="store_true", help="Learn from a random teacher's targets and states too.")
parser.add_argument("--sharded-teacher", action="store_true", help="Of --objectives.")
parser.add_argument("--timeout", type=int, default=60, help="Seconds that a process may wait for the other one.")
parser.add_argument("--rank-1", choices=["reads other data", "dies", "hangs"], help="What goes wrong on process 1.")
options = parser.parse_args()
rank = int(os.environ.get("RANK", 0))

rows = [json.loads(line) for line in options.candidates.read_text(encoding="utf-8").splitlines()][: options.rows]
trouble = options.rank_1 if rank == 1 else None
if trouble == "reads other data":
    rows = rows[::-1]


class Recorded(SFTTrainer):
    """Notes the rows of every batch where the loss is computed."""

    batches: list[list[list[int]]]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            self.batches.append([row.tolist() for row in rows_of(inputs)])
        return super().compute_loss(model, inputs, *args, **kwargs)


class Trained(TrainerCallback):
    """Notes the weights that were trained, while the projections are still among them."""

    def __init__(self) -> None:
        self.weights: dict[str, list[float]] = {}

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
        with ExitStack() as whole:
            if any(hasattr(each, "ds_tensor") for each in trainable.values()):
                import deepspeed

                whole.enter_context(deepspeed.zero.GatheredParameters(list(trainable.values())))
            self.weights = {name: each.detach().flatten().tolist() for name, each in trainable.items()}


objectives: list[Any] = []
if options.objectives:  # made before the arguments, which would shard it
    torch.manual_seed(7)
    teacher = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.student, hidden_size=48))
    teacher.save_pretrained(options.output / f"teacher-{rank}")

peft_config = None
if options.lora:
    from peft import LoraConfig

    peft_config = LoraConfig(r=4, target_modules="all-linear")

args = SFTConfig(
    output_dir=str(options.output),
    num_train_epochs=2,
    per_device_train_batch_size=options.batch_size,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    save_strategy="steps",
    save_steps=1,
    logging_steps=1,
    report_to="none",
    bf16=options.bf16,
    gradient_checkpointing=options.checkpointing,
    torch_compile=options.compile,
    torch_compile_backend="aot_eager" if options.compile else None,  # traced and wrapped as always, without a compiler
    use_cpu=True,
    ddp_timeout=options.timeout,
)
if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # accelerate makes FSDP on a CPU into DDP, unless it sees this
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
trainer = Recorded(
    model=AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32),
    processing_class=AutoTokenizer.from_pretrained(options.student),
    train_dataset=Dataset.from_list(rows),
    args=args,
    peft_config=peft_config,
)
trained = Trained()
if options.lora:
    trainer.add_callback(trained)
trainer.batches = []
shapes = []  # [rows, tokens] of each batch that is read for scores


def note(embeddings: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
    if embeddings.training:
        return
    shapes.append(list(arguments[0].shape))
    if len(shapes) == 8 and trouble == "dies":  # in the middle of the first pass
        os._exit(9)
    if len(shapes) == 8 and trouble == "hangs":
        time.sleep(3600)


trainer.model.get_input_embeddings().register_forward_pre_hook(note)
metrics = parse_metrics(options.metrics)
best = BestOf(metrics[0].name, per="prompt_id", k=2 if options.online else 1)
weights = [WeightBySoftmax(metrics[0].name, temperature=2.0)] if options.online else []
if options.objectives:
    if options.sharded_teacher and trainer.is_fsdp_enabled:
        for layer in teacher.model.layers:
            torch.distributed.fsdp.fully_shard(layer)
        torch.distributed.fsdp.fully_shard(teacher)
    elif options.sharded_teacher:  # ZeRO-3 shards what is loaded now
        teacher = AutoModelForCausalLM.from_pretrained(options.output / f"teacher-{rank}", dtype=torch.float32)
    objectives = [SoftTargets(teacher), HiddenHints(teacher, layers={0: 0})]
curriculum = Curriculum(
    metrics=metrics,
    policies=[best, *weights, Shuffle()],
    observe=options.online,
    rescore=Rescore(every_steps=1, lag=2, fraction=0.3) if options.online else None,
    scorer=Scorer(batch_tokens=options.batch_tokens, progress=False),
    scores=options.scores,
)
attach(trainer, curriculum, objective=objectives, pack_to=options.pack_to)
sent: list[list[int]] = []  # for each epoch, the bytes of each collective


def counted(collective: Any) -> Any:
    def counts(*tensors: Any, **settings: Any) -> Any:
        sent[-1].append(tensors[-1].nbytes)
        return collective(*tensors, **settings)

    return counts


def start_counted(*args: Any, _start: Any = curriculum.start_epoch, **kwargs: Any) -> Any:
    sent.append([])
    with ExitStack() as patched:
        for name in ("all_reduce", "all_gather"):
            collective = getattr(torch.distributed, name)
            patched.enter_context(mock.patch.object(torch.distributed, name, counted(collective)))
        return _start(*args, **kwargs)


curriculum.start_epoch = start_counted
trainer.train(resume_from_checkpoint=options.resume)

report = {
    "distributed_type": str(trainer.accelerator.distributed_type),
    "world_size": trainer.accelerator.num_processes,
    "wrapper": type(trainer.model_wrapped).__name__,
    "batches": trainer.batches,
    "plans": [plan.indices.tolist() for plan in curriculum.plans],
    "rows": [list(row) for row in trainer.train_dataset["input_ids"]],
    "scores": [taken.columns[metrics[0].name].tolist() for taken in curriculum.cycle.record.passes],
    "numerics": curriculum.store.numerics,
    "latest": curriculum.store.latest[metrics[0].name].tolist(),
    "measured at": curriculum.store.step.tolist(),
    "times scored": curriculum.store.times_scored.tolist(),
    "shapes": shapes,
    "sent": sent,
    "objectives": [
        [line["soft_targets"], line["hidden_hints"]] for line in trainer.state.log_history if "soft_targets" in line
    ],
    "teacher is sharded": bool(objectives) and is_sharded(teacher),
    "weights": trained.weights,
    "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
}
options.output.mkdir(parents=True, exist_ok=True)
(options.output / f"rank-{rank}.json").write_text(json.dumps(report), encoding="utf-8")
trainer.accelerator.wait_for_everyone()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
