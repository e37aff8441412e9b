"""Trains with another project's own function and a curriculum, in the environment of that project.

    python host_run.py llamafactory|ms-swift|axolotl FOLDER [CHECKPOINT]

Trains the toy student of the folder two epochs, or goes on from the checkpoint. The model and the plans are in `out`,
and `releases.json` says with which releases of the packages.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

# LLaMA-Factory refuses releases of what it does not need here (av, for videos) with this check.
os.environ |= {"HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1", "AXOLOTL_DO_NOT_TRACK": "1"}

from distill_sampler import BestOf, Curriculum, RankSurprisalRatio, Shuffle, attached
from tests import tiny

host, folder, *checkpoint = sys.argv[1:]
os.chdir(folder)
tiny.model().save_pretrained("student")
tiny.tokenizer().save_pretrained("student")
with open("candidates.jsonl", "w", encoding="utf-8") as file:
    file.writelines(json.dumps({"messages": row["prompt"] + row["completion"]}) + "\n" for row in tiny.candidates(8))
common = {
    "template": "chatml",
    "output_dir": "out",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "resume_from_checkpoint": checkpoint[0] if checkpoint else None,
}
curriculum = Curriculum(
    metrics=[RankSurprisalRatio()],
    policies=[BestOf("rank_surprisal_ratio", per="prompt_id"), Shuffle()],
)
options = {"prompt_column": "prompt_id", "sample_log": True}  # with a log, every batch is compared with the plan
if host == "llamafactory":
    from llamafactory.train.tuner import run_exp

    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    described = {"file_name": "candidates.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}}
    Path("dataset_info.json").write_text(json.dumps({"candidates": {**described, "tags": tags}}), encoding="utf-8")
    own = {"stage": "sft", "do_train": True, "finetuning_type": "full", "use_cpu": True}
    data = {"model_name_or_path": "student", "dataset": "candidates", "dataset_dir": "."}
    with attached(curriculum, **options):
        run_exp({**common, **own, **data})
elif host == "ms-swift":
    from swift import SftArguments, sft_main

    own = {"model": "student", "model_type": "llama", "tuner_type": "full", "torch_dtype": "float32", "use_hf": True}
    data = {"dataset": ["candidates.jsonl"], "split_dataset_ratio": 0, "load_from_cache_file": False}
    with attached(curriculum, **options, replace_sampler=True):
        sft_main(SftArguments(**common, **own, **data, attn_impl="eager", add_version=False))
else:
    settings = {
        "base_model": "student",
        "datasets": [{"path": "candidates.jsonl", "ds_type": "json", "type": "chat_template"}],
        "chat_template": "tokenizer_default",
        "dataset_prepared_path": "prepared",
        "output_dir": "out",
        "sequence_len": 512,
        "sample_packing": False,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_epochs": 2,
        "learning_rate": 1e-2,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "save_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "attn_implementation": "eager",
        "resume_from_checkpoint": checkpoint[0] if checkpoint else None,
        "plugins": ["distill_sampler.integrations.axolotl.CurriculumPlugin"],
        "distill_sampler": {"policies": ["BestOf(rank_surprisal_ratio, per=prompt_id)", "Shuffle"], "attach": options},
    }
    Path("axolotl.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    subprocess.run([sys.executable, "-m", "axolotl.cli.train", "axolotl.yaml"], check=True)
releases = {name: version(name) for name in (host, "transformers", "trl", "accelerate", "torch")}
Path("releases.json").write_text(json.dumps(releases), encoding="utf-8")
