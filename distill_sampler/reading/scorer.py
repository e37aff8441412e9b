"""Scoring samples: samples → views → statistics → numbers.

Samples are scored in blocks, the longest first. Each process reads a share of every block, and every process gets the
numbers of the whole block. The reader decides which views form a batch (`model_reader.py`), and the metrics decide how
statistics become numbers.

If a view is longer than its reader's positions, the sample has no score by that metric, and the pass continues. A
metric that approximates another one is first compared with it on a few samples.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from distill_sampler.correlation import spearman
from distill_sampler.dataset import ScoredDataset
from distill_sampler.distributed import Ranks
from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.response import response_view
from distill_sampler.progress import progress_of
from distill_sampler.protocols import Metric, PassInfo, Read, Reader
from distill_sampler.reading.block_views import BlockViews
from distill_sampler.reading.blocks import blocks_of, in_reading_order
from distill_sampler.reading.model_reader import ModelReader
from distill_sampler.reading.readings import Readings
from distill_sampler.reading.reduce import columns_of, data_columns_of, extras_of, reduced
from distill_sampler.reading.scored import Scored
from distill_sampler.reading.token_stats import Impl
from distill_sampler.types import BoolArray, FloatArray, IntArray, Missing, is_whole
from distill_sampler.watch import Watch, watch

logger = logging.getLogger(__name__)

_EXAMPLES = 64
"""How many samples a reader is shown before a pass: the shortest ones."""


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Scorer:
    """How the student reads the samples."""

    batch_tokens: int | None = None
    """Tokens in a batch, padding included; a longer sample gets a batch of its own. None: 1024 on a CPU, else
    16384, or less where that does not fit in half of the free memory. Halved when memory runs out (with one
    process)."""
    ties: Literal["strict", "mid"] = "strict"
    """How other tokens with exactly the same logit count in a rank. `"strict"`: not at all, as in the authors' code.
    `"mid"`: half each, which is unbiased. It matters where logits are rounded to bfloat16: there one token in ten is
    tied."""
    share_prompts: bool = True
    """Read a prompt that several candidates share only once, where that saves time and gives the same numbers."""
    compile_layers: bool = False
    """Run the student's layers through `torch.compile` (10 to 30 seconds, once). It rounds differently, as another
    dtype does, so scores with and without are not mixed, and prompts are read with every candidate. For small students
    on an accelerator and passes of many millions of tokens. Where layers cannot be compiled, a warning says why,
    or an error if that shows only when they run."""
    impl: Literal["auto"] | Impl = "auto"
    """How logits become statistics (see `token_stats`). `"auto"`: Triton on CUDA where it is installed; otherwise
    compiled, for passes long enough to make up for the compilation."""
    progress: bool = True
    """Show a progress bar with tokens a second and the remaining time when a pass takes longer than two seconds, and
    print a table of each epoch's plan."""

    def __post_init__(self) -> None:
        if self.batch_tokens is not None and (not is_whole(self.batch_tokens) or self.batch_tokens < 1):
            raise ValueError(
                f"Scorer(batch_tokens={self.batch_tokens!r}): give a positive number of tokens, such as 8192."
            )
        for argument, value, known in (
            ("ties", self.ties, ("strict", "mid")),
            ("impl", self.impl, ("auto", *get_args(Impl))),
        ):
            if value not in known:
                raise ValueError(f"Scorer({argument}={value!r}): choose one of {', '.join(map(repr, known))}.")

    def reader(self, model: nn.Module) -> ModelReader:
        """The student as a reader with these settings. Use the same reader for every pass: it remembers its trials.

        Raises:
            ValueError: the model is not a causal language model, or has no output head.
        """
        return ModelReader(
            model,
            frozen=False,
            batch_tokens=self.batch_tokens,
            ties=self.ties,
            share_prompts=self.share_prompts,
            compile_layers=self.compile_layers,
            impl=self.impl,
        )

    def score(
        self,
        student: nn.Module | ModelReader,
        dataset: ScoredDataset,
        metrics: Sequence[Metric],
        indices: IntArray,
        *,
        done: BoolArray | None = None,
        kept: Readings | None = None,
        traces: Collection[int] = (),
    ) -> Iterator[Scored]:
        """Score samples, the longest first, and yield each block when it is done.

        Args:
            student: the model as the host calls it, a causal language model of transformers; or a reader of it.
            dataset: the samples.
            metrics: what to compute; equal views of several metrics share one forward pass.
            indices: `[n]` which samples, in any order. All processes must give the same; they share the work, and every
                process gets all numbers.
            done: `[samples of the data set]` True where an interrupted pass has the numbers already. Blocks in which
                all samples are done are skipped; the division into blocks does not change.
            kept: the statistics that frozen readers gave in earlier passes. New ones are added.
            traces: samples whose token statistics are wanted too.

        Raises:
            ValueError: the model has no output head to score with, or a metric breaks its contract.
        """
        if len(indices) == 0:
            return
        reader = student if isinstance(student, ModelReader) else self.reader(student)
        ranks = reader.ranks
        for metric in metrics:
            exact = metric.approximates
            if exact is not None and metric.name not in reader.reported:
                reader.reported.add(metric.name)
                self._compare(reader, dataset, metric, exact, indices)
        block_tokens = reader.block_tokens
        unit_tokens = block_tokens // ranks.world_size if reader.shares_prompts else None
        indices, units = in_reading_order(dataset, indices, unit_tokens=unit_tokens)
        bar = progress_of(
            "Scoring",
            total=int(dataset.lengths[indices].sum()),
            disable=not self.progress or ranks.rank > 0,
        )
        with bar, watch(ranks) as watching, ExitStack() as opened:
            work = _Pass(
                watching=watching,
                student=reader,
                dataset=dataset,
                metrics=metrics,
                bar=bar,
                kept=kept if kept is not None else Readings(),
                traces=frozenset(traces),
                opened=opened,
                info=PassInfo(
                    statistics=extras_of(metrics),
                    tokens=int(dataset.num_scored[indices].sum()),
                    examples=[response_view(sample) for sample in reversed(dataset.samples(indices[-_EXAMPLES:]))],
                ),
            )
            for block in blocks_of(dataset.lengths[indices], units, block_tokens):
                if done is not None and done[indices[block]].all():
                    bar.update(int(dataset.lengths[indices[block]].sum()))
                    continue
                yield work.score(indices[block], units[block])
        work.report_too_long()

    def numerics(self, model: nn.Module) -> dict[str, str]:
        """The settings besides the weights that change the scores; see `ModelReader.numerics`."""
        return self.reader(model).numerics

    def _compare(
        self, reader: ModelReader, dataset: ScoredDataset, metric: Metric, exact: Metric, indices: IntArray
    ) -> None:
        """Log how well an approximation ranks samples, compared with the exact metric, on 16 to 64 of the samples."""
        some = np.unique(np.linspace(0, len(indices) - 1, min(64, max(16, len(indices) // 8))).astype(int))
        pairs: list[FloatArray] = []
        tokens = np.zeros(2)
        for scored in self.score(reader, dataset, [metric, exact], np.sort(indices)[some]):
            pairs.append(np.stack([scored.columns[metric.name], scored.columns[exact.name]]))
            tokens += [scored.tokens_of[metric.name], scored.tokens_of[exact.name]]
        pair = np.concatenate(pairs, axis=1)
        pair = pair[:, np.isfinite(pair).all(axis=0)]
        if reader.ranks.rank == 0 and pair.shape[1] > 2:
            logger.warning(
                "%r is an approximation. On %d samples, its rank correlation with the exact score is %.3f, for %.0f %% "
                "of the tokens.",
                metric,
                pair.shape[1],
                spearman(*pair),
                100 * tokens[0] / tokens[1],
            )


@dataclass(kw_only=True, eq=False)
class _Pass:
    """One pass over samples: its settings, its open readers, and what it must report at the end."""

    watching: Watch | None
    student: ModelReader
    dataset: ScoredDataset
    metrics: Sequence[Metric]
    bar: Any
    kept: Readings
    traces: frozenset[int]
    opened: ExitStack
    info: PassInfo
    too_long: list[tuple[int, str]] = field(default_factory=list)
    """Samples with a view longer than its reader's positions, each with the metric whose view it is."""
    scale: float = 1.0
    """How far the progress bar moves for each token of a view that is read."""
    _read: dict[str, Read] = field(default_factory=dict)
    """The readers that are open, by identity."""

    @property
    def ranks(self) -> Ranks:
        return self.student.ranks

    def score(self, block: IntArray, units: IntArray) -> Scored:
        """Score the samples of a block: read each of their views once, then compute every metric's numbers.

        Args:
            block: `[samples]` the samples' indices.
            units: `[samples]` the unit of each sample; one process reads all samples of a unit.
        """
        if self.watching is not None:
            self.watching.begin_block()
        unit = np.unique(units, return_inverse=True)[1]
        tokens_of_unit = np.bincount(unit, self.dataset.lengths[block]).astype(np.int64)
        share = np.flatnonzero(np.isin(unit, self.ranks.share(tokens_of_unit)))
        samples = self.dataset.samples(block[share], data_columns_of(self.metrics))
        views = BlockViews(self.student, self.metrics, kept=self.kept, statistics=self.info.statistics)
        wanted = [[views.add(metric, sample) for metric in self.metrics] for sample in samples]
        traced = [views.add_whole(sample) if sample.index in self.traces else None for sample in samples]
        self.scale = int(self.dataset.lengths[block].sum()) / max(views.tokens, 1)
        views.read(self.open)

        # one row for each sample of the block, filled by the process that read the sample and zero on the others
        names = columns_of(self.metrics)
        place = {name: number for number, name in enumerate(names)}
        columns = np.zeros((len(block), len(names)))
        tokens_of, missing = np.zeros((2, len(block), len(self.metrics)))
        tokens_of_all = np.zeros((len(block), 1))
        for row, sample, of_metrics, trace in zip(share.tolist(), samples, wanted, traced, strict=True):
            columns[row] = np.nan
            for number, (metric, places) in enumerate(zip(self.metrics, of_metrics, strict=True)):
                if isinstance(places, Missing):
                    missing[row, number] = places
                    continue
                numbers, missing[row, number] = reduced(metric, sample, [views.stats[at] for at in places])
                columns[row, [place[name] for name in metric.columns]] = numbers
                tokens_of[row, number] = sum(views.cost(at) for at in set(places))
            used = {at for places in of_metrics if not isinstance(places, Missing) for at in places}
            tokens_of_all[row] = sum(views.cost(at) for at in used | ({trace} if trace else set()))
        if self.watching is not None:
            self.watching.end_block()
        every = self.ranks.elementwise_sum(np.concatenate([columns, tokens_of, missing, tokens_of_all], axis=1))
        columns, tokens_of, missing, tokens_of_all = np.split(
            every, np.cumsum([len(names), len(self.metrics), len(self.metrics)]), axis=1
        )
        codes = {metric.name: missing[:, number].astype(np.int64) for number, metric in enumerate(self.metrics)}
        for name, of_metric in codes.items():
            self.too_long += [(index, name) for index in block[of_metric == Missing.TOO_LONG].tolist()]
        here = {s.index: views.stats[at] for s, at in zip(samples, traced, strict=True) if at is not None}
        return Scored(
            indices=block,
            columns={name: columns[:, number].astype(np.float32) for number, name in enumerate(names)},
            missing=codes,
            tokens=round(tokens_of_all.sum()),
            tokens_of={
                metric.name: round(total)
                for metric, total in zip(self.metrics, tokens_of.sum(axis=0).tolist(), strict=True)
            },
            traces={index: stats for some in self.ranks.gather(here) for index, stats in some.items()}
            if self.traces
            else {},
        )

    def open(self, reader: Reader) -> Read:
        """The function that reads with this reader. Every process opens the same readers in the same order."""
        if reader.identity not in self._read:
            info = replace(self.info, progress=lambda tokens: self.bar.update(self.scale * tokens))
            self._read[reader.identity] = self.opened.enter_context(reader.open(info))
        return self._read[reader.identity]

    def report_too_long(self) -> None:
        """Log, once for each model, which samples were too long, and the cure."""
        if not self.too_long or self.ranks.rank > 0 or "too long" in self.student.reported:
            return
        self.student.reported.add("too long")
        samples = {index for index, _ in self.too_long}
        names = ", ".join(dict.fromkeys(name for _, name in self.too_long))
        logger.warning(
            "%d samples (first: sample %d) have no %s, because it reads more tokens at once than the %s positions of "
            "the model. Truncate the samples (the trainer's max_length), or score them with LocalNaturalness, which "
            "reads a few steps at a time. If the model can read longer texts, raise max_position_embeddings in its "
            "config.",
            len(samples),
            min(samples),
            names,
            self.student.positions,
        )
