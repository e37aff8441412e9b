"""What a user of the installed package does: metrics, policy and reader by name, their contracts, an epoch of training.

python installed_run.py SITE FOLDER    SITE: where it is installed; FOLDER: has tutor.npy, and gets run/
"""

import sys
from pathlib import Path

import bigram_tutor
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from distill_sampler import Curriculum, Scorer, attach
from distill_sampler.specs import parse_metrics, parse_policies
from distill_sampler.testing import check_metric, check_policy, check_reader
from tests import tiny

site, folder = map(Path, sys.argv[1:])
assert Path(str(bigram_tutor.__file__)).is_relative_to(site), bigram_tutor.__file__
reward, ratio = parse_metrics(f"reward_per_nat, TutorRatio(tutor=Bigrams('{folder / 'tutor.npy'}'))")
(middle,) = parse_policies(["KeepMiddle(tutor_ratio)"])
check_metric(reward, columns={"reward": [0.0, 1.0, None]})
check_metric(ratio)
check_policy(middle)
check_reader(ratio.readers["tutor"], vocabulary=tiny.VOCAB)

tokenizer = tiny.tokenizer()
rows = tiny.candidates()
rows = rows.add_column("reward", [float(place % 3) for place in range(len(rows))])
trainer = Trainer(
    model=tiny.model(),
    train_dataset=tiny.tokenised(rows, tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    args=TrainingArguments(
        output_dir=str(folder / "run"),
        num_train_epochs=1,
        per_device_train_batch_size=3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    ),
)
attach(trainer, Curriculum(metrics=[reward, ratio], policies=[middle], scorer=Scorer(progress=False)))
trainer.train()
