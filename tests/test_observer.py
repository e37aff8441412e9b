"""The observer against a scoring pass, forward by forward, without a trainer."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from distill_sampler import ScoredDataset, Scorer
from distill_sampler.reading.observer import Observer
from distill_sampler.types import Batch
from tests.test_architectures import longrope
from tests.test_scorer import METRICS, rows, scores


def batch_of(dataset: ScoredDataset, *samples: int) -> Batch:
    """Padded on the right to the longest."""
    lengths = dataset.lengths[list(samples)]
    return Batch(
        samples=np.array(samples),
        weights=np.ones(len(samples)),
        starts=np.arange(len(samples)) * lengths.max(),
        lengths=lengths,
        shape=(len(samples), int(lengths.max())),
        place=0,
        epoch=0,
        step=0,
    )


def observed(model: Any, dataset: ScoredDataset, *samples: int) -> tuple[list[int], dict[str, Any]]:
    """Which samples were observed in one forward pass that reads these, and their numbers."""
    batch = batch_of(dataset, *samples)
    input_ids = torch.zeros(batch.shape, dtype=torch.long)
    for row, sample in enumerate(samples):
        input_ids[row, : batch.lengths[row]] = torch.from_numpy(dataset.sample(sample).input_ids)
    with Observer(model, dataset, METRICS) as observer:
        observer.expect(batch)
        model(input_ids=input_ids)
        seen, columns, _ = observer.take()
    return seen.tolist(), columns


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_observed_is_what_is_scored_to_the_last_digits(
    model: PreTrainedModel, dataset: ScoredDataset, autocast: bool
) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scored = scores(model, dataset, indices=[4], share_prompts=False)
        seen, columns = observed(model, dataset, 4)
    assert seen == [4]
    for name, values in columns.items():
        np.testing.assert_allclose(values, scored[name][[4]], rtol=1e-6)


def test_where_the_batch_decides_only_samples_that_are_read_alike_are_observed() -> None:
    model = longrope()  # other rotations for batches of more than 60 tokens
    dataset = rows((30, 10), (30, 40), (35, 15), (30, 45))
    expected: dict[int, float] = {}
    for scored in Scorer(progress=False).score(model, dataset, METRICS, np.arange(4)):
        expected |= dict(zip(scored.indices.tolist(), scored.columns["mean_surprisal"].tolist(), strict=True))
    for samples, alike in (((0, 2), [0, 2]), ((0, 1, 2, 3), [1, 3]), ((1, 3), [1, 3])):
        seen, columns = observed(model, dataset, *samples)
        assert seen == alike
        np.testing.assert_allclose(columns["mean_surprisal"], [expected[sample] for sample in alike], rtol=1e-5)
