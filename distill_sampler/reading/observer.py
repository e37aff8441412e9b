"""Scores from the forward passes of training, which already compute the hidden states that scoring needs.

While a batch is trained on, the hidden states at scored positions go through the output head once more, without
gradients. They become the statistics that a scoring pass would give for the same weights: the same product, the same
kernel, the same metrics. The cost is that second product, a third of the head's share of a training step. (The host's
own logits are not used: a host that fuses head and loss has none.)

Two things differ from a scoring pass: dropout is on, and the batches are different, so the last bits of float32 sums
are rounded differently. Where more than that depends on the batch (LongRoPE), only those samples are observed whose
batch a scoring pass would treat in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from distill_sampler.dataset import ScoredDataset
from distill_sampler.protocols import Metric
from distill_sampler.reading.forward import reading
from distill_sampler.reading.head import LogitTransform, Project, Room, linear, module
from distill_sampler.reading.lengths import switches_at
from distill_sampler.reading.model_reader import ModelReader
from distill_sampler.reading.reduce import columns_of, data_columns_of, extras_of, reduced
from distill_sampler.reading.structure import autocast_dtype, decoder_of, forward_of, unwrap
from distill_sampler.reading.token_stats import chunk_for, fastest, token_stats
from distill_sampler.reading.transfers import Copies, moved
from distill_sampler.types import Batch, FloatArray, IntArray, Missing, Sample, TokenStats

Whole = Callable[[nn.Module], AbstractContextManager[tuple[Tensor, Tensor | None]]]
"""Gives weight and bias of a linear output head, gathered if they are sharded. Every process must enter it."""


ReadsAlong = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""What a teacher that has read the batch of training makes of its tokens. Takes the flat positions that predict them
and the tokens, `[tokens]` each, and gives their statistics as `token_stats` does."""


def not_observable(
    metrics: Sequence[Metric], samples: Sequence[Sample], teachers: Sequence[nn.Module] = ()
) -> list[str]:
    """Names of the metrics that read other sequences than the samples, or with readers that do not read along.

    Args:
        metrics: the metrics.
        samples: some samples.
        teachers: the models that read each batch of training beside the student.
    """
    return [
        metric.name
        for metric in metrics
        if not all(
            isinstance(reader, ModelReader) and any(reader.model is teacher for teacher in teachers)
            for reader in metric.readers.values()
        )
        or any(
            view.parts is not None or not np.array_equal(view.input_ids, sample.input_ids)
            for sample in samples
            for view in metric.views(sample) or ()
        )
    ]


class Observer:
    """Computes the scores of samples from the forward passes of training. Train inside its `with` statement.

    Args:
        model: the student as the host trains it.
        dataset: the samples.
        metrics: what to compute.
        ties: the tie rule of ranks, as in `Scorer`.
        whole: gathers the head's weights where the host shards them.
        along: by the id of its model, each teacher that reads for a metric, and reads a batch of training before the
            student does.

    Raises:
        ValueError: this student's hidden states cannot be observed, or its logits depend on more than them.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: ScoredDataset,
        metrics: Sequence[Metric],
        *,
        ties: Literal["strict", "mid"] = "strict",
        whole: Whole | None = None,
        along: Mapping[int, ReadsAlong] | None = None,
    ) -> None:
        self._student = unwrap(model)
        self._decoder: nn.Module = decoder_of(self._student)
        self._dataset = dataset
        self._metrics = metrics
        self._mid_ranks = ties == "mid"
        self._extras = extras_of(metrics)
        self._whole = whole or _not_sharded
        self._batch: Batch | None = None
        self._samples: list[Sample] = []
        self._stats: Copies | None = None
        self._along = dict(along or {})
        self._by_teachers: dict[int, Copies] = {}
        self._impl = fastest(next(model.parameters()).device, 0)
        self._chunk = chunk_for(self._student.config.get_text_config().vocab_size, impl=self._impl)
        self._transform = transform_of(model, purpose="observe=True")
        self._switches_at = switches_at(self._student)
        self._room = Room()
        self.losses: list[tuple[int, float, int]] = []
        """Of the batch that was taken last: each sample, the sum of its surprisals, and its number of tokens."""

    def __enter__(self) -> Observer:
        self._handle = self._decoder.register_forward_hook(self._see)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def expect(self, batch: Batch) -> None:
        """Announce the batch that the next forward pass reads."""
        self._batch = batch
        self._samples = self._dataset.samples(batch.samples, data_columns_of(self._metrics))
        self._stats = None

    def take(self) -> tuple[IntArray, dict[str, FloatArray], dict[str, IntArray]]:
        """The observed samples of the last batch, `[n]`, their numbers, `[n]` each, and by metric why one is missing.

        Raises:
            ValueError: no forward pass of the student read it.
        """
        batch, self._batch = self._batch, None
        assert batch is not None
        if self._stats is None:
            raise ValueError(
                f"observe=True takes scores from the hidden states of {type(self._decoder).__name__}, but training did "
                "not call it. Leave observe off for this model."
            )
        stats = self._as_arrays(self._stats)
        by_teachers = {model: self._as_arrays(of_model) for model, of_model in self._by_teachers.items()}
        self._stats, self._by_teachers = None, {}
        names = columns_of(self._metrics)
        rows = {name: np.full(len(batch.samples), np.nan, np.float32) for name in names}
        missing = {metric.name: np.zeros(len(batch.samples), np.int64) for metric in self._metrics}
        stop = 0
        self.losses = []
        for row, sample in enumerate(self._samples):
            start, stop = stop, stop + int(sample.scored.sum())
            loss = float(stats["surprisal"][start:stop].sum(dtype=np.float64))
            self.losses.append((sample.index, loss, stop - start))
            for metric in self._metrics:
                views = metric.views(sample)
                if views is None:
                    missing[metric.name][row] = Missing.NOT_APPLICABLE
                    continue
                assert all(np.array_equal(view.input_ids, sample.input_ids) for view in views)
                of_views = []
                for view in views:
                    reader: Any = metric.readers.get(view.reader)
                    of_model = stats if reader is None else by_teachers[id(reader.model)]
                    wanted = view.scored[sample.scored]
                    of_views.append(TokenStats(**{name: of_model[name][start:stop][wanted] for name in of_model}))
                numbers, missing[metric.name][row] = reduced(metric, sample, of_views)
                for name, number in zip(metric.columns, numbers, strict=True):
                    rows[name][row] = number
        # the length that the model sees includes padding, except where one row holds several samples
        longest = batch.shape[-1] if len(batch.samples) == batch.shape[0] else batch.lengths.max()
        alike = (batch.lengths > self._switches_at) == (longest > self._switches_at)
        return (
            batch.samples[alike],
            {name: values[alike] for name, values in rows.items()},
            {name: codes[alike] for name, codes in missing.items()},
        )

    @torch.no_grad()
    def _see(self, decoder: nn.Module, args: Any, output: Any) -> None:
        if self._batch is None or self._stats is not None:  # not training, or a second forward of the same batch
            return
        hidden: Tensor = output[0]
        # the state at position t predicts token t + 1
        places = np.concatenate(
            [
                start + np.flatnonzero(sample.scored) - 1
                for start, sample in zip(self._batch.starts, self._samples, strict=True)
            ]
        )
        targets = np.concatenate([sample.input_ids[sample.scored] for sample in self._samples])
        at, tokens = moved(places, hidden.device), moved(targets, hidden.device)
        states = hidden.flatten(0, 1)[at]
        operands = autocast_dtype(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False), self._project(operands) as project:
            stats = token_stats(states, tokens, project, extras=self._extras, chunk=self._chunk, impl=self._impl)
        self._stats = Copies(stats)
        self._by_teachers = {model: Copies(reads(at, tokens)) for model, reads in self._along.items()}

    def _as_arrays(self, stats: Copies) -> dict[str, Any]:
        arrays = stats.arrays()
        if self._mid_ranks:
            arrays["rank"] = arrays["rank"] + arrays["ties"] / 2
        return arrays

    @contextmanager
    def _project(self, operands: torch.dtype | None) -> Iterator[Project]:
        head: nn.Module = self._student.get_output_embeddings()
        if type(head) is not nn.Linear:  # quantised, with an adapter on it, ...
            yield module(head, self._transform)
            return
        with self._whole(head) as (weight, bias):
            yield linear(weight, bias, self._transform, operands=operands, room=self._room)


def transform_of(model: nn.Module, *, purpose: str) -> LogitTransform:
    """What the model does to its logits after the head, after a check that the head reads the decoder's hidden states.

    Args:
        model: the model as training calls it.
        purpose: the argument that needs it, for the error message.

    Raises:
        ValueError: the logits are not the head's product with the hidden states, scaled or soft-capped.
    """
    student = unwrap(model)
    decoder: nn.Module = decoder_of(student)
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
                f"{purpose} needs logits that are the product of the decoder's hidden states and the output head, "
                f"which {type(student).__name__} does not have. Leave it out for this model."
            )
        return forward.transform


def _not_sharded(head: nn.Module) -> AbstractContextManager[tuple[Tensor, Tensor | None]]:
    return nullcontext((head.weight, head.bias))  # type: ignore[arg-type]
