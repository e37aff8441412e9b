"""Kill a training run at random moments and restart it until it ends; it must train the same as without kills.

    python recipes/benchmarks/kill_storm.py [--kills 200] [--processes 1 or 2] [--workers 0] [--elastic] [--online]
                                              [--packs] [--objective]

A real `SFTTrainer` trains a tiny student with a curriculum (dropout on, gradient accumulation 2, a checkpoint every
second step) in its own process. The process gets SIGKILL while it scores, trains or saves, and restarts from the last
whole checkpoint until training ends. Then the next run begins, until there were enough kills. The script records every
batch where the loss is computed, the scores of each pass and the final weights, and compares them bit for bit with a
run that was not killed. Imports take longer than a run, so they are done once: runs are forks of this process.

With `--elastic` every start has one or two processes, with the same global batch. Then only the samples of each
optimizer step are compared, because sums over processes differ in their last digits.

With `--packs` each epoch's plan is packed, and a batch is one pack.

With `--online` scores are observed in training, half of the candidates are scored again every third step, and the rest
of the epoch is replanned.

With `--objective` the student also learns from a teacher's stored targets (`SoftTargets`) and from its hidden states
(`HiddenHints`), through projections that are trained with it. The losses and objectives of each step, and the final
projections, are compared too.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).parents[2]))  # for the tests' tiny student

import datasets
import pyarrow.parquet as pq
import torch
import torch.distributed
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from distill_sampler import (
    BestOf,
    Curriculum,
    HiddenHints,
    RankSurprisalRatio,
    Rescore,
    Scorer,
    Shuffle,
    SoftTargets,
    attach,
)
from distill_sampler.integrations.batches import rows_of
from distill_sampler.integrations.checkpoints import last_whole
from distill_sampler.objectives.hidden_hints import MODULE
from distill_sampler.serialize import hash_of
from tests import tiny

STARTING, SCORING, TRAINING, SAVING = PHASES = ("starting", "scoring", "training", "saving")
RSR = "rank_surprisal_ratio"


class Phase:
    """What a run is doing, and how often it has begun to, in memory that outlives the run."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1 + len(PHASES))

    def enter(self, phase: str) -> None:
        number = PHASES.index(phase)
        self._memory[1 + number] = (self._memory[1 + number] + 1) % 256
        self._memory[0] = number

    def now(self) -> str:
        return PHASES[self._memory[0]]

    def count(self, phase: str) -> int:
        return self._memory[1 + PHASES.index(phase)]

    def clear(self) -> None:
        self._memory[:] = bytes(len(self._memory))


# ---- A run, in a process of its own ----


def guide() -> Any:
    """The teacher of `--objective`, wider than the student."""
    return tiny.model(seed=7, hidden_size=48)


def store_targets(folder: Path, options: argparse.Namespace) -> Path:
    """What the teacher finds most probable in the candidates, written by the command that users call."""
    guide().save_pretrained(folder / "teacher")
    tiny.tokenizer().save_pretrained(folder / "teacher")
    with open(folder / "candidates.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in tiny.candidates(options.prompts))
    program = "from distill_sampler.cli import app; app()"
    command = [sys.executable, "-c", program, "teacher-logprobs", "candidates.jsonl", "--model", "teacher"]
    subprocess.run([*command, "--top-k", "8", "--output", "teacher.arrow"], cwd=folder, check=True, capture_output=True)
    return folder / "teacher.arrow"


def bytes_of(module: torch.nn.Module) -> bytes:
    return b"".join(parameter.detach().numpy().tobytes() for parameter in module.parameters())


def train(folder: Path, phase: Phase, rank: int, processes: int, options: argparse.Namespace) -> None:
    """Train from the last whole checkpoint to the end."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    if processes > 1:
        size = str(processes)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
        )
    log = os.open(folder / f"trained-{rank}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(**line: Any) -> None:
        os.write(log, (json.dumps(line) + "\n").encode())

    class Recorded(SFTTrainer):
        """Records the samples of every batch where the loss is computed, and what the run is doing."""

        batches: dict[int, int] = {}  # noqa: RUF012  # number of batches before this one in the current step

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            phase.enter(TRAINING)
            rows = [tuple(row.tolist()) for row in rows_of(inputs)]
            step = self.state.global_step + 1
            self.batches = {step: self.batches.get(step, -1) + 1}
            # accelerate distributes the batches to the processes one by one
            start = (self.batches[step] * processes + rank) * self.args.per_device_train_batch_size
            if options.packs:  # one pack a batch
                note(what=f"step {step:02}, pack {start}", value=[index[row] for row in rows])
            else:
                for place, row in enumerate(rows, start):
                    note(what=f"step {step:02}, place {place}", value=index[row])
            return super().compute_loss(model, inputs, *args, **kwargs)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
            phase.enter(SAVING)
            super()._save_checkpoint(*args, **kwargs)
            phase.enter(TRAINING)

    model = tiny.model(attention_dropout=0.1)
    trainer = Recorded(
        model=model,
        processing_class=tiny.tokenizer(),
        train_dataset=tiny.candidates(options.prompts),
        args=SFTConfig(
            output_dir=str(folder / "output"),
            num_train_epochs=3,
            per_device_train_batch_size=1 if options.packs else 4 // processes,
            gradient_accumulation_steps=4 // processes if options.packs else 2,
            dataloader_num_workers=options.workers,
            dataloader_persistent_workers=options.workers > 0,
            learning_rate=1e-2,
            save_steps=2,
            save_total_limit=3,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
    )
    assert trainer.accelerator.num_processes == processes
    index = {tuple(row): number for number, row in enumerate(trainer.train_dataset["input_ids"])}
    curriculum = Curriculum(
        metrics=[RankSurprisalRatio()],
        policies=[BestOf(RSR, per="prompt_id"), Shuffle()],
        scorer=Scorer(progress=False, batch_tokens=150),
        observe=options.online,
        rescore=Rescore(every_steps=3, fraction=0.5, lag=6) if options.online else None,
    )
    objectives: list[Any] = []
    if options.objective:
        objectives = [SoftTargets(str(options.targets)), HiddenHints(guide(), layers={0: 0, 1: -1})]

    class NotesProjections(TrainerCallback):
        """Notes them when training ends, before they are removed."""

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            note(what="projections", value=hash_of(bytes_of(model.get_submodule(MODULE))))

    attach(trainer, curriculum, objective=objectives, pack_to=150 if options.packs else None)
    if options.objective:
        trainer.add_callback(NotesProjections())
    score = curriculum.cycle.score

    def score_and_note(*args: Any, **kwargs: Any) -> Any:
        phase.enter(SCORING)
        result = score(*args, **kwargs)
        note(what=f"scores {kwargs['step']}", value=hash_of(*map(bytes, curriculum.store.latest.values())))
        return result

    curriculum.cycle.score = score_and_note  # type: ignore[method-assign]
    found, _ = last_whole(folder / "output")
    if processes > 1:
        torch.distributed.barrier()  # all processes have looked before one of them writes
    trainer.train(resume_from_checkpoint=True if found else None)
    note(what="weights", value=hash_of(bytes_of(model)))
    names = ("loss", *(objective.name for objective in objectives))
    for line in trainer.state.log_history:
        if "loss" in line:
            note(what=f"losses {line['step']:02}", value=[line[name] for name in names])
    if rank == 0:  # what a person keeps of the run
        for name in ("scores", "plans"):
            rows = pq.read_table(folder / "output" / f"{name}.parquet").to_pydict()
            note(what=f"{name}.parquet", value=hash_of(repr(rows).encode()))
        samples = range(len(curriculum.dataset))
        said = [curriculum.explain(sample, epoch) for epoch in range(3) for sample in samples]
        note(what="explanations", value=hash_of("".join(said).encode()))
        note(what="history", value=hash_of(repr(curriculum.history("prompt_id").to_pydict()).encode()))
        note(what="times trained", value=curriculum.times_trained().tolist())
    if processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def start(folder: Path, phase: Phase, processes: int, options: argparse.Namespace) -> list[int]:
    """Fork the processes of a run. Returns their ids. What they print goes to a file."""
    (folder / "rendezvous").unlink(missing_ok=True)
    phase.clear()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.dup2(output, 1)
                os.dup2(output, 2)
                train(folder, phase if rank == 0 else Phase(), rank, processes, options)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return children


# ---- The storm ----


def weather(folder: Path, phase: Phase, options: argparse.Namespace, draw: random.Random, kills: Counter[str]) -> int:
    """One run from its start to its end, with kills on the way. Returns the number of kills.

    Raises:
        RuntimeError: the run failed without being killed.
    """
    killed = 0
    while True:
        children = start(folder, phase, draw.randint(1, 2) if options.elastic else options.processes, options)
        target = draw.choice([SCORING, TRAINING, SAVING, None])
        times = draw.randint(1, 6) if target == TRAINING else draw.randint(1, 2)
        deadline = time.monotonic() + draw.uniform(0, 2)
        ended: dict[int, int] = {}
        while len(ended) < len(children):
            if time.monotonic() > deadline if target is None else phase.count(target) >= times:
                break
            for child in set(children) - set(ended):
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    ended[pid] = status
            if any(ended.values()):
                break
            time.sleep(0.0005)
        if len(ended) < len(children) and not any(ended.values()):
            time.sleep(draw.uniform(0, {SCORING: 0.15, TRAINING: 0.03, SAVING: 0.04, None: 0}[target]))
        victims = [child for child in children if child not in ended]
        draw.shuffle(victims)
        for child in victims:
            os.kill(child, signal.SIGKILL)
        for child in victims:
            ended[child] = os.waitpid(child, 0)[1]
        statuses = list(ended.values())
        if any(os.WIFEXITED(status) and os.WEXITSTATUS(status) for status in statuses):
            raise RuntimeError(f"a run failed by itself: {tail(folder)}")
        if any(os.WIFSIGNALED(status) for status in statuses):
            killed += 1
            kills[phase.now()] += 1
        if all(os.WIFEXITED(status) for status in statuses):
            return killed


def trained(folder: Path, options: argparse.Namespace) -> dict[str, set[str]]:
    """Every recorded value: for each position of each step, the scores of each pass, and the weights.

    Steps that a kill has undone are included: they too must be the same as without kills.
    """
    found: dict[str, set[str]] = {}
    for path in sorted(folder.glob("trained-*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if line["what"].startswith("step") or not options.elastic:
                found.setdefault(line["what"], set()).add(str(line["value"]))
    return found


def differences(here: dict[str, set[str]], reference: dict[str, set[str]]) -> list[str]:
    return [
        f"{key}: {sorted(here.get(key, ()))} instead of {sorted(reference.get(key, ()))}"
        for key in sorted(here.keys() | reference.keys())
        if here.get(key) != reference.get(key)
    ]


def tail(folder: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8")[-3000:] for path in sorted(folder.glob("output-*.txt")))


def said(folder: Path, sentence: str) -> int:
    return sum(path.read_text(encoding="utf-8").count(sentence) for path in folder.glob("output-0.txt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="continue until there were this many")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--elastic", action="store_true", help="one or two processes, drawn at each start")
    parser.add_argument("--packs", action="store_true", help="pack each epoch's plan")
    parser.add_argument("--objective", action="store_true", help="learn from a teacher's stored targets and states too")
    parser.add_argument("--workers", type=int, default=0, help="data loader workers")
    parser.add_argument("--online", action="store_true", help="observe, score again inside epochs, and replan")
    parser.add_argument("--prompts", type=int, default=20, help="with three candidates each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    options = parser.parse_args()
    root = (options.folder or Path(tempfile.mkdtemp(prefix="kill-storm-"))).resolve()
    root.mkdir(parents=True, exist_ok=True)
    phase, draw = Phase(), random.Random(options.seed)
    begun = time.monotonic()

    calm = root / "calm"
    calm.mkdir()
    if options.objective:
        options.targets = store_targets(root, options)
    for child in start(calm, phase, options.processes, options):
        if os.waitpid(child, 0)[1]:
            sys.exit(f"The run without kills failed:\n{tail(calm)}")
    reference = trained(calm, options)
    print(f"uninterrupted: {len(reference)} records in {time.monotonic() - begun:.1f} s", flush=True)

    kills: Counter[str] = Counter()
    found: list[str] = []
    runs = taken_up = passed_over = 0
    while kills.total() < options.kills:
        folder = root / f"storm-{runs}"
        folder.mkdir()
        killed = weather(folder, phase, options, draw, kills)
        differing = differences(trained(folder, options), reference)
        found += differing
        runs += 1
        taken_up += said(folder, "were scored before the interruption")
        passed_over += said(folder, "is passed over")
        print(f"run {runs}: {killed} kills, {len(differing)} differences, {kills.total()} kills in all", flush=True)
        for line in differing[:10]:
            print("  " + line)
        if not differing:
            shutil.rmtree(folder)
    print(f"\n{kills.total()} kills in {runs} runs, {len(found)} differences, {time.monotonic() - begun:.0f} s")
    for name in PHASES:
        print(f"  {name:9} {kills[name]:4} {'#' * (60 * kills[name] // max(kills.total(), 1))}")
    print(f"interrupted passes resumed: {taken_up}; broken checkpoints skipped: {passed_over}")
    if options.folder is None:
        shutil.rmtree(root, ignore_errors=True)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
