"""A run on several processes, resumed from a checkpoint that looks whole but fails to load; launched by `test_faults`.

    python load_run.py OUTPUT (FILE | --rank-1-fails)

The last checkpoint is lost, and the one before is cut off in FILE (a pattern below the checkpoint), or process 1 alone
cannot read its optimizer. Each process that comes to the end writes `end-RANK.json`: the checkpoint that it resumed
from, and whether its weights are those of the run that was not disturbed.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[2] / "recipes" / "benchmarks"))
import faults

parser = argparse.ArgumentParser()
parser.add_argument("output", type=Path)
parser.add_argument("file", nargs="?")
parser.add_argument("--rank-1-fails", action="store_true")
given = parser.parse_args()

torch.set_num_threads(1)
trainer = faults.make(given.output, manifests=False)
trainer.train()
expected = faults.weights(trainer)
rank, checkpoint = trainer.args.process_index, given.output / f"checkpoint-{faults.DAMAGED}"
trainer.accelerator.wait_for_everyone()
if rank == 0:
    shutil.rmtree(given.output / f"checkpoint-{faults.STEPS}")
    if given.file is not None:
        (file,) = checkpoint.glob(given.file)
        faults.harm(file, "cut")
trainer.accelerator.wait_for_everyone()
load = torch.load


def fail(file: Any, *args: Any, **kwargs: Any) -> Any:
    if str(file) == str(checkpoint / "optimizer.pt"):
        raise OSError(5, "Input/output error", str(file))
    return load(file, *args, **kwargs)


if given.rank_1_fails and rank == 1:
    torch.load = fail
resumed = faults.make(given.output, manifests=False)
resumed.train(resume_from_checkpoint=True)
end = {"from": resumed.chosen, "same": faults.weights(resumed) == expected}
(given.output / f"end-{rank}.json").write_text(json.dumps(end), encoding="utf-8")
resumed.accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
