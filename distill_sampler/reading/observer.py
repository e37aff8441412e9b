"""Scores for free: the forward of a training step already holds what scoring needs.

While a batch is trained on, the hidden states that its loss is computed from pass by. Those at scored positions go
through the output head once more, without gradients, and become the statistics that a scoring pass would have given
for the same weights: the same product, the same kernel, the same metrics. What it costs is that product, a third of
the head's share of the forward pass in a training step; where the host fuses head and loss, there are no logits to
take it from.

Two things are other than in a scoring pass: dropout is on, and the batch is another, so float32 sums are rounded
otherwise in their last bits. Where more than that depends on the batch (LongRoPE), only samples that a scoring pass
would read alike are observed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from distill_sampler.dataset import ScoredDataset
from distill_sampler.reading.forward import autocast_dtype, forward_of, reading, unwrap
from distill_sampler.reading.lengths import switches_at
from distill_sampler.reading.reduce import columns_of, data_columns_of, extras_of, reduced
from distill_sampler.reading.token_stats import LogitTransform, Project, Room, chunk_for, linear, module, token_stats
from distill_sampler.types import Batch, FloatArray, IntArray, Metric, Missing, Sample, TokenStats

Whole = Callable[[nn.Module], AbstractContextManager[tuple[Tensor, Tensor | None]]]
"""Weight and bias of a linear output head, gathered if they are sharded. Every process enters it."""


def not_observable(metrics: Sequence[Metric], samples: Sequence[Sample]) -> list[str]:
    """Names of the metrics that need other sequences than the samples themselves, or other readers than the student."""
    return [
        metric.name
        for metric in metrics
        if metric.readers
        or any(
            not np.array_equal(view.input_ids, sample.input_ids)
            for sample in samples
            for view in metric.views(sample) or ()
        )
    ]


class Observer:
    """Takes the scores of samples out of the forwards of training. Use it in a `with` statement while training.

    Args:
        model: the student as the host trains it.
        dataset: where the samples are.
        metrics: what to compute.
        ties: the tie rule of ranks, as in `Scorer`.
        whole: gives the head's weights where the host shards them.

    Raises:
        ValueError: this student's hidden states cannot be seen, or are not what its logits are made from.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: ScoredDataset,
        metrics: Sequence[Metric],
        *,
        ties: Literal["strict", "mid"] = "strict",
        whole: Whole | None = None,
    ) -> None:
        self._student = unwrap(model)
        self._decoder: nn.Module = self._student.get_decoder()
        self._dataset = dataset
        self._metrics = metrics
        self._mid_ranks = ties == "mid"
        self._extras = extras_of(metrics)
        self._whole = whole or _as_they_are
        self._batch: Batch | None = None
        self._samples: list[Sample] = []
        self._stats: dict[str, Tensor] | None = None
        self._chunk = chunk_for(self._student.config.get_text_config().vocab_size)
        self._transform = _transform_of(model, self._student, self._decoder)
        self._switches_at = switches_at(self._student)
        self._room = Room()

    def __enter__(self) -> Observer:
        self._handle = self._decoder.register_forward_hook(self._see)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def expect(self, batch: Batch) -> None:
        """The next forward reads this batch."""
        self._batch = batch
        self._samples = self._dataset.samples(batch.samples, data_columns_of(self._metrics))
        self._stats = None

    def take(self) -> tuple[IntArray, dict[str, FloatArray], dict[str, IntArray]]:
        """The samples of the batch that was read, `[n]`, their numbers, `[n]` each, and by metric why there is none.

        Raises:
            ValueError: no forward pass of the student read it.
        """
        batch, self._batch = self._batch, None
        assert batch is not None
        if self._stats is None:
            raise ValueError(
                f"observe=True: training did not run {type(self._decoder).__name__}, where hidden states are observed. "
                "Leave observe off for this model."
            )
        stats: dict[str, Any] = {name: values.cpu().numpy() for name, values in self._stats.items()}
        self._stats = None
        if self._mid_ranks:
            stats["rank"] = stats["rank"] + stats["ties"] / 2
        names = columns_of(self._metrics)
        rows = {name: np.full(len(batch.samples), np.nan, np.float32) for name in names}
        missing = {metric.name: np.zeros(len(batch.samples), np.int64) for metric in self._metrics}
        stop = 0
        for row, sample in enumerate(self._samples):
            start, stop = stop, stop + int(sample.scored.sum())
            own = {name: values[start:stop] for name, values in stats.items()}
            for metric in self._metrics:
                views = metric.views(sample)
                if views is None:
                    missing[metric.name][row] = Missing.NOT_APPLICABLE
                    continue
                assert all(np.array_equal(view.input_ids, sample.input_ids) for view in views)
                wanted = [view.scored[sample.scored] for view in views]
                of_views = [TokenStats(**{name: own[name][which] for name in own}) for which in wanted]
                numbers, missing[metric.name][row] = reduced(metric, sample, of_views)
                for name, number in zip(metric.columns, numbers, strict=True):
                    rows[name][row] = number
        # padding counts, except in a row of several samples
        longest = batch.shape[-1] if len(batch.samples) == batch.shape[0] else batch.lengths.max()
        alike = (batch.lengths > self._switches_at) == (longest > self._switches_at)
        return (
            batch.samples[alike],
            {name: values[alike] for name, values in rows.items()},
            {name: codes[alike] for name, codes in missing.items()},
        )

    @torch.no_grad()
    def _see(self, decoder: nn.Module, args: Any, output: Any) -> None:
        if self._batch is None or self._stats is not None:  # not training, or a host's second look at the same batch
            return
        hidden: Tensor = output[0]
        # the state at place t predicts token t + 1
        places = np.concatenate(
            [
                start + np.flatnonzero(sample.scored) - 1
                for start, sample in zip(self._batch.starts, self._samples, strict=True)
            ]
        )
        targets = np.concatenate([sample.input_ids[sample.scored] for sample in self._samples])
        states = hidden.flatten(0, 1)[torch.from_numpy(places).to(hidden.device)]
        operands = autocast_dtype(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False), self._project(operands) as project:
            self._stats = token_stats(
                states,
                torch.from_numpy(targets).to(hidden.device),
                project,
                extras=self._extras,
                chunk=self._chunk,
            )

    @contextmanager
    def _project(self, operands: torch.dtype | None) -> Iterator[Project]:
        head: nn.Module = self._student.get_output_embeddings()
        if type(head) is not nn.Linear:  # quantised, with an adapter on it, ...
            yield module(head, self._transform)
            return
        with self._whole(head) as (weight, bias):
            yield linear(weight, bias, self._transform, operands=operands, room=self._room)


def _transform_of(model: nn.Module, student: Any, decoder: nn.Module) -> LogitTransform:
    """What happens between the decoder's hidden states and the logits, made sure of by looking.

    Raises:
        ValueError: it is not "output head, then a scale or a soft cap".
    """
    seen: dict[str, Tensor] = {}

    def head_sees(hidden: Tensor) -> Tensor:
        seen["head"] = hidden.detach()
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    def decoder_gives(decoder: nn.Module, args: Any, output: Any) -> None:
        seen["decoder"] = output[0].detach()

    with reading(model) as forward:
        handle = decoder.register_forward_hook(decoder_gives)
        try:
            with forward_of(student.get_output_embeddings(), head_sees):
                model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=forward.device), use_cache=False)
        finally:
            handle.remove()
        same = "decoder" in seen and seen["decoder"].shape == seen["head"].shape and not forward.lead
        if forward.transform is None or not same or not torch.equal(seen["decoder"], seen["head"]):
            raise ValueError(
                f"observe=True: the logits of {type(student).__name__} are not made from its decoder's hidden states "
                "by its output head alone, so they cannot be followed in training. Leave observe off for this model."
            )
        return forward.transform


def _as_they_are(head: nn.Module) -> AbstractContextManager[tuple[Tensor, Tensor | None]]:
    return nullcontext((head.weight, head.bias))  # type: ignore[arg-type]
