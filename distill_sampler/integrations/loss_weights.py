"""The weight of each sample in the loss, for any trainer and any loss over tokens.

A loss over tokens is a sum with one term for each position, and the term of a position depends on the model through
that position's logits alone. So multiplying the gradient of the logits at each position by the weight of its sample
gives the gradient of the weighted loss, normalised exactly as the host normalises it: by tokens, by batches, over
accumulation steps and processes. No computation of the host is repeated or replaced, and a batch whose weights are all
1 is left alone. A loss that does not depend on the logits, such as the balance loss of a mixture of experts, keeps its
weight. The loss that the host logs is the unweighted one, so it stays comparable between runs.

TRL's fused head computes no logits; there the gradient of `log_probs`, one number for each position, is multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill_sampler.objectives.places import weights_of_tokens
from distill_sampler.protocols import Tap
from distill_sampler.reading.structure import unwrap
from distill_sampler.types import Batch


class LossWeights(Tap):
    """Multiplies what each sample of a batch contributes to the gradient by the sample's weight."""

    def __init__(self) -> None:
        self._student: Any = None
        self._weights: Tensor | None = None
        self._applied = False

    @contextmanager
    def open(self, model: nn.Module, *, step: int) -> Iterator[None]:
        self._student = unwrap(model)
        head: nn.Module = self._student.get_output_embeddings()
        handles = [
            head.register_forward_hook(lambda module, args, output: self._weigh(output)),
            self._student.register_forward_hook(
                lambda module, args, output: self._weigh(getattr(output, "log_probs", None))
            ),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def before(self, batch: Batch) -> None:
        self._applied = False
        self._weights = None
        if (batch.weights == 1).all():
            return
        self._weights = weights_of_tokens(batch)

    def after(self, batch: Batch) -> None:
        """Check that the weights were applied.

        Raises:
            ValueError: the loss did not come through the logits.
        """
        expected, self._weights = self._weights is not None, None
        if expected and not self._applied:
            raise ValueError(
                "The policies give loss weights, but this trainer's loss does not depend on the logits of "
                f"{type(self._student).__name__}, so they cannot be applied (use_liger_kernel=True?). Use "
                "SampleBySoftmax instead of WeightBySoftmax: it draws samples in proportion to their weights."
            )

    def _weigh(self, output: Tensor | None) -> None:
        """Multiply the gradient of `[rows, length, vocab]` logits, or of `[rows, length - 1]` log-probabilities."""
        weights = self._weights
        if weights is None or output is None or not output.requires_grad or output.ndim < 2:
            return  # a single number is the loss of an objective, which applies the weights itself
        # the logits at position t predict token t + 1, so they take the weight of that token's sample
        by_position = torch.cat([weights[:, 1:], weights.new_ones(len(weights), 1)], 1)
        if output.ndim == 2:
            by_position = by_position[:, :-1]
        if output.shape[:2] != by_position.shape:
            raise ValueError(
                f"The policies give loss weights, but the student gives outputs for {tuple(output.shape[:2])} "
                f"positions where the batch has {tuple(by_position.shape)} (prompt tuning? logits_to_keep?), so it is "
                "not known which sample each one belongs to. Use SampleBySoftmax instead of WeightBySoftmax."
            )
        by_position = by_position.reshape(*by_position.shape, *[1] * (output.ndim - 2)).to(output.device)

        def multiply(gradient: Tensor) -> Tensor:
            self._applied = True
            return (gradient * by_position).to(gradient.dtype)

        output.register_hook(multiply)  # type: ignore[no-untyped-call]
