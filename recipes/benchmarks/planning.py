"""Time and memory of an epoch's beginning: `python recipes/benchmarks/planning.py [policies | run] [--sizes N ...]`.

`policies` plans [KeepCorrect, BestOf, MixDomains, SortBy, Shuffle within buckets] for N samples in N / 4 groups, which
are spread over the data set at random. The inputs alone take 60 bytes per sample.

`run` is a whole run with the same policies, less the student's forward passes: the scores are made up. Data set,
curriculum, record and checkpoints are real. There are two epochs, of which the second scores a tenth and estimates the
rest, a save and a resume, in seconds:

- *set up*, once a run: bind the data set, begin the record;
- *order*: which samples are read together;
- *epoch 0* and *epoch 1*: collect the scores of the pass, plan, summarise, write the record;
- *save* and *resume*: the curriculum's part of a checkpoint, and starting the epoch that it was saved in.

Each size runs in a process of its own. Memory is that process's high-water mark (`ru_maxrss`): after importing the
library, after creating the inputs, and at the end.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import nn

from distill_sampler.artifacts.state import read_arrays, write_arrays
from distill_sampler.curriculum import Curriculum
from distill_sampler.dataset import ScoredDataset
from distill_sampler.distributed import Ranks
from distill_sampler.planning.rescore import Rescore
from distill_sampler.policies import BestOf, KeepCorrect, MixDomains, Shuffle, SortBy, apply_one_by_one
from distill_sampler.protocols import Metric, Pool
from distill_sampler.reading.blocks import in_reading_order
from distill_sampler.reading.scored import Scored
from distill_sampler.serialize import unpacked
from distill_sampler.types import EncodedColumn, EpochPlan, FloatArray, IntArray, Sample, TokenStats

POLICIES = [
    KeepCorrect("correct", if_none="keep_best", metric="score", per="prompt_id"),
    BestOf("score", per="prompt_id"),
    MixDomains({"reasoning": 3, "general": 1}),
    SortBy("score"),
    Shuffle(bucket=8192),
]


BLOCK = 8192
"""Samples whose scores arrive together."""

T = TypeVar("T")


@dataclass(frozen=True)
class Score(Metric):
    """A metric whose scores this script makes up."""

    name: str = "score"

    @property
    def columns(self) -> tuple[str, ...]:
        return ("score",)

    @property
    def higher_is_better(self) -> bool:
        return False

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> Mapping[str, float]:
        raise NotImplementedError

    def aggregate(self, columns: Mapping[str, FloatArray]) -> float:
        return float(columns[self.name].mean())


def make_pool(size: int) -> Pool:
    rng = np.random.default_rng(0)
    scores = rng.lognormal(size=size)
    scores[rng.integers(size, size=size // 100)] = np.nan  # up to one in a hundred has no score
    groups = rng.integers(size // 4, size=size)
    # each prompt has one domain, so the domain follows from the group; half of the responses are correct
    domains = (groups % 3 == 0).astype(np.int64)
    return Pool(
        epoch=0,
        metrics={"score": Score()},
        scores={"score": scores},
        columns={
            "prompt_id": EncodedColumn(codes=groups, values=range(size // 4)),
            "correct": EncodedColumn(codes=rng.integers(2, size=size), values=(False, True)),
            "domain": EncodedColumn(codes=domains, values=("reasoning", "general")),
        },
        lengths=rng.integers(100, 32_000, size=size),
        content_hash=rng.integers(2**64, size=size, dtype=np.uint64),
    )


@dataclass(frozen=True, kw_only=True)
class NoForward:
    """In place of a `Scorer`: gives every sample a made-up score, and remembers how long making it up took."""

    progress: bool = False
    seconds: list[float] = field(default_factory=list, compare=False)

    def reader(self, model: nn.Module) -> Any:
        return SimpleNamespace(
            model=model, ranks=Ranks.of(model), numerics={}, weights="made up", device=torch.device("cpu")
        )

    def score(
        self, reader: Any, dataset: ScoredDataset, metrics: Sequence[Metric], indices: IntArray, **_: Any
    ) -> Iterator[Scored]:
        rng = np.random.default_rng(len(self.seconds))
        for block in np.array_split(indices, -(-len(indices) // BLOCK)):
            begun = time.perf_counter()
            scored = Scored(
                indices=block,
                columns={"score": rng.lognormal(size=len(block)).astype(np.float32)},
                missing={"score": np.zeros(len(block), np.int64)},
                tokens=len(block),
                tokens_of={"score": len(block)},
            )
            self.seconds.append(time.perf_counter() - begun)
            yield scored


def make_rows(size: int, folder: Path) -> datasets.Dataset:
    """A data set on disk, with four tokens in a row: two of the prompt, two of the response."""
    rng = np.random.default_rng(0)
    groups = rng.integers(size // 4, size=size)
    tokens = np.stack([groups, groups, *rng.integers(2**31, size=(2, size))], axis=1).astype(np.int32)
    labels = tokens.copy()
    labels[:, :2] = -100
    lists = (
        pa.FixedSizeListArray.from_arrays(pa.array(each.reshape(-1)), 4).cast(pa.list_(pa.int32()))
        for each in (tokens, labels)
    )
    names = pa.array(["reasoning", "general"]), pa.array(["R1", "QwQ", "GPT", "Claude"])
    codes = (groups % 3 == 0).astype(np.int32), rng.integers(4, size=size).astype(np.int32)
    domain, teacher = (
        pa.DictionaryArray.from_arrays(pa.array(code), name).dictionary_decode()
        for code, name in zip(codes, names, strict=True)
    )
    correct = pa.array(rng.integers(2, size=size).astype(bool))
    columns = ["input_ids", "labels", "prompt_id", "domain", "teacher", "correct"]
    table = pa.table([*lists, pa.array(groups), domain, teacher, correct], columns)
    path = folder / "rows.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1 << 16)
    return datasets.Dataset.from_file(str(path))


def save(curriculum: Curriculum, checkpoint: Path) -> None:
    """What `attach` does to a checkpoint, but for the trainer's part."""
    arrays: dict[str, Any] = {}
    state = curriculum.state_dict(arrays)
    write_arrays(arrays, checkpoint)
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))


def load(curriculum: Curriculum, checkpoint: Path) -> None:
    """The same when it resumes: the arrays are compared with their hashes twice, the first time to choose a
    checkpoint."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    unpacked(state, read_arrays(checkpoint))
    curriculum.load_state_dict(state, read_arrays(checkpoint))


def peak_megabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure_run(size: int) -> dict[str, float]:
    """For one run on `size` samples: seconds of each part, and megabytes at three moments."""
    result = {"size": float(size), "imports MB": peak_megabytes()}

    def timed(part: str, work: Callable[[], T]) -> T:
        begun, made_up = time.perf_counter(), sum(scorer.seconds)
        value = work()
        result[part] = time.perf_counter() - begun - (sum(scorer.seconds) - made_up)
        return value

    scorer = NoForward()
    student = nn.Linear(1, 1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset = ScoredDataset(make_rows(size, folder))
        dataset.prompt_hash  # noqa: B018  # read once for a data set, like the tokens
        result["inputs MB"] = peak_megabytes()

        def bound() -> Curriculum:
            curriculum = Curriculum(
                metrics=[Score()],
                policies=POLICIES,
                num_samples=size // 4,
                rescore=Rescore(fraction=0.1),
            )
            curriculum.scorer = scorer  # type: ignore[assignment]
            curriculum.bind(dataset)
            curriculum.keep(folder, run="planning")
            return curriculum

        curriculum = timed("set up", bound)
        timed("order", lambda: in_reading_order(dataset, np.arange(size), unit_tokens=1 << 16))
        timed("epoch 0", lambda: curriculum.start_epoch(0, student, step=0, num_epochs=2))
        plan = timed("epoch 1", lambda: curriculum.start_epoch(1, student, step=size // 32, num_epochs=2))
        timed("save", lambda: save(curriculum, folder / "checkpoint"))
        result["saved MB"] = sum(path.stat().st_size for path in (folder / "checkpoint").iterdir()) / 1e6
        del curriculum
        resumed = bound()
        timed("resume", lambda: load(resumed, folder / "checkpoint"))
        assert resumed.start_epoch(1, student, step=size // 32) == plan
    result["peak MB"] = peak_megabytes()
    return result


def measure_policies(size: int) -> dict[str, float]:
    """For one plan of `size` samples: seconds of each policy and in total, and megabytes at three moments."""
    result = {"size": float(size), "imports MB": peak_megabytes()}
    pool = make_pool(size)
    plan = EpochPlan(indices=np.arange(size))
    result["inputs MB"] = peak_megabytes()
    begun = before = time.perf_counter()
    for policy, made in apply_one_by_one(POLICIES, plan, pool, seed=0):
        now = time.perf_counter()
        result[type(policy).__name__] = now - before
        result["planned"] = len(made)
        before = now
    result["seconds"] = before - begun
    result["peak MB"] = peak_megabytes()
    return result


def table(measured: str, head: Sequence[str], sizes: Sequence[int]) -> None:
    print("| " + " | ".join(head) + " |\n|" + "---:|" * len(head), flush=True)
    for size in sizes:
        command = [sys.executable, __file__, measured, "--one", str(size)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        cells = [f"{row[h]:,.0f}" if "MB" in h or h in ("size", "planned") else f"{row[h]:.3f}" for h in head]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["policies", "run"], help="by default, one after the other")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7], help="numbers of samples")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # what the subprocess is asked for
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps((measure_run if arguments.what == "run" else measure_policies)(arguments.one)))
        return
    memory = ["imports MB", "inputs MB", "peak MB"]
    if arguments.what != "run":
        table(
            "policies",
            ["size", "planned", *(type(each).__name__ for each in POLICIES), "seconds", *memory],
            arguments.sizes,
        )
    if arguments.what != "policies":
        parts = ["set up", "order", "epoch 0", "epoch 1", "save", "resume"]
        table("run", ["size", *parts, "saved MB", *memory], arguments.sizes)


if __name__ == "__main__":
    main()
