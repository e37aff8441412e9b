"""What must stay fast with millions of samples gives what its slow definition gives."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest

from distill_sampler.artifacts.parts import Parts
from distill_sampler.artifacts.passes import PARTS, score_with_parts
from distill_sampler.dataset import ScoredDataset
from distill_sampler.distributed import Ranks
from distill_sampler.metrics.response import response_view
from distill_sampler.policies.keys import num_distinct, num_distinct_in, renumbered
from distill_sampler.reading.batching import WORTH_SHARING
from distill_sampler.reading.blocks import in_reading_order, units_of
from distill_sampler.reading.scored import Scored
from distill_sampler.types import IntArray


def prompts_and_responses(rng: np.random.Generator, num_rows: int) -> ScoredDataset:
    """Rows of twelve prompts of different lengths."""
    rows = []
    for _ in range(num_rows):
        number = int(rng.integers(12))
        prompt = [number] * (3 * number % 11 + 1)
        tokens = prompt + rng.integers(50, size=rng.integers(1, 30)).tolist()
        rows.append({"input_ids": tokens, "labels": [-100] * len(prompt) + tokens[len(prompt) :]})
    return ScoredDataset(datasets.Dataset.from_list(rows))


def units_by_definition(dataset: ScoredDataset, indices: IntArray, unit_tokens: int) -> IntArray:
    """One sample at a time."""
    members: dict[bytes, list[int]] = {}
    for place, sample in enumerate(dataset.samples(indices)):
        prompt = response_view(sample).shareable
        members.setdefault(prompt.tobytes(), []).append(place)
    lengths = dataset.lengths[indices]
    units = np.empty(len(indices), np.int64)
    last = -1
    for prompt, places in members.items():
        shares = (len(places) - 1) * (len(prompt) // 8) * WORTH_SHARING >= lengths[places].sum()
        before, piece = 0, -1
        for place in places:
            if before // unit_tokens != piece or not shares or len(places) == 1:
                last += 1
            units[place], piece = last, before // unit_tokens
            before += lengths[place]
    return units


@pytest.mark.parametrize("seed", range(6))
def test_units_and_reading_order_are_those_of_their_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    dataset = prompts_and_responses(rng, int(rng.integers(1, 120)))
    indices = rng.permutation(len(dataset))[: int(rng.integers(1, len(dataset) + 1))]
    for unit_tokens in (20, 64, 1000):
        units = units_by_definition(dataset, indices, unit_tokens)
        assert np.array_equal(units_of(dataset, indices, unit_tokens), units)
        lengths = dataset.lengths[indices]
        longest = [lengths[units == unit].max() for unit in units]
        order = sorted(range(len(indices)), key=lambda place: (-longest[place], units[place], -lengths[place], place))
        ordered, units_in_order = in_reading_order(dataset, indices, unit_tokens=unit_tokens)
        assert np.array_equal(ordered, indices[order])
        assert np.array_equal(units_in_order, units[order])


def test_a_prompts_hash_is_of_the_tokens_that_can_be_read_in_advance() -> None:
    dataset = prompts_and_responses(np.random.default_rng(0), 60)
    prompts = [response_view(sample).shareable for sample in dataset.samples(range(60))]
    assert dataset.prompt_lengths.tolist() == [len(prompt) for prompt in prompts]
    hashes = {prompt.tobytes(): value for prompt, value in zip(prompts, dataset.prompt_hash.tolist(), strict=True)}
    assert len(set(hashes.values())) == len(hashes)
    assert [hashes[prompt.tobytes()] for prompt in prompts] == dataset.prompt_hash.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_distinct_values_are_counted_as_numpy_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups, values = rng.integers(9, size=(2, 50))
    assert num_distinct(values) == len(np.unique(values))
    assert renumbered(values * 3 + 2).tolist() == np.unique(values, return_inverse=True)[1].tolist()
    of_group = [len(np.unique(values[groups == group])) for group in range(groups.max() + 1)]
    assert num_distinct_in(groups, values).tolist() == of_group


class InBlocks:
    """In place of a scorer: gives made-up scores, three samples at a time."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.read: list[int] = []

    def score(
        self, reader: Any, dataset: Any, metrics: Any, indices: IntArray, *, done: Any, kept: Any
    ) -> Iterator[Scored]:
        for block in np.split(indices[~done[indices]], range(3, len(indices), 3)):
            if self.stop_after is not None and len(self.read) >= self.stop_after:
                raise KeyboardInterrupt
            self.read += block.tolist()
            columns = {"score": block.astype(np.float32)}
            yield Scored(indices=block, columns=columns, missing={"score": block * 0}, tokens=0, tokens_of={})


def scores_of_a_pass(scorer: Any, folder: Path, num_samples: int) -> Sequence[float]:
    metric: Any = SimpleNamespace(name="score", columns=("score",))
    found = np.full(num_samples, np.nan)
    reader: Any = SimpleNamespace(ranks=Ranks())
    dataset: Any = range(num_samples)
    for scored in score_with_parts(
        scorer, reader, dataset, [metric], np.arange(num_samples), folder=folder, identity={"of": "this pass"}
    ):
        found[scored.indices] = scored.columns["score"]
    return found.tolist()


def test_a_long_pass_is_kept_in_few_parts_and_loses_little_to_an_interruption(tmp_path: Path) -> None:
    num_samples = 12 * PARTS + 5
    with pytest.raises(KeyboardInterrupt):
        scores_of_a_pass(InBlocks(stop_after=num_samples // 2), tmp_path / "parts", num_samples)
    rest = InBlocks()
    assert scores_of_a_pass(rest, tmp_path / "parts", num_samples) == list(range(num_samples))
    assert len(rest.read) <= num_samples // 2 + num_samples // PARTS
    parts = Parts(tmp_path / "parts")
    assert len(parts.paths()) <= PARTS + 1
    assert sorted(n for table in parts.tables() for n in table["sample"].to_pylist()) == list(range(num_samples))
