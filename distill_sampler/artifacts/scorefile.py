"""Scores that were written to disk, read back as arrays: by the `score` command, or by a curriculum's `to_table`.

A folder of a run has `scores.parquet`, and `plans.parquet` if epochs were planned. Which column is the teacher, the
prompt, the domain and the verdict stands in the file's metadata, or is told by their usual names.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_sampler.sources.candidates import GROUPS, TEACHERS
from distill_sampler.specs import known_metrics
from distill_sampler.types import Column, FloatArray, HashArray, IntArray, Metric, unknown_name

DOMAINS = ("domain", "category", "subject", "task", "topic", "level", "source")
VERDICTS = ("correct", "is_correct", "passed")
TRACE_COLUMNS = ("prompt_text", "tokens", "token_ranks", "token_surprisals")


class Values(Sequence[Any]):
    """An Arrow array as a sequence: ten million prompts' names are no Python objects until they are looked at."""

    def __init__(self, array: pa.Array) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Values: ...
    def __getitem__(self, index: int | slice) -> Any:
        return Values(self._array[index]) if isinstance(index, slice) else self._array[int(index)].as_py()

    def __contains__(self, value: object) -> bool:
        return self._array.null_count > 0 if value is None else super().__contains__(value)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """One file of scores. Columns are read when they are asked for."""

    path: Path
    names: Sequence[str]
    """Columns of the file."""
    metadata: dict[str, str]
    """What the scores belong to: model, data, settings."""
    metrics: dict[str, Metric]
    """The metrics whose numbers are there, by name."""
    group: str | None
    teacher: str | None
    domain: str | None
    correct: str | None
    plans: Path | None
    """The plans of a run's epochs."""

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        teacher: str | None = None,
        group: str | None = None,
        domain: str | None = None,
        correct: str | None = None,
    ) -> Scores:
        """Look into a scores file, or a run's folder. Columns that are not named are found by their usual names.

        Raises:
            ValueError: there is none, it is no Parquet file, or it holds no scores.
        """
        plans = None
        if path.is_dir():
            plans = path / "plans.parquet" if (path / "plans.parquet").exists() else None
            path = path / "scores.parquet"
        unfinished = path.with_name(path.name + ".parts")
        if not path.exists():
            cure = "Make one with `distill-sampler score DATA --model M --output scores.parquet`."
            if plans is not None or any(path.parent.glob("checkpoint-*")):
                cure = "A run leaves them when its training ends; until then, save_run(curriculum, FOLDER) writes them."
            if unfinished.exists():
                cure = "It is unfinished: run the same `distill-sampler score` again, and it goes on."
            raise ValueError(f"There is no scores file {path}. {cure}")
        try:
            schema = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is no Parquet file ({str(error).splitlines()[0]}).") from None
        names = schema.names
        metadata = {
            key.decode().removeprefix("distill_sampler."): value.decode(errors="replace")
            for key, value in (schema.metadata or {}).items()
            if key.startswith(b"distill_sampler.")
        }
        metrics = known_metrics(names, _listed(metadata.get("metrics", "")))
        if not metrics or "sample" not in names:
            raise ValueError(
                f"{path} holds no scores (its columns: {', '.join(names[:12])}). Give the file that `distill-sampler "
                "score` wrote, or the folder of a run."
            )
        try:
            columns: dict[str, str] = json.loads(metadata.get("columns", "{}"))
        except ValueError:
            columns = {}

        def find(said: str | None, told: str | None, usual: Sequence[str]) -> str | None:
            if said is not None and said not in names:
                raise ValueError(f"{path}: {unknown_name('column', said, names, 'in the scores')}")
            return next((name for name in (said, told, *usual) if name in names), None)

        return cls(
            path=path,
            names=names,
            metadata=metadata,
            metrics=metrics,
            group=find(group, columns.get("group"), GROUPS),
            teacher=find(teacher, columns.get("teacher"), TEACHERS),
            domain=find(domain, None, DOMAINS),
            correct=find(correct, None, VERDICTS),
            plans=plans,
        )

    def metric(self, name: str | None = None) -> Metric:
        """A metric by name; without one the Rank-Surprisal Ratio if any sample has it, else the first that one has.

        Raises:
            ValueError: it is not in the file.
        """
        if name is None:
            name = self._usual_metric
        if name not in self.metrics:
            raise ValueError(f"{self.path}: {unknown_name('metric', name, self.metrics, 'in the scores')}")
        return self.metrics[name]

    @cached_property
    def _usual_metric(self) -> str:
        names = sorted(self.metrics, key=lambda name: name != "rank_surprisal_ratio")
        known = (name for name in names if np.isfinite(self.read([name])[name].to_numpy().astype(float)).any())
        return next(known, names[0])

    @cached_property
    def epochs(self) -> list[int]:
        """The passes that are in the file; `[0]` for a file of one pass."""
        if "epoch" not in self.names:
            return [0]
        return sorted(pc.unique(pq.read_table(self.path, columns=["epoch"])["epoch"]).to_pylist())

    def read(self, names: Sequence[str], *, epoch: int | None = None) -> pa.Table:
        """Some columns as they were known for an epoch (None: the last): each sample's last score until then."""
        epoch = self.epochs[-1] if epoch is None else epoch
        if epoch not in self.epochs:
            raise ValueError(f"{self.path} has no epoch {epoch}; it has {', '.join(map(str, self.epochs))}.")
        if "epoch" not in self.names:
            return pq.read_table(self.path, columns=list(names))
        until = pc.less_equal(pc.field("epoch"), epoch)
        return pq.read_table(self.path, columns=list(names), filters=until).take(self._last[epoch])

    @cached_property
    def _last(self) -> dict[int, pa.Array]:
        """By epoch: where each sample's last score lies among the rows until then. A pass may score some again only."""
        table = pq.read_table(self.path, columns=["epoch", "sample"])
        epochs, samples = table["epoch"].to_numpy(), table["sample"].to_numpy()
        found = {}
        for epoch in self.epochs:
            until = samples[epochs <= epoch]
            _, from_behind = np.unique(until[::-1], return_index=True)
            found[epoch] = pa.array(len(until) - 1 - from_behind)
        return found

    def numbers(self, *, epoch: int | None = None) -> dict[str, FloatArray]:
        """Every number of every metric, `[samples]` each; NaN where there is none."""
        columns = dict.fromkeys(column for metric in self.metrics.values() for column in metric.columns)
        table = self.read(list(columns), epoch=epoch)
        return {name: np.asarray(table[name].to_numpy(), np.float32) for name in columns}

    def integers(self, name: str, *, epoch: int | None = None) -> IntArray | None:
        """A column of whole numbers; None if it is not there."""
        return np.asarray(self.read([name], epoch=epoch)[name].to_numpy(), np.int64) if name in self.names else None

    def hashes(self, *, epoch: int | None = None) -> HashArray:
        """`[samples]` what breaks ties: the content's hash, or the sample's number in a file without."""
        name = "content_hash" if "content_hash" in self.names else "sample"
        return np.asarray(self.read([name], epoch=epoch)[name].to_numpy()).astype(np.uint64)

    def column(self, name: str | None, *, epoch: int | None = None) -> Column | None:
        """A categorical column, dictionary-encoded; None if there is no such column or nothing in it."""
        if name is None or name not in self.names:
            return None
        encoded = self._encoded(name, epoch)
        if not any(value is not None for value in encoded.dictionary[:2].to_pylist()):
            return None
        return Column(codes=_codes(encoded), values=Values(encoded.dictionary))

    def codes(self, name: str | None, *, epoch: int | None = None) -> IntArray | None:
        """A categorical column's codes alone: millions of prompts need no names to be told apart."""
        return None if name is None or name not in self.names else _codes(self._encoded(name, epoch))

    def mixed_prompts(self, *, epoch: int | None = None) -> list[str]:
        """Names of groups whose responses answer different prompts: an id that was given twice."""
        groups = self.column(self.group, epoch=epoch)
        if groups is None or "prompt_hash" not in self.names:
            return []
        prompts = np.asarray(self.read(["prompt_hash"], epoch=epoch)["prompt_hash"].to_numpy())
        first = np.zeros(len(groups.values), np.uint64)
        first[groups.codes[::-1]] = prompts[::-1]  # what is written last stays: the first row's
        mixed = np.unique(groups.codes[first[groups.codes] != prompts])
        return [str(groups.values[code]) for code in mixed]

    def _encoded(self, name: str, epoch: int | None) -> pa.DictionaryArray:
        values = self.read([name], epoch=epoch)[name].combine_chunks()
        if isinstance(values, pa.ChunkedArray):
            values = pa.concat_arrays(values.chunks)
        return values.dictionary_encode(null_encoding="encode")

    @property
    def policies(self) -> list[str]:
        """Those of the run that the scores come from, as text; empty for a file without."""
        return _listed(self.metadata.get("policies", ""))

    def about(self) -> dict[str, Any]:
        """What a person wants to know of where the scores come from."""
        told = {name: self.metadata.get(name) for name in ("model", "revision", "lora", "dtype", "dataset")}
        about = {name: None if value in ("null", "") else value for name, value in told.items()}
        model = about["model"]
        if model and model.startswith((".", "/", "~")):  # a page is passed on: the folder's name says enough
            about["model"] = Path(model).name or model
        return about


def _listed(text: str) -> list[str]:
    """A list of strings that was written as JSON or as Python; empty if it is neither."""
    try:
        values = ast.literal_eval(text)  # reads a JSON list of strings as well
    except (ValueError, SyntaxError):
        return []
    return [str(value) for value in values] if isinstance(values, list) else []


def _codes(encoded: pa.DictionaryArray) -> IntArray:
    return np.asarray(encoded.indices.to_numpy(zero_copy_only=False), np.int64)
