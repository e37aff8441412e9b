"""Arms × seeds on one budget, with the student and the data of your own: the command `compare` as a script.

    python recipes/compare_policies.py candidates.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/compare_policies.py candidates.jsonl --model …

Options are those of `distill-sampler compare` (docs/evidence.md). Under `accelerate launch`, the processes train and
read together. After an interruption, run it again.
"""

import sys

import torch

from distill_sampler.cli import app

if __name__ == "__main__":
    app(["compare", *sys.argv[1:]], standalone_mode=False)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
