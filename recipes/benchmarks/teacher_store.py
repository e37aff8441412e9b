"""What a stored teacher costs: `python recipes/benchmarks/teacher_store.py [--samples N] [--tokens N]`.

1. A synthetic store is written, then opened and asked in random order in a process of its own. A million samples of
   2,000 tokens would take 40 GB, so there are two: a million samples of `--tokens` tokens (opening depends on the
   number of samples) and fewer samples of 2,000 tokens (a lookup depends on their length). Beside them, a row group of
   such rows is read from a Parquet file.
2. A scoring pass of a student alone is compared with one that also looks every sample up in a store.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ASKED = 2000
"""Samples that are looked up in random order."""
PIECE = 10_000
"""Samples that are made together."""


def resident_megabytes() -> tuple[float, float]:
    """Memory of this process: of its own, and of mapped files."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    values = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in status.splitlines() if "kB" in line}
    return values["RssAnon"], values["RssFile"]


def tables(samples: int, tokens: int) -> Iterator[pa.Table]:
    """Rows of a store, with a text of four bytes a token."""
    from distill_sampler.engines.writing import StoredRow, table_of

    rng = np.random.default_rng(0)
    begins = np.arange(tokens) * 4
    for first in range(0, samples, PIECE):
        surprisal = rng.gamma(0.4, 1.0, (16, tokens)).astype(np.float32)
        ids = rng.integers(0, 150_000, (16, tokens))
        yield table_of(
            [
                StoredRow(
                    text=f"{number:08d}".ljust(4 * tokens, "x"),
                    key=f"sample-{number}",
                    begins=begins,
                    surprisal=surprisal[number % 16],
                    token_ids=ids[number % 16],
                )
                for number in range(first, min(first + PIECE, samples))
            ],
            top_k=0,
        )


def write(path: Path, samples: int, tokens: int) -> None:
    from distill_sampler.engines.writing import KIND, VERSION, join_store, schema
    from distill_sampler.serialize import encode_facts

    facts = {"kind": KIND, "schema": VERSION, "top_k": 0, "key_column": "id", "content": "synthetic"}
    join_store(path, schema(0).with_metadata(encode_facts(facts)), tables(samples, tokens))


def write_parquet(path: Path, samples: int, tokens: int) -> None:
    from distill_sampler.engines.writing import schema

    with pq.ParquetWriter(path, schema(0), compression="zstd") as writer:
        for table in tables(samples, tokens):
            writer.write_table(table, row_group_size=1000)


def ask(path: Path, tokens: int) -> dict[str, float]:
    """Open a store and look samples up."""
    from distill_sampler.engines.stored_teacher import StoredTeacher

    rng = np.random.default_rng(1)
    before = resident_megabytes()
    started = time.perf_counter()
    teacher = StoredTeacher(path)
    opened = time.perf_counter()
    assert teacher.find("00000000".ljust(4 * tokens, "x"), "sample-0") is not None
    first = time.perf_counter()
    own = resident_megabytes()[0] - before[0]
    for number in rng.integers(0, len(teacher), ASKED).tolist():
        found = teacher.find(f"{number:08d}".ljust(4 * tokens, "x"), f"sample-{number}")
        assert found is not None
        float(found.surprisal.sum())
    return {
        "opened s": opened - started,
        "first lookup s": first - opened,
        "own MB": own,
        "lookup ms": (time.perf_counter() - first) / ASKED * 1000,
    }


def ask_parquet(path: Path) -> dict[str, float]:
    """Read rows in random order from a Parquet file, each with its row group."""
    rng = np.random.default_rng(1)
    times = []
    with pq.ParquetFile(path) as file:
        for group in rng.integers(0, file.num_row_groups, 20).tolist():
            started = time.perf_counter()
            file.read_row_group(group, ["logprobs", "begins", "text"], use_threads=False)
            times.append(time.perf_counter() - started)
    return {"lookup ms": median(times) * 1000}


def student(folder: Path) -> dict[str, float]:
    """Seconds of scoring passes with and without a stored teacher beside the student, in turn."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from distill_sampler import Metric, ScoredDataset, Scorer
    from distill_sampler.engines.stored_teacher import StoredTeacher
    from distill_sampler.engines.writing import StoredRow, write_store

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=32_000, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    stored = []
    for number in range(48):
        length = int(rng.integers(100, 600))
        ids = rng.integers(0, 32_000, length)
        text = f"{number:04d}".ljust(4 * length, "x")
        rows.append({"input_ids": ids.tolist(), "labels": ids.tolist(), "id": str(number), "text": text})
        begins = np.arange(length) * 4
        stored.append(StoredRow(text=text, key=str(number), begins=begins, surprisal=begins / 1e3, token_ids=ids))
    write_store(folder / "s.arrow", stored, {"key_column": "id"})
    teacher = StoredTeacher(folder / "s.arrow")

    class Alone(Metric):
        name = "alone"

        def reduce(self, sample: Any, stats: Any) -> dict[str, float]:
            return {self.name: float(stats[0].surprisal.mean())}

    class Beside(Metric):
        name = "beside"
        uses_columns = ("id", "text")

        def reduce(self, sample: Any, stats: Any) -> dict[str, float] | None:
            found = teacher.find(sample.columns["text"], sample.columns["id"])
            assert found is not None
            starts = np.arange(0, len(sample.columns["text"]), 80)
            sums, _ = found.per_span(starts)
            return {self.name: float(sums.mean() - stats[0].surprisal.mean())}

    dataset = ScoredDataset(rows)
    seconds: dict[str, list[float]] = {"alone": [], "beside": []}
    for _ in range(7):
        for metric in (Alone(), Beside()):
            started = time.process_time()
            list(Scorer(progress=False).score(model, dataset, [metric], np.arange(len(rows))))
            seconds[metric.name].append(time.process_time() - started)
    alone, beside = (min(seconds[name][1:]) for name in ("alone", "beside"))
    return {"student alone s": alone, "student + stored teacher s": beside, "ratio": beside / alone}


def apart(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", json.dumps([*map(str, arguments)])]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=100, help="of each sample of the large store")
    parser.add_argument("--long", type=int, default=50_000, help="samples of the store whose samples have 2,000 tokens")
    parser.add_argument("--folder", type=Path, help="for the files; left out: a temporary one")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, path, *more = options.one
        work = {"ask": ask, "parquet": ask_parquet, "student": student}[what]
        print("\n" + json.dumps(work(Path(path), *map(int, more))))  # type: ignore[operator]
        return
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for samples, tokens in ((options.samples, options.tokens), (options.long, 2000)):
            path = Path(folder) / "t.arrow"
            write(path, samples, tokens)
            found = apart("ask", path, tokens)
            gigabytes = path.stat().st_size / 1e9
            told = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
            print(f"Arrow, {samples:,} samples of {tokens:,} tokens ({gigabytes:.2f} GB): {told}", flush=True)
            path.unlink()
        write_parquet(Path(folder) / "t.parquet", 5000, 2000)
        found = apart("parquet", Path(folder) / "t.parquet")
        print(f"Parquet, row groups of 1,000 samples of 2,000 tokens: lookup ms {found['lookup ms']:.3g}")
        told = ", ".join(f"{name} {value:.4g}" for name, value in apart("student", folder).items())
        print(told)


if __name__ == "__main__":
    main()
