"""Damage every file of a checkpoint in every way; no run may train on with something else, or end in a raw error.

    python recipes/benchmarks/faults.py matrix [--ways plain ddp zero2 zero3 fsdp2] [--without-manifests]
    python recipes/benchmarks/faults.py cost [--rounds 3] [--parameters 100]

`matrix`: a run of three optimizer steps is saved after each, and its last checkpoint is lost. Then each file of the
second one is deleted, cut in half, has one bit flipped, or is overwritten with zeros, and the run is resumed. It must
pass the checkpoint over with a sentence that names the file, continue from the first one, and arrive at the weights of
the run that was not disturbed. In one process (`plain`) every resume trains to the end. With two processes under
`accelerate launch` every resume goes as far as the trainer's own loading, which gets a checkpoint that it has written;
two of them train to the end.

`cost`: how long a checkpoint takes to save, to hash beside training, and to compare before a resume.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).parents[2]))  # for the tests' tiny student

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from distill_sampler import BestOf, Curriculum, RankSurprisalRatio, Scorer, Shuffle, attach
from distill_sampler.artifacts.manifest import MANIFEST, damage, write_manifest
from distill_sampler.serialize import hash_of
from tests import tiny
from tests.distributed.launcher import launch

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "accelerate_configs"
WAYS = {
    "plain": None,
    "ddp": CONFIGS / "cpu.yaml",
    "zero2": CONFIGS / "cpu_zero2.yaml",
    "zero3": CONFIGS / "cpu_zero3.yaml",
    "fsdp2": ROOT / "tests" / "distributed" / "cpu_fsdp2_sharded.yaml",
}
STEPS = 3
DAMAGED = STEPS - 1
"""The checkpoint whose files are damaged, by its step."""


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else content


def zeros(content: bytes) -> bytes:
    return bytes(len(content))


DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {"deleted": None, "cut": cut, "flipped": flip, "zeros": zeros}

PASSED_OVER, AS_BEFORE, CHANGED, UNNOTICED, RAW = (
    "passed over",
    "the same without it",
    "SILENTLY CHANGED",
    "NOT NOTICED",
    "RAW ERROR",
)
GOOD = {PASSED_OVER, AS_BEFORE}


class Deciding(Trainer):
    """A trainer that can stop where its own loading would begin."""

    decides_only = False
    chosen: str | None = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.chosen = resume_from_checkpoint
        return None if self.decides_only else super().train(resume_from_checkpoint, *args, **kwargs)


def make(output: Path, *, manifests: bool) -> Deciding:
    """A tiny student with dropout, attached to a curriculum."""
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=1,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        ddp_timeout=120,
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # accelerate makes FSDP on a CPU into DDP, unless it sees this
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    tokenizer = tiny.tokenizer()
    trainer = Deciding(
        model=tiny.model(attention_dropout=0.1),
        args=args,
        train_dataset=tiny.tokenised(tiny.candidates(12), tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    metric = RankSurprisalRatio()
    curriculum = Curriculum(
        metrics=[metric], policies=[BestOf(metric.name, per="prompt_id"), Shuffle()], scorer=Scorer(progress=False)
    )
    attach(trainer, curriculum, manifests=manifests)
    return trainer


def weights(trainer: Trainer) -> str:
    """A hash of this process's part of the weights."""
    parts = (getattr(parameter, "ds_tensor", parameter) for parameter in trainer.model.parameters())
    local = (part.to_local() if hasattr(part, "to_local") else part for part in parts)
    return hash_of(*(part.detach().float().cpu().numpy().tobytes() for part in local))


def cases(checkpoint: Path) -> Iterator[tuple[str, str]]:
    """Every file below a checkpoint, with each damage that changes it."""
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        for name, change in DAMAGES.items():
            content = path.read_bytes()
            if change is None or change(content) != content:
                yield path.relative_to(checkpoint).as_posix(), name


def harm(path: Path, name: str) -> Callable[[], Any]:
    """Damage a file. Returns what undoes it."""
    content, times = path.read_bytes(), path.stat()
    change = DAMAGES[name]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(content))
    return lambda: (path.write_bytes(content), os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns)))


class Heard(logging.Handler):
    """What the library says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.said += record.getMessage() + "\n"


def outcome(folder: Path, file: str, trainer: Deciding, expected: str | None) -> tuple[str, str]:
    """Resume a run with a damaged file.

    Args:
        folder: the run's output folder.
        file: name of the file that is damaged.
        trainer: resumes. One that only decides is not asked for its weights.
        expected: weights of this process at the end of the run that was not disturbed.

    Returns:
        How it went, and what was said.
    """
    heard, logger = Heard(), logging.getLogger("distill_sampler")
    logger.addHandler(heard)
    try:
        trainer.train(resume_from_checkpoint=True)
    except Exception as error:
        return RAW, f"{type(error).__name__}: {error}"
    finally:
        logger.removeHandler(heard)
    passed_over = trainer.chosen == str(folder / f"checkpoint-{DAMAGED - 1}")
    if not trainer.decides_only and weights(trainer) != expected:
        return CHANGED, heard.said
    if passed_over:
        named = trainer.args.process_index > 0 or file in heard.said  # process 0 speaks
        return (PASSED_OVER if named else UNNOTICED), heard.said
    return (UNNOTICED if trainer.decides_only and file != MANIFEST else AS_BEFORE), heard.said


def run_matrix(
    folder: Path, *, manifests: bool = True, chosen: Callable[[str, str], bool] | None = None
) -> list[tuple[str, str, str, str]]:
    """Train, damage and resume, on each process of a run.

    Args:
        folder: of the run.
        manifests: whether checkpoints have manifests.
        chosen: which of the cases (file, damage) to run; None: all.

    Returns:
        For each case the file, the damage, how it went on this process, and what was said.
    """
    torch.set_num_threads(1)
    trainer = make(folder, manifests=manifests)
    trainer.train()
    several, first = trainer.args.world_size > 1, trainer.args.process_index == 0
    wait: Callable[[], None] = trainer.accelerator.wait_for_everyone
    expected = weights(trainer)
    wait()
    if first:
        shutil.rmtree(folder / f"checkpoint-{STEPS}")
    checkpoint = folder / f"checkpoint-{DAMAGED}"
    trainer.decides_only = True
    todo = [case for case in cases(checkpoint) if chosen is None or chosen(*case)]
    thorough: list[tuple[str, str]] = []
    if several:  # these train to the end
        thorough = [next(case for case in todo if case[0].endswith((".pt", ".distcp"))), (MANIFEST, "deleted")]
        todo += thorough
    found = []
    for number, (file, name) in enumerate(todo):
        wait()
        undo = harm(checkpoint / file, name) if first else lambda: None
        wait()
        resuming = trainer
        if not several or number >= len(todo) - len(thorough):
            resuming = make(folder, manifests=manifests)
        found.append((file, name, *outcome(folder, file, resuming, expected)))
        wait()
        if first:
            undo()
            if not resuming.decides_only:  # it has written checkpoints of its own
                shutil.rmtree(folder / f"checkpoint-{STEPS}", ignore_errors=True)
                if manifests:
                    write_manifest(checkpoint)
    return found


def work(folder: Path, manifests: bool) -> None:
    """What each process of a launched matrix does."""
    found = run_matrix(folder / "run", manifests=manifests)
    rank = int(os.environ.get("RANK", 0))
    (folder / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def matrix(way: str, *, manifests: bool = True) -> list[tuple[str, str, str, str]]:
    """The matrix of one way to train; of several processes the worst outcome of each case.

    Raises:
        RuntimeError: the processes failed.
    """
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        options = ["work", str(folder), *([] if manifests else ["--without-manifests"])]
        done = launch(Path(__file__), *options, cwd=folder, config=WAYS[way])
        if done.returncode:
            raise RuntimeError(f"{way} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("found-*.json"))]
    return [
        next((case for case in of_ranks if case[2] not in GOOD), of_ranks[0]) for of_ranks in zip(*found, strict=True)
    ]


def table(way: str, found: list[tuple[str, str, str, str]]) -> bool:
    """Print the outcomes of a matrix. True if all are good."""
    counts = Counter(how for _, _, how, _ in found)
    files = {file for file, *_ in found}
    print(f"\n{way}: {len(found)} resumes, {len(files)} files")
    for how in (PASSED_OVER, AS_BEFORE, CHANGED, UNNOTICED, RAW):
        print(f"  {how:20} {counts[how]:4}")
    for file, name, how, said in found:
        if how not in GOOD:
            print(f"    {file}, {name}: {how} {said.strip()[:200]}")
    return counts.keys() <= GOOD


def cost(rounds: int, parameters: int) -> None:
    """Time the save of a checkpoint, the hashing and the comparison."""
    model = tiny.model(hidden_size=1024, intermediate_size=4096, num_hidden_layers=max(1, parameters // 15))
    tokenizer = tiny.tokenizer()
    times: dict[str, list[float]] = {"save": [], "hash": [], "compare": []}
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=name, max_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True
            ),
            train_dataset=tiny.tokenised(tiny.candidates(2), tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
        trainer.train()
        for step in range(rounds):
            trainer.state.global_step = step
            checkpoint = Path(name, f"checkpoint-{step}")
            for what, do in (
                ("save", partial(trainer._save_checkpoint, model, None)),
                ("hash", partial(write_manifest, checkpoint, threads=4)),
                ("compare", partial(damage, checkpoint)),
            ):
                begun = time.perf_counter()
                do()
                times[what].append(time.perf_counter() - begun)
            size = sum(path.stat().st_size for path in checkpoint.rglob("*"))
            shutil.rmtree(checkpoint)
    save = statistics.median(times["save"])
    print(f"{size / 1e9:.2f} GB in a checkpoint, {rounds} rounds, {os.cpu_count()} cores; medians (lowest-highest)")
    for what, of in times.items():
        share = statistics.median(of) / save
        print(f"  {what:8} {statistics.median(of):6.2f} s ({min(of):.2f}-{max(of):.2f})  {share:5.0%} of the save")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_matrix = commands.add_parser("matrix", help="damage every file in every way")
    of_matrix.add_argument("--ways", nargs="+", choices=list(WAYS), default=["plain"])
    of_matrix.add_argument("--without-manifests", action="store_true", help="what happens without them")
    of_cost = commands.add_parser("cost", help="time saving, hashing and comparing")
    of_cost.add_argument("--rounds", type=int, default=3)
    of_cost.add_argument("--parameters", type=int, default=100, help="of the student, in millions")
    of_work = commands.add_parser("work", help="what each process does; started by matrix")
    of_work.add_argument("folder", type=Path)
    of_work.add_argument("--without-manifests", action="store_true")
    options = parser.parse_args()
    if options.command == "cost":
        cost(options.rounds, options.parameters)
    elif options.command == "work":
        work(options.folder, not options.without_manifests)
    else:
        good = [table(way, matrix(way, manifests=not options.without_manifests)) for way in options.ways]
        sys.exit(not all(good))


if __name__ == "__main__":
    main()
