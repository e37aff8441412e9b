"""Local Naturalness against one window at a time, and the settings that it refuses."""

import math
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_sampler import GlobalNaturalness, LocalNaturalness, ScoredDataset, Scorer
from distill_sampler.metrics.local_naturalness import response_steps
from distill_sampler.steps import by_pattern
from tests import tiny

PROMPT = [{"role": "user", "content": "Why?"}]
ANSWERS = [
    "It is so. Take one. Then add two! So three? Check it.\nFine. That is all of it, said they. The end.",
    "Only one step without any end",
    "Short. Two.",
    "We have $a. b$ here.\n```\nx = 1\n\ny = 2\n```\nNext: 3.14 is close. " * 3,
]


@pytest.fixture(scope="module")
def dataset(tokenizer: PreTrainedTokenizerBase) -> ScoredDataset:
    from datasets import Dataset

    rows = [{"prompt": PROMPT, "completion": [{"role": "assistant", "content": answer}]} for answer in ANSWERS]
    return ScoredDataset(tiny.tokenised(Dataset.from_list(rows), tokenizer), end_token_ids=[257])  # type: ignore[arg-type]


def scores(model: Any, dataset: ScoredDataset, metrics: list[Any], **scorer: Any) -> tuple[dict[str, Any], int]:
    columns = {name: np.full(len(dataset), np.nan) for metric in metrics for name in metric.columns}
    tokens = 0
    for scored in Scorer(progress=False, **scorer).score(model, dataset, metrics, np.arange(len(dataset))):
        tokens += scored.tokens
        for name, values in scored.columns.items():
            columns[name][scored.indices] = values
    return columns, tokens


def one_window_at_a_time(model: Any, dataset: ScoredDataset, metric: LocalNaturalness) -> list[float]:
    """For each step a forward of its own: the prompt, the steps before it that the window holds, the step."""
    means = []
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        steps = response_steps(metric, sample)
        prompt = sample.input_ids[: steps[0][0]].tolist()
        of_steps = []
        for number, (start, stop) in enumerate(steps):
            width = metric.window if isinstance(metric.window, int) else math.ceil(metric.window * number)
            before = [token for a, b in steps[max(0, number - width) : number] for token in sample.input_ids[a:b]]
            tokens = torch.tensor([*prompt, *before, *sample.input_ids[start:stop]])
            with torch.no_grad():
                log_probs = model(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
            places = range(len(tokens) - (stop - start), len(tokens))
            of_steps.append(np.mean([log_probs[place - 1, tokens[place]].item() for place in places][metric.skip :]))
        means.append(float(np.mean(of_steps)))
    return means


@pytest.mark.parametrize("window", [0, 1, 4, 0.25, 1000])
def test_it_equals_one_window_at_a_time(
    window: float, model: PreTrainedModel, dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    model.eval()
    metric = LocalNaturalness(window=window, tokenizer=tokenizer)
    columns, _ = scores(model, dataset, [metric])
    np.testing.assert_allclose(
        columns["local_naturalness"], one_window_at_a_time(model, dataset, metric), rtol=1e-5, atol=1e-5
    )
    assert columns["num_steps"][0] > 6
    assert columns["num_steps"][1] == 1


def test_without_the_first_token_of_a_step_it_is_aslec_drop(
    model: PreTrainedModel, dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    model.eval()
    metric = LocalNaturalness(skip=1, name="aslec_drop", tokenizer=tokenizer)
    columns, _ = scores(model, dataset, [metric, LocalNaturalness(tokenizer=tokenizer)])
    np.testing.assert_allclose(columns["aslec_drop"], one_window_at_a_time(model, dataset, metric), rtol=1e-5)
    assert not np.allclose(columns["aslec_drop"], columns["local_naturalness"])


def test_a_response_of_one_step_has_its_global_score(
    model: PreTrainedModel, dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    columns, _ = scores(model, dataset, [LocalNaturalness(tokenizer=tokenizer), GlobalNaturalness()])
    assert columns["local_naturalness"][1] == pytest.approx(columns["global_naturalness"][1], rel=1e-5)
    assert columns["local_naturalness"][0] != pytest.approx(columns["global_naturalness"][0], rel=1e-3)


def test_it_does_not_depend_on_the_batches(
    model: PreTrainedModel, dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    metric = LocalNaturalness(window=1, tokenizer=tokenizer)
    expected, _ = scores(model, dataset, [metric])
    for batch_tokens in (1, 100, 700):
        columns, _ = scores(model, dataset, [metric], batch_tokens=batch_tokens)
        np.testing.assert_allclose(columns["local_naturalness"], expected["local_naturalness"], rtol=1e-5)


def test_no_response_token_is_lost_and_none_counts_twice(
    dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    for window in (0, 1, 3, 0.5):
        metric = LocalNaturalness(window=window, tokenizer=tokenizer)
        for index in range(len(dataset)):
            sample = dataset.sample(index)
            scored = [view.input_ids[view.scored] for view in metric.views(sample)]
            assert np.concatenate(scored).tolist() == sample.input_ids[sample.scored].tolist()


def test_all_turns_of_a_conversation_are_split_and_keep_what_is_said_between(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    parts = [("<u>One?", False), ("First answer. Second part.", True), ("<u>Two?", False), ("Third bit. Fourth.", True)]
    ids = [tokenizer(text)["input_ids"] for text, _ in parts]
    labels = [part if kept else [-100] * len(part) for part, (_, kept) in zip(ids, parts, strict=True)]
    row = {"input_ids": [*chain(*ids)], "labels": [*chain(*labels)]}
    views = LocalNaturalness(window=0, tokenizer=tokenizer).views(ScoredDataset([row]).sample(0))
    read = [(tokenizer.decode(view.input_ids), tokenizer.decode(view.input_ids[view.scored])) for view in views]
    assert read == [
        ("<u>One?First answer.", "First answer."),
        ("<u>One? Second part.", " Second part."),
        ("<u>One?<u>Two?Third bit.", "Third bit."),
        ("<u>One?<u>Two? Fourth.", " Fourth."),
    ]


def test_a_trace_longer_than_the_models_context_is_scored(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny.model(max_position_embeddings=128)
    answer = tokenizer("So it goes on and on. " * 60)["input_ids"]
    dataset = ScoredDataset([{"input_ids": [1, 2, *answer], "labels": [-100, -100, *answer]}])
    metric = LocalNaturalness(tokenizer=tokenizer)
    assert max(len(view.input_ids) for view in metric.views(dataset.sample(0))) <= 128 < dataset.lengths[0]
    assert np.isfinite(scores(model, dataset, [metric])[0]["local_naturalness"]).all()


def test_the_first_steps_share_a_row() -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer("Prompt:" + "Step here. " * 7)["input_ids"]
    sample = ScoredDataset([{"input_ids": ids, "labels": [-100] * 7 + ids[7:]}]).sample(0)
    assert len(LocalNaturalness(window=4, tokenizer=tokenizer).views(sample)) == 1 + 7 - 5


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"window": -1}, "window=-1"),
        ({"window": 1.5}, "a fraction between 0 and 1"),
        ({"min_tokens": 0}, "1 <= min_tokens <= max_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "1 <= min_tokens <= max_tokens"),
        ({"skip": -1}, "skip=-1"),
    ],
)
def test_settings_that_describe_no_steps_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LocalNaturalness(**settings)


def test_a_missing_tokenizer_is_asked_for(dataset: ScoredDataset) -> None:
    with pytest.raises(ValueError, match=r"LocalNaturalness reads text, so it needs a tokenizer"):
        LocalNaturalness().views(dataset.sample(0))


def test_twenty_thousand_steps_are_laid_out_at_once() -> None:
    """Work grows with the number of steps, not with its square: each view is built from its own tokens."""
    tokenizer = tiny.tokenizer()
    ids = np.array(tokenizer("p:" + "ab\n" * 20_000)["input_ids"])
    sample = ScoredDataset([{"input_ids": ids, "labels": np.where(np.arange(len(ids)) < 2, -100, ids)}]).sample(0)
    views = LocalNaturalness(window=1, min_tokens=1, tokenizer=tokenizer).views(sample)
    assert len(views) == 20_000 - 1
    assert sum(len(view.input_ids) for view in views) < 10 * len(ids)


def test_its_configuration_reads_the_same_in_every_process(tokenizer: PreTrainedTokenizerBase) -> None:
    said = repr(LocalNaturalness(window=0.25, splitter=by_pattern(";"), tokenizer=tokenizer))
    assert "splitter=by_pattern(pattern=';')" in said
    assert "splitter=sentences" in repr(LocalNaturalness())
    assert "0x" not in said
