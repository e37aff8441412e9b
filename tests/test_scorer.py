"""Running the student: scores equal full logits whatever the batches, and training does not notice."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3MoeConfig,
)

from distill_sampler import GlobalNaturalness, RankSurprisalRatio, ScoredDataset, Scorer
from distill_sampler.scorer import token_batches, unwrap
from tests import tiny

METRICS = [RankSurprisalRatio(), GlobalNaturalness()]


@pytest.fixture(scope="module")
def dataset(tokenizer: PreTrainedTokenizerBase) -> ScoredDataset:
    return ScoredDataset(tiny.tokenised(tiny.candidates(), tokenizer), end_token_ids=[257])


def scores(
    model: torch.nn.Module, dataset: ScoredDataset, indices: Any = None, **scorer: Any
) -> dict[str, np.ndarray[Any, Any]]:
    columns = {name: np.full(len(dataset), np.nan) for metric in METRICS for name in metric.columns}
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    for scored in Scorer(progress=False, **scorer).score(model, dataset, METRICS, indices):
        for name, values in scored.columns.items():
            columns[name][scored.indices] = values
    return columns


def reference(model: torch.nn.Module, dataset: ScoredDataset) -> dict[str, list[float]]:
    """One sample at a time, all logits, the formulas of the paper."""
    columns: dict[str, list[float]] = {"mean_rank": [], "mean_surprisal": [], "rank_surprisal_ratio": []}
    model.eval()
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        tokens = torch.from_numpy(sample.input_ids)
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, :-1].double()
        target = logits.gather(1, tokens[1:, None])
        kept = torch.from_numpy(sample.scored[1:])
        surprisal = -logits.log_softmax(1).gather(1, tokens[1:, None])[:, 0][kept]
        rank = (1 + (logits > target).sum(1)).clamp(max=100)[kept].double()
        columns["mean_rank"].append(rank.mean().item())
        columns["mean_surprisal"].append(surprisal.mean().item())
        columns["rank_surprisal_ratio"].append((rank.sum() / surprisal.sum()).item())
    return columns


def assert_same(left: Mapping[str, Any], right: Mapping[str, Any], rtol: float = 1e-5) -> None:
    for name in left.keys() & right.keys():
        np.testing.assert_allclose(left[name], right[name], rtol=rtol, atol=1e-6, err_msg=name)


def test_scores_equal_full_logits_one_sample_at_a_time(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    assert_same(scores(model, dataset), reference(model, dataset))


def test_global_naturalness_is_minus_the_mean_surprisal(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    columns = scores(model, dataset)
    np.testing.assert_allclose(columns["global_naturalness"], -columns["mean_surprisal"], rtol=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 150, 500, 100_000])
def test_scores_do_not_depend_on_padding_or_batch_size(
    model: PreTrainedModel, dataset: ScoredDataset, batch_tokens: int
) -> None:
    assert_same(scores(model, dataset, batch_tokens=batch_tokens), scores(model, dataset, batch_tokens=64))


def test_scores_do_not_depend_on_order_or_on_what_else_is_scored(
    model: PreTrainedModel, dataset: ScoredDataset
) -> None:
    everything = scores(model, dataset)
    assert_same(scores(model, dataset, indices=np.arange(len(dataset))[::-1]), everything)
    alone = scores(model, dataset, indices=[4])
    assert alone["mean_rank"][4] == pytest.approx(everything["mean_rank"][4])
    assert np.isnan(np.delete(alone["mean_rank"], 4)).all()


def test_scoring_twice_gives_the_same_bits(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    first, second = scores(model, dataset), scores(model, dataset)
    assert all(np.array_equal(first[name], second[name]) for name in first)


ARCHITECTURES = {
    "gemma2 soft cap": Gemma2Config(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.3, sliding_window=64,
    ),
    "cohere logit scale": CohereConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logit_scale=0.0625, initializer_range=0.5,
    ),
    "granite logits scaling": GraniteConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=3.0, initializer_range=0.3,
    ),
    "qwen2": Qwen2Config(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    ),
    "qwen3 moe": Qwen3MoeConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        initializer_range=0.3,
    ),
    "gpt2": GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
    "gpt-neox": GPTNeoXConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_scores_as_its_own_logits(name: str, dataset: ScoredDataset) -> None:
    torch.manual_seed(0)
    config = ARCHITECTURES[name]
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 257
    model = AutoModelForCausalLM.from_config(config)
    assert_same(scores(model, dataset, batch_tokens=400), reference(model, dataset), rtol=1e-4)


def test_an_unknown_change_of_logits_falls_back_to_the_models_own(
    model: PreTrainedModel, dataset: ScoredDataset, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.sign() * output.logits.abs().sqrt()
            return output

    model.__class__ = Odd
    assert_same(scores(model, dataset), reference(model, dataset))
    assert "full logits" in caplog.text


def test_a_lora_student_is_scored_with_its_adapter(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    peft = pytest.importorskip("peft", reason="the extra 'demo' is not installed")
    plain = scores(model, dataset)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    assert_same(scores(adapted, dataset), reference(adapted, dataset))
    assert not np.allclose(scores(adapted, dataset)["mean_surprisal"], plain["mean_surprisal"])


def test_scoring_leaves_no_trace_in_training(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    model.config.attention_dropout = 0.5
    model.train()
    model.model.layers[0].eval()  # a part that the user froze
    loss = model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()
    modes = {name: part.training for name, part in model.named_modules()}
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    random_state = torch.get_rng_state()
    scores(model, dataset)
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    assert all(torch.equal(dict(model.named_parameters())[name].grad, grad) for name, grad in grads.items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    assert "forward" not in vars(model.lm_head)


def test_a_failure_in_the_middle_leaves_no_trace_either(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    model.train()
    calls = iter(range(3))

    def failing(module: Any, args: Any) -> None:
        if next(calls, None) is None:
            raise RuntimeError("out of memory")

    model.model.register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        scores(model, dataset, batch_tokens=100)
    assert model.training
    assert "forward" not in vars(model.lm_head)


def test_dropout_is_off_while_scoring(dataset: ScoredDataset) -> None:
    assert_same(scores(tiny.model(attention_dropout=0.9).train(), dataset), scores(tiny.model().eval(), dataset))


def test_samples_with_non_finite_logits_are_named_and_have_no_score(dataset: ScoredDataset) -> None:
    model = tiny.model()
    poisoned = int(dataset.sample(7).input_ids[20])
    with torch.no_grad():
        model.model.embed_tokens.weight[poisoned] = float("nan")
    hit = [index for index in range(len(dataset)) if poisoned in dataset.sample(index).input_ids]
    named: list[int] = []
    for scored in Scorer(progress=False).score(model, dataset, METRICS, np.arange(len(dataset))):
        named.extend(scored.non_finite.tolist())
        for place, index in enumerate(scored.indices.tolist()):
            finite = [np.isfinite(values[place]) for values in scored.columns.values()]
            assert finite == [index not in hit] * len(finite)
    assert sorted(named) == hit
    assert 7 in hit


def test_equal_views_of_two_metrics_share_one_forward(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    seen = sum(scored.tokens for scored in Scorer(progress=False).score(model, dataset, METRICS, np.arange(4)))
    assert seen == dataset.lengths[:4].sum()


def test_batches_hold_at_most_their_tokens_and_every_place_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 200)
    batches = list(token_batches(lengths, 512))
    assert sorted(chain(*batches)) == list(range(200))
    assert all(len(batch) * lengths[batch].max() <= 512 for batch in batches)
    assert [lengths[batch].max() for batch in batches] == sorted(
        (lengths[batch].max() for batch in batches), reverse=True
    )
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded / lengths.sum() < 1.05


def test_what_is_no_causal_language_model_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear is not a causal language model"):
        unwrap(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        unwrap(AutoModel.from_config(tiny.model().config))
