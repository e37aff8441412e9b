"""A trainer whose processes read each sequence together, as a script: what the library says to its accelerator.

    python parallel_run.py STUDENT [--tensor-parallel-model]

Accelerate's `ParallelismConfig` comes from the environment. The refusal is the last line that is printed.
"""

import argparse
import os

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from distill_sampler.integrations.refusals import refuse_parallelism

parser = argparse.ArgumentParser()
parser.add_argument("student")
parser.add_argument("--tensor-parallel-model", action="store_true")
options = parser.parse_args()

args = TrainingArguments(output_dir=".", use_cpu=True, report_to="none", save_strategy="no")
assert args.world_size == 2
if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":  # accelerate splits no sequences on a CPU, unless it sees this
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
parallel = {"distributed_config": DistributedConfig(tp_size=2)} if options.tensor_parallel_model else {}
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32, **parallel), args=args
)
try:
    refuse_parallelism(trainer.accelerator)
except ValueError as refusal:
    print(refusal)
torch.distributed.destroy_process_group()
