"""Do a teacher's stored targets teach a real student more than its traces alone? On two cores, from the package index.

    python recipes/soft_targets.py --output soft-targets-run

Student and traces are those of `provenance.py` beside this file: SmolLM2-135M-Instruct and CHAMP.

1. The *teacher* is the student, fine-tuned on the traces of one author for two thirds of the problems.
2. Its 32 most probable tokens at each place of the traces for the second third are stored
   (`distill-sampler teacher-logprobs`).
3. Two arms train the student on these traces, with the same samples, order, steps and learning rate: cross entropy
   alone, and `SoftTargets` from the store beside it.
4. How many nats does each model need for a token of the author's traces for the last third, which none of them saw?

Each step is kept in the output folder; run it again after an interruption and it goes on. The difference of the arms
has a 95 % interval by bootstrap over problems.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars
from provenance import Run
from transformers.utils import logging as transformers_logging

from distill_sampler import (
    Curriculum,
    GlobalNaturalness,
    ResponseLength,
    ScoredDataset,
    Scorer,
    Shuffle,
    SoftTargets,
    attach,
)
from distill_sampler.integrations.transformers import end_token_ids


class Study(Run):
    """The steps of this study, each made once and kept in a folder."""

    def traces(self, *parts: str) -> list[dict[str, Any]]:
        """The author's traces of parts of the problems."""
        return [row for part in parts for row in self.of(part, self.chosen.author)]

    def store_targets(self) -> str:
        """What the teacher finds most probable in the traces that the arms train on."""
        store, data = self.folder / "teacher.arrow", self.folder / "traces.jsonl"
        if not store.exists():
            names = ("prompt", "completion", "prompt_id")
            lines = [json.dumps({name: row[name] for name in names}) for row in self.traces("distilled")]
            data.write_text("\n".join(lines) + "\n", encoding="utf-8")
            self.tokenizer.save_pretrained(self.folder / "teacher")
            program = "from distill_sampler.cli import app; app()"
            command = [sys.executable, "-c", program, "teacher-logprobs", str(data), "--output", str(store)]
            subprocess.run([*command, "--model", str(self.folder / "teacher"), "--top-k", "32"], check=True)
        return str(store)

    def arm(self, name: str, objective: SoftTargets | None, seed: int) -> dict[str, Any]:
        """Train the student on the traces of the second third, and say what it makes of the last third."""
        trainer = self.trainer(name, self.traces("distilled"), seed=seed)
        attach(
            trainer,
            Curriculum(metrics=[], policies=[Shuffle()], seed=seed),
            objective=[] if objective is None else objective,
        )
        trainer.train()
        return {"steps": trainer.state.global_step, "held out": self.nats(trainer.model.eval())}

    def nats(self, model: Any) -> dict[str, tuple[float, int]]:
        """By held-out problem: nats a token of the author's trace, and its tokens."""
        rows = self.traces("held out")
        template = self.tokenizer.apply_chat_template

        def prepared(row: dict[str, Any]) -> dict[str, Any]:
            prompt = template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
            whole = template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
            return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}

        dataset = ScoredDataset(
            Dataset.from_list(rows).map(prepared), end_token_ids=end_token_ids(self.tokenizer, model)
        )
        found: dict[str, tuple[float, int]] = {}
        for block in Scorer(progress=False).score(
            model, dataset, [GlobalNaturalness(), ResponseLength()], np.arange(len(dataset))
        ):
            values = zip(
                block.indices, block.columns["global_naturalness"], block.columns["response_length"], strict=True
            )
            found |= {rows[row]["prompt_id"]: (-float(mean), int(length)) for row, mean, length in values}
        return found


def mean(held_out: dict[str, Any]) -> float:
    """Nats a token, over all tokens."""
    return sum(nats * tokens for nats, tokens in held_out.values()) / sum(tokens for _, tokens in held_out.values())


def difference(arms: list[tuple[dict[str, Any], dict[str, Any]]], draws: int = 4000) -> tuple[float, float, float]:
    """Nats a token of the second of each pair minus the first, with a 95 % interval by bootstrap over problems."""
    problems = sorted(arms[0][0])
    tokens = np.array([arms[0][0][problem][1] for problem in problems])
    gaps = np.array([np.mean([two[each][0] - one[each][0] for one, two in arms]) for each in problems])
    drawn = np.random.default_rng(0).integers(0, len(problems), (draws, len(problems)))
    means = (gaps[drawn] * tokens[drawn]).sum(1) / tokens[drawn].sum(1)
    return float((gaps * tokens).sum() / tokens.sum()), *map(float, np.quantile(means, [0.025, 0.975]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("soft-targets-run"))
    parser.add_argument("--author", default="GPT-4", help="whose traces are learned")
    parser.add_argument("--prompts", type=int, default=16, help="problems of each of the three parts")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each arm")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--tail", default="bucket", help="renormalise or bucket")
    chosen = parser.parse_args()
    chosen.max_length = 1024  # no trace is longer
    transformers_logging.set_verbosity(logging.ERROR)
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries to each other

    study = Study(chosen)
    study.kept("teacher-made", lambda: study.fine_tuned("teacher", study.traces("taught", "distilled")))
    store = study.store_targets()
    nats = {
        name: study.kept(f"{name}-held-out", lambda name=name: study.nats(study.load(name)))
        for name in ("student", "teacher")
    }
    arms: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for seed in range(chosen.seeds):
        targets = SoftTargets(store, temperature=chosen.temperature, alpha=chosen.alpha, tail=chosen.tail)
        pair = [
            study.kept(f"{name}-{seed}", partial(study.arm, name, objective, seed))
            for name, objective in (("cross-entropy", None), ("soft-targets", targets))
        ]
        arms.append((pair[0]["held out"], pair[1]["held out"]))
    print(f"\nnats a token of {len(nats['student'])} held-out traces, {chosen.seeds} runs of each arm")
    for name, held_out in nats.items():
        print(f"{name:15} {mean(held_out):.4f}")
    for number, name in enumerate(("cross entropy", "soft targets")):
        values = [mean(pair[number]) for pair in arms]
        print(f"{name:15} {np.mean(values):.4f}  ({', '.join(f'{value:.4f}' for value in values)})")
    gap, low, high = difference(arms)
    print(f"soft targets - cross entropy: {gap:+.4f} [{low:+.4f}, {high:+.4f}]")


if __name__ == "__main__":
    main()
