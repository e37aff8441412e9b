"""Scores at the edges: ranks at the clip, padded vocabularies, poisoned weights, repetition, every implementation."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from distill_sampler import ScoredDataset, Scorer
from tests import tiny
from tests.test_scorer import METRICS, assert_same, reference, rows, scores
from tests.test_token_stats import IMPLS


def poison(model: PreTrainedModel, token: int, value: float = float("nan")) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = value


def non_finite(model: PreTrainedModel, dataset: ScoredDataset, **scorer: Any) -> list[int]:
    passes = Scorer(progress=False, **scorer).score(model, dataset, METRICS, np.arange(len(dataset)))
    return sorted(index for scored in passes for index in scored.non_finite.tolist())


def test_ranks_count_up_to_the_clip_and_no_further() -> None:
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(-torch.arange(tiny.VOCAB) / 10.0)  # token v has rank v + 1, always
    tokens = [0, 1, 98, 99, 100, 101, tiny.VOCAB - 1]
    dataset = ScoredDataset([{"input_ids": [5, 6, token], "labels": [-100, -100, token]} for token in tokens])
    columns = scores(model, dataset)
    assert columns["mean_rank"].tolist() == [1, 2, 99, 100, 100, 100, 100]
    assert (np.diff(columns["mean_surprisal"]) > 0).all()  # surprisals are not clipped


def test_columns_beyond_the_tokenizers_count_as_in_the_models_own_softmax(dataset: ScoredDataset) -> None:
    padded = tiny.model(vocab_size=320)
    assert_same(scores(padded, dataset), reference(padded, dataset))
    with torch.no_grad():
        padded.lm_head.weight[tiny.VOCAB :] = 0
    narrow = tiny.model()
    narrow.load_state_dict({name: weight[: tiny.VOCAB] for name, weight in padded.state_dict().items()})
    assert (scores(padded, dataset)["mean_surprisal"] > scores(narrow, dataset)["mean_surprisal"]).all()


@pytest.mark.parametrize("impl", [*IMPLS, pytest.param("compiled", marks=pytest.mark.slow)])
def test_scores_do_not_depend_on_the_implementation(model: PreTrainedModel, dataset: ScoredDataset, impl: Any) -> None:
    assert_same(scores(model, dataset, impl=impl, batch_tokens=300), scores(model, dataset, impl="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_again_gives_the_same_bits_whatever_was_read_meanwhile(
    model: PreTrainedModel, dataset: ScoredDataset, dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    first = scores(model, dataset, batch_tokens=300)
    scores(model, rows((3, 400), (0, 7)))
    second = scores(model, dataset, batch_tokens=300)
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch_tokens", [300, 2048])
def test_a_poisoned_token_is_reported_for_the_samples_that_have_it_and_no_others(
    dataset: ScoredDataset, value: float, batch_tokens: int
) -> None:
    model = tiny.model()
    first, last = (set(dataset.sample(index).input_ids.tolist()) for index in (0, 17))
    token = min(last - first)
    poison(model, token, value)
    hit = [index for index in range(len(dataset)) if token in dataset.sample(index).input_ids]
    assert non_finite(model, dataset, batch_tokens=batch_tokens) == hit


@pytest.mark.parametrize("batch_tokens", [300, 2048])
def test_a_poisoned_token_that_nobody_has_harms_nobody(dataset: ScoredDataset, batch_tokens: int) -> None:
    for token in (0, tiny.VOCAB - 3):  # among them what padding might be made of
        model = tiny.model()
        poison(model, token)
        assert all(token not in dataset.sample(index).input_ids for index in range(len(dataset)))
        assert non_finite(model, dataset, batch_tokens=batch_tokens) == []


def test_one_nan_in_the_output_head_is_reported_for_every_sample(dataset: ScoredDataset) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    assert non_finite(model, dataset) == list(range(len(dataset)))
