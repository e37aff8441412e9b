"""Scoring samples: samples → views → statistics → numbers.

Samples are scored in blocks, the longest first. Of each block every process reads its own share, and the numbers of the
whole block reach every process. Which views a reader takes into one batch is its own business (`model_reader.py`), how
statistics become numbers is the metrics'.

A sample whose view is longer than its reader's positions has no score by that metric, and the pass goes on. A metric
that approximates another one is first compared with it on a few samples.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from distill_sampler.correlation import spearman
from distill_sampler.dataset import ScoredDataset
from distill_sampler.distributed import Ranks
from distill_sampler.field_docs import documents_fields
from distill_sampler.metrics.response import response_view
from distill_sampler.protocols import Metric, PassInfo, Read, Reader
from distill_sampler.reading.blocks import blocks_of, units_of
from distill_sampler.reading.desk import Desk
from distill_sampler.reading.model_reader import ModelReader
from distill_sampler.reading.readings import Readings
from distill_sampler.reading.reduce import columns_of, data_columns_of, extras_of, reduced
from distill_sampler.reading.scored import Scored
from distill_sampler.reading.token_stats import Impl
from distill_sampler.types import BoolArray, FloatArray, IntArray, Missing

logger = logging.getLogger(__name__)

_EXAMPLES = 64
"""Samples that a reader is shown before a pass: the shortest ones."""


@documents_fields
@dataclass(frozen=True, kw_only=True)
class Scorer:
    """How the student reads the samples."""

    batch_tokens: int | None = None
    """Tokens in a batch, padding included; a longer sample gets a batch of its own. None: 2048 on a CPU, else a power
    of two that fits in half of the free memory. Halved when memory runs out (with one process)."""
    ties: Literal["strict", "mid"] = "strict"
    """How other tokens with exactly the same logit count in a rank: not at all, as in the authors' code, or half each,
    which is unbiased. Matters where logits are rounded to bfloat16: there one token in ten is tied."""
    share_prompts: bool = True
    """Read the prompt that several candidates have in common once, where that pays and gives the same numbers."""
    impl: Literal["auto"] | Impl = "auto"
    """How logits become statistics (see `token_stats`). Auto: Triton on CUDA where it is installed, else compiled for
    passes that are long enough for compilation to pay."""
    progress: bool = True
    """Show a bar with tokens a second and the remaining time once a pass takes longer than two seconds, and a table of
    each epoch's plan in the trainer's output."""

    def __post_init__(self) -> None:
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(
                f"Scorer(batch_tokens={self.batch_tokens}): give a positive number of tokens, such as 8192."
            )
        for argument, value, known in (
            ("ties", self.ties, ("strict", "mid")),
            ("impl", self.impl, ("auto", *get_args(Impl))),
        ):
            if value not in known:
                raise ValueError(f"Scorer({argument}={value!r}): choose one of {', '.join(map(repr, known))}.")

    def reader(self, model: nn.Module) -> ModelReader:
        """The student as a reader with these settings. Keep it from pass to pass: it remembers what it has tried.

        Raises:
            ValueError: the model is no causal language model, or has no output head.
        """
        return ModelReader(
            model,
            frozen=False,
            batch_tokens=self.batch_tokens,
            ties=self.ties,
            share_prompts=self.share_prompts,
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
        """Score samples, longest first, and give them out in blocks as they are done.

        Args:
            student: the model as the host calls it, a causal language model of transformers, or a reader of it.
            dataset: where the samples are.
            metrics: what to compute; equal views of several metrics share one forward pass.
            indices: `[n]` which samples, in any order. With several processes each must ask for the same; the work is
                shared and every process gets all numbers.
            done: `[samples of the data set]` True where an interrupted pass has given numbers already. Blocks that are
                all done are left out; the others are what they were.
            kept: what frozen readers gave in earlier passes; completed by this one.
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
            if exact is not None and metric.name not in reader.said:
                reader.said.add(metric.name)
                self._compare(reader, dataset, metric, exact, indices)
        block_tokens = reader.block_tokens
        units = np.arange(len(indices))
        if reader.shares_prompts:
            units = units_of(dataset, indices, block_tokens // ranks.world_size)
        # the unit with the longest sample first, and in each unit the longest first
        longest = np.zeros(units.max() + 1, np.int64)
        np.maximum.at(longest, units, dataset.lengths[indices])
        order = np.lexsort((-dataset.lengths[indices], units, -longest[units]))
        indices, units = indices[order], units[order]
        bar = tqdm(
            total=int(dataset.lengths[indices].sum()),
            desc="Scoring",
            unit="tok",
            unit_scale=True,
            leave=False,
            delay=2,
            dynamic_ncols=True,
            disable=not self.progress or ranks.rank > 0,
        )
        with bar, ExitStack() as opened:
            work = _Pass(
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
        """What, besides the weights, decides the scores beyond rounding; see `ModelReader.numerics`."""
        return self.reader(model).numerics

    def _compare(
        self, reader: ModelReader, dataset: ScoredDataset, metric: Metric, exact: Metric, indices: IntArray
    ) -> None:
        """Report how an approximation orders samples that both metrics score: up to 64, or an eighth of all."""
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
                "%r is an approximation: on %d samples its rank correlation with the exact score is %.3f, at %.0f %% "
                "of the tokens.",
                metric,
                pair.shape[1],
                spearman(*pair),
                100 * tokens[0] / tokens[1],
            )


@dataclass(kw_only=True, eq=False)
class _Pass:
    """One pass over samples: what stays the same from block to block, and what is found out on the way."""

    student: ModelReader
    dataset: ScoredDataset
    metrics: Sequence[Metric]
    bar: Any
    kept: Readings
    traces: frozenset[int]
    opened: ExitStack
    info: PassInfo
    too_long: list[tuple[int, str]] = field(default_factory=list)
    """Samples with a view longer than its reader's positions, and the metric that asked for it."""
    scale: float = 1.0
    """What the bar moves by for each token of a view that is read."""
    _read: dict[str, Read] = field(default_factory=dict)
    """The readers that are open, by identity."""

    @property
    def ranks(self) -> Ranks:
        return self.student.ranks

    def score(self, block: IntArray, units: IntArray) -> Scored:
        """Read some samples: their views, each once, in batches; then every metric's numbers.

        Args:
            block: which samples.
            units: `[samples]` the number of each sample's unit; the samples of a unit are read by one process.
        """
        unit = np.unique(units, return_inverse=True)[1]
        tokens_of_unit = np.bincount(unit, self.dataset.lengths[block]).astype(np.int64)
        share = np.flatnonzero(np.isin(unit, self.ranks.share(tokens_of_unit)))
        samples = self.dataset.samples(block[share], data_columns_of(self.metrics))
        desk = Desk(self.student, self.metrics, kept=self.kept, statistics=self.info.statistics)
        wanted = [[desk.ask(metric, sample) for metric in self.metrics] for sample in samples]
        traced = [desk.ask_whole(sample) if sample.index in self.traces else None for sample in samples]
        self.scale = int(self.dataset.lengths[block].sum()) / max(desk.tokens, 1)
        desk.read(self.open)

        # one row for each sample of the block; a row is filled by the process that read the sample, zero elsewhere
        names = columns_of(self.metrics)
        place = {name: number for number, name in enumerate(names)}
        columns = np.zeros((len(block), len(names)))
        tokens_of, missing = np.zeros((2, len(block), len(self.metrics)))
        tokens_of_all = np.zeros((len(block), 1))
        for row, sample, asked, trace in zip(share.tolist(), samples, wanted, traced, strict=True):
            columns[row] = np.nan
            for number, (metric, places) in enumerate(zip(self.metrics, asked, strict=True)):
                if isinstance(places, Missing):
                    missing[row, number] = places
                    continue
                numbers, missing[row, number] = reduced(metric, sample, [desk.stats[at] for at in places])
                columns[row, [place[name] for name in metric.columns]] = numbers
                tokens_of[row, number] = sum(desk.cost(at) for at in set(places))
            used = {at for places in asked if not isinstance(places, Missing) for at in places}
            tokens_of_all[row] = sum(desk.cost(at) for at in used | ({trace} if trace else set()))
        every = self.ranks.elementwise_sum(np.concatenate([columns, tokens_of, missing, tokens_of_all], axis=1))
        columns, tokens_of, missing, tokens_of_all = np.split(
            every, np.cumsum([len(names), len(self.metrics), len(self.metrics)]), axis=1
        )
        codes = {metric.name: missing[:, number].astype(np.int64) for number, metric in enumerate(self.metrics)}
        for name, of_metric in codes.items():
            self.too_long += [(index, name) for index in block[of_metric == Missing.TOO_LONG].tolist()]
        here = {s.index: desk.stats[at] for s, at in zip(samples, traced, strict=True) if at is not None}
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
        """Say once what was not read, and what to do about it."""
        if not self.too_long or self.ranks.rank > 0 or "too long" in self.student.said:
            return
        self.student.said.add("too long")
        samples = {index for index, _ in self.too_long}
        names = ", ".join(dict.fromkeys(name for _, name in self.too_long))
        logger.warning(
            "%d samples (first: sample %d) have no %s, because it takes more tokens at once than the %s that the model "
            "has positions for. Cut the samples (max_length of the trainer), or score them with LocalNaturalness, "
            "which reads a few steps at a time; if the model can read farther, raise max_position_embeddings in its "
            "config.",
            len(samples),
            min(samples),
            names,
            self.student.positions,
        )
