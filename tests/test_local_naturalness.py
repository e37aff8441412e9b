"""Local Naturalness against one window at a time, and the settings that it refuses."""

import math
import re
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from distill_sampler import (
    AslecDrop,
    GlobalNaturalness,
    LocalNaturalness,
    RankSurprisalRatio,
    ResponseLength,
    ScoredDataset,
    Scorer,
)
from distill_sampler.metrics.steps import by_pattern
from distill_sampler.metrics.windows import _STEPS
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


def one_window_at_a_time(model: Any, dataset: ScoredDataset, metric: Any) -> list[float]:
    """For each step a forward of its own: the prompt, the steps before it that the window holds, the step."""
    means = []
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        steps = metric.steps(sample)
        prompt = sample.input_ids[: steps[0][0]].tolist()
        of_steps = []
        for number, (start, stop) in enumerate(steps):
            width = metric.window if isinstance(metric.window, int) else math.ceil(metric.window * number)
            before = [token for a, b in steps[max(0, number - width) : number] for token in sample.input_ids[a:b]]
            tokens = torch.tensor([*prompt, *before, *sample.input_ids[start:stop]])
            with torch.no_grad():
                log_probs = model(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
            places = range(len(tokens) - (stop - start), len(tokens))
            of_steps.append(
                np.mean([log_probs[place - 1, tokens[place]].item() for place in places][getattr(metric, "skip", 0) :])
            )
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
    metric = AslecDrop(tokenizer=tokenizer)
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


def rows(tokenizer: PreTrainedTokenizerBase, *texts: tuple[str, str]) -> ScoredDataset:
    """Prompts and responses, without a template."""
    pairs = [(tokenizer(prompt)["input_ids"], tokenizer(response)["input_ids"]) for prompt, response in texts]
    return ScoredDataset([{"input_ids": [*a, *b], "labels": [-100] * len(a) + b} for a, b in pairs])


LONG = "".join(f"Step {number} of it. " for number in range(20))


def gpt2(positions: int) -> PreTrainedModel:
    """Positions are learned: one more than there are is an error inside the model."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=tiny.VOCAB, n_positions=positions, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
    )


@pytest.mark.parametrize("build", [gpt2, lambda positions: tiny.model(max_position_embeddings=positions)])
def test_a_trace_longer_than_the_models_context_is_scored_where_global_scores_have_none(
    build: Any, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(128).eval()
    dataset = rows(tokenizer, ("Why?", LONG), ("Why?", "Short. And good."), ("Why? " * 40, LONG))
    local, everywhere = LocalNaturalness(window=2, tokenizer=tokenizer), GlobalNaturalness()
    scorer = Scorer(progress=False)
    (scored,), _again = (list(scorer.score(model, dataset, [local, everywhere], np.arange(3))) for _ in range(2))
    columns = {name: values[np.argsort(scored.indices)] for name, values in scored.columns.items()}
    assert np.isfinite(columns["local_naturalness"]).tolist() == [True, True, False]  # a prompt longer than the context
    assert np.isfinite(columns["global_naturalness"]).tolist() == [False, True, False]
    assert sorted(scored.too_long.tolist()) == [0, 2]
    assert len(scored.non_finite) == 0
    assert "2 samples (first: sample 0) have no local_naturalness, global_naturalness" in caplog.text
    assert caplog.text.count("than the 128 positions of the model") == 1  # not in every pass
    np.testing.assert_allclose(
        columns["local_naturalness"][:2],
        one_window_at_a_time(model, rows(tokenizer, ("Why?", LONG), ("Why?", "Short. And good.")), local),
        rtol=1e-5,
    )


def test_the_views_of_one_sample_share_its_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.eval()
    dataset = rows(tokenizer, ("A prompt that takes more than a few tokens. " * 3, LONG))
    metric = LocalNaturalness(window=1, tokenizer=tokenizer)
    shared, read = scores(model, dataset, [metric], batch_tokens=400)
    alone, read_alone = scores(model, dataset, [metric], batch_tokens=400, share_prompts=False)
    prompt, num_views = int(dataset.sample(0).scored.argmax()), len(metric.views(dataset.sample(0)))
    assert read_alone - read == (num_views - 1) * (prompt - 1)
    for columns in (shared, alone):
        expected = one_window_at_a_time(model, dataset, metric)
        np.testing.assert_allclose(columns["local_naturalness"], expected, rtol=1e-5)


def test_more_steps_in_a_row_read_less_and_say_how_close_they_come(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["one", "two", "so it is", "then", "add them", "wait", "no", "yes it holds"]
    draw = np.random.default_rng(0).choice
    dataset = rows(
        tokenizer, *[("Why?", " ".join(f"{draw(words)} {draw(words)}." for _ in range(12))) for _ in range(40)]
    )
    exact = LocalNaturalness(window=1, tokenizer=tokenizer)
    metric = LocalNaturalness(window=1, stride=2, tokenizer=tokenizer)
    assert exact.approximates is None
    assert metric.approximates == LocalNaturalness(window=1, name="local_naturalness_exact")
    scorer = Scorer(progress=False)
    done = [
        *scorer.score(model, dataset, [metric], np.arange(40)),
        *scorer.score(model, dataset, [metric], np.arange(5)),
    ]
    assert caplog.text.count("is an approximation") == 1
    said = re.search(r"On 16 samples, its rank correlation .* is (0\.\d+), for (\d+) % of", caplog.text)
    assert said
    assert 0.5 < float(said[1]) < 1
    columns, tokens = scores(model, dataset, [exact])
    read = sum(scored.tokens for scored in done[:-1])
    assert read < 0.8 * tokens
    assert int(said[2]) == pytest.approx(100 * read / tokens, abs=5)
    assert not np.allclose(done[0].columns["local_naturalness"], columns["local_naturalness"][done[0].indices])


def test_a_stride_keeps_every_token_and_at_least_its_window(tokenizer: PreTrainedTokenizerBase) -> None:
    sample = rows(tokenizer, ("Why?", LONG)).sample(0)
    for stride in (1, 2, 3, 100):
        metric = LocalNaturalness(window=2, stride=stride, tokenizer=tokenizer)
        views = metric.views(sample)
        scored = np.concatenate([view.input_ids[view.scored] for view in views])
        assert scored.tolist() == sample.input_ids[sample.scored].tolist()
        assert len(views) == 1 + math.ceil((len(metric.steps(sample)) - 3) / stride)


def test_variants_share_their_views_and_say_what_each_cost(
    model: PreTrainedModel, dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    metrics: list[Any] = [LocalNaturalness(tokenizer=tokenizer), AslecDrop(tokenizer=tokenizer), ResponseLength()]
    (scored,) = Scorer(progress=False).score(model, dataset, metrics, np.arange(len(dataset)))
    of = scored.tokens_of
    assert of == {"local_naturalness": scored.tokens, "aslec_drop": scored.tokens, "response_length": 0}
    # views of their own: what they cost adds up, the prompt that all share in parts
    metrics = [LocalNaturalness(window=1, tokenizer=tokenizer), RankSurprisalRatio()]
    (scored,) = Scorer(progress=False, batch_tokens=400).score(model, dataset, metrics, np.array([0, 3]))
    assert sum(scored.tokens_of.values()) == pytest.approx(scored.tokens, abs=1)
    assert min(scored.tokens_of.values()) > 0


def test_the_first_steps_share_a_view() -> None:
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
        ({"stride": 0}, "stride=0"),
    ],
)
def test_settings_that_describe_no_steps_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LocalNaturalness(**settings)


def test_a_missing_tokenizer_is_refused_with_the_cure(dataset: ScoredDataset) -> None:
    with pytest.raises(ValueError, match=r"LocalNaturalness\(tokenizer="):
        LocalNaturalness().views(dataset.sample(0))


def test_twenty_thousand_steps_are_laid_out_at_once() -> None:
    """Work grows with the number of steps, not with its square: each view is built from its own tokens."""
    tokenizer = tiny.tokenizer()
    ids = np.array(tokenizer("p:" + "ab\n" * 20_000)["input_ids"])
    sample = ScoredDataset([{"input_ids": ids, "labels": np.where(np.arange(len(ids)) < 2, -100, ids)}]).sample(0)
    views = LocalNaturalness(window=1, min_tokens=1, tokenizer=tokenizer).views(sample)
    assert len(views) == 20_000 - 1
    assert sum(len(view.input_ids) for view in views) < 10 * len(ids)


def test_twenty_thousand_steps_are_scored(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny.model(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=2)
    dataset = rows(tokenizer, ("p:", "ab\n" * 20_000))
    columns, tokens = scores(model, dataset, [LocalNaturalness(window=1, min_tokens=1, tokenizer=tokenizer)])
    assert columns["num_steps"][0] == 20_000
    assert np.isfinite(columns["local_naturalness"]).all()
    assert tokens < 3 * dataset.lengths[0]


@pytest.mark.parametrize(
    "response",
    [
        "```\nx = 1.\n\ny = 2.\n```",
        "\n\n\n",
        " ",
        "?",
        "😀",
        "<|im_start|>",
    ],
)
def test_a_response_of_code_of_space_or_of_one_token_has_its_global_score(
    response: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    dataset = rows(tokenizer, ("Why?", response))
    columns, _ = scores(model, dataset, [LocalNaturalness(tokenizer=tokenizer), GlobalNaturalness()])
    np.testing.assert_allclose(columns["local_naturalness"], columns["global_naturalness"], rtol=1e-5)


class WithoutOffsets:
    """All that is asked of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.decode, self.batch_decode = tokenizer.decode, tokenizer.batch_decode


def test_a_tokenizer_only_has_to_decode(
    model: PreTrainedModel, dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    plain, _ = scores(model, dataset, [LocalNaturalness(tokenizer=WithoutOffsets(tokenizer))])
    expected, _ = scores(model, dataset, [LocalNaturalness(tokenizer=tokenizer)])
    assert np.array_equal(plain["local_naturalness"], expected["local_naturalness"])


def test_a_splitter_that_gives_spans_is_named_with_the_sample(
    dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    metric = LocalNaturalness(splitter=lambda text: [(0, 9), (5, 99)], tokenizer=tokenizer)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"LocalNaturalness, sample 2: The splitter returned \[\(0, 9\), \(5, 99\)\]"):
        metric.views(dataset.sample(2))


def test_steps_are_kept_only_as_long_as_their_sample(
    dataset: ScoredDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    metric = LocalNaturalness(tokenizer=tokenizer)
    sample = dataset.sample(0)
    metric.views(sample)
    assert sample in _STEPS
    kept = len(_STEPS)
    del sample
    assert len(_STEPS) == kept - 1


def test_its_configuration_reads_the_same_in_every_process(tokenizer: PreTrainedTokenizerBase) -> None:
    said = repr(LocalNaturalness(window=0.25, splitter=by_pattern(";"), tokenizer=tokenizer))
    assert "splitter=by_pattern(pattern=';')" in said
    assert "splitter=sentences" in repr(LocalNaturalness())
    assert "0x" not in said
