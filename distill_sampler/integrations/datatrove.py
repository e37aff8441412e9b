"""datatrove: a step of a pipeline that scores documents, for its local, Slurm, Ray and HF Jobs executors.

    LocalPipelineExecutor([
        JsonlReader("candidates/", text_key="response"),
        StudentScores("HuggingFaceTB/SmolLM2-135M-Instruct", "scores/"),
    ], tasks=64, logging_dir="logs/").run()

Each task writes one file of scores; `distill-sampler merge scores/` joins them. A task that was killed continues where
it stopped, and finished tasks are skipped by datatrove.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger
from rich.console import Console

from distill_sampler.artifacts.score_output import ScoreOutput
from distill_sampler.distributed import Ranks
from distill_sampler.integrations.rows import METRICS, RowScorer, in_python, intake_of, metrics_of
from distill_sampler.integrations.student import RowOptions, Student
from distill_sampler.protocols import Metric
from distill_sampler.reading.reduce import columns_of
from distill_sampler.sources.files import GivenRows


def row_of(document: Document) -> dict[str, Any]:
    """A document as a row: its metadata, and its text as the response, as a text, or, if it is a list, as messages."""
    return {**document.metadata, "text" if isinstance(document.text, str) else "messages": document.text}


class StudentScores(PipelineStep):  # type: ignore[misc]
    """Scores documents with a student, and passes them on with their scores in `metadata`.

    Args:
        model: the student: a folder, or its name on the hub.
        output: folder for the tasks' files, `00003.parquet` and so on, which all tasks can write.
        metrics: what to score, as for `score_rows`.
        row: turns a document into a row as `score_rows` takes it, with one response.
        options: the fields of `RowOptions`.

    Raises:
        ValueError: an option cannot be used.
    """

    name = "🎓 Student scores"
    type = "🎓 - SCORER"

    def __init__(
        self,
        model: str,
        output: str | Path,
        *,
        metrics: Sequence[Metric] | str = METRICS,
        row: Callable[[Document], Mapping[str, Any]] = row_of,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model = model
        self.output = Path(output)
        self.row = row
        with in_python():
            self.metrics = metrics_of(metrics)
            self.options = RowOptions(**options)

    def run(self, data: Iterator[Document] | None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Score the documents of one task.

        Raises:
            ValueError: a document cannot be used, or its row holds several responses.
        """
        waiting: deque[Document] = deque()

        def rows() -> Iterator[dict[str, Any]]:
            for document in data or ():
                waiting.append(document)
                yield {**self.row(document), "id": document.id}

        stream = rows()
        first = next(stream, None)
        if first is None:  # datatrove has more tasks than files
            return
        with in_python():
            self.output.mkdir(parents=True, exist_ok=True)
            say = Console(file=_Log(), soft_wrap=True)  # type: ignore[arg-type]
            student = Student(self.model, None, self.options)
            sources = GivenRows(itertools.chain([first], stream), name=f"the documents of task {rank}")
            path, alone = self.output / f"{rank:05d}.parquet", Ranks.current(student.device)
            job = RowScorer(student, self.metrics, self.options, say=say).job(
                intake_of(sources, self.metrics, self.options, say=say, kept="The scores so far are kept."),
                lambda origin: ScoreOutput(path, origin, overwrite=False, ranks=alone, recheck=True),
            )
            for table in job.tables():
                for number, row in enumerate(table.select(["id", *columns_of(self.metrics)]).to_pylist()):
                    yield from self._scored(row, waiting, number)
        yield from waiting  # documents at the end that could not be used

    def _scored(self, row: dict[str, Any], waiting: deque[Document], number: int) -> Iterator[Document]:
        """The documents up to the one that a row of scores belongs to. Those before it could not be used."""
        name = row.pop("id")
        while waiting:
            document = waiting.popleft()
            if document.id == name:
                document.metadata |= {key: value if np.isfinite(value) else None for key, value in row.items()}
                self.stat_update("scored")
                self.update_doc_stats(document)
                yield document
                return
            self.stat_update("left_out")
            yield document
        raise ValueError(f"Document {name} holds several responses. Give each a document of its own, or change row=.")


class _Log:
    """Writes to the task's log."""

    def write(self, text: str) -> None:
        if text.strip():
            logger.info("{}", text.strip())

    def flush(self) -> None:
        """The log is written at once."""
