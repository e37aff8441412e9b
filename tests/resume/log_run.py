"""A run with a sample log whose epochs are replanned; `test_verify` launches it on two processes, and on one.

python log_run.py OUTPUT [CHECKPOINT]
"""

import os
import sys
from pathlib import Path

import torch

from tests import tiny
from tests.resume.test_verify import train

torch.set_num_threads(1)
output, checkpoint = Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None
batch_size = 2 // int(os.environ.get("WORLD_SIZE", 1))
train(output, tiny.tokenizer(), per_device_train_batch_size=batch_size, resume=checkpoint)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
