"""The contract with transformers: every causal language model is scored as its own full float32 logits would be.

Two layers, random weights, logits that are far from uniform; candidates of several prompts, so that prompts are
shared where the model allows it. An architecture is added with a line.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from distill_sampler import ScoredDataset, Scorer
from distill_sampler.reading.forward import reading
from distill_sampler.types import View
from tests import tiny
from tests.test_scorer import assert_same, reference, scores

DENSE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**DENSE, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 8}
MOE = {**WIDE, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "llama tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**WIDE),
    "qwen3 moe": Qwen3MoeConfig(**MOE),
    "mistral": MistralConfig(**GROUPED, sliding_window=20),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4, sliding_window=None),
    "gemma2": Gemma2Config(**WIDE, final_logit_softcapping=2.0, sliding_window=20),
    "gemma3": Gemma3TextConfig(**WIDE, sliding_window=20),
    "granite": GraniteConfig(**GROUPED, logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5),
    "cohere": CohereConfig(**GROUPED, logit_scale=0.0625),
    "cohere2": Cohere2Config(**WIDE, logit_scale=0.25, sliding_window=20),
    "phi3": Phi3Config(**GROUPED),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "olmo2": Olmo2Config(**GROUPED),
    "gpt-neox": GPTNeoXConfig(**DENSE),
    "falcon": FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "smollm3": SmolLM3Config(**GROUPED),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4),
    "mamba, which has no keys": MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4),
}
ALONE = {"mamba, which has no keys"}


@pytest.fixture(scope="module")
def dataset(tokenizer: PreTrainedTokenizerBase) -> ScoredDataset:
    return ScoredDataset(tiny.tokenised(tiny.candidates(2), tokenizer), end_token_ids=[257])


def build(config: PreTrainedConfig) -> PreTrainedModel:
    config.vocab_size = tiny.VOCAB
    config.initializer_range = 0.3
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 257
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_scores_as_its_own_logits(name: str, dataset: ScoredDataset) -> None:
    model = build(ARCHITECTURES[name])
    expected = reference(model, dataset)
    assert_same(scores(model, dataset, batch_tokens=400), expected, rtol=1e-4)  # so little that sharing prompts pays
    assert_same(scores(model, dataset, share_prompts=False), expected, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prompts_are_shared_where_that_is_exact(name: str, dataset: ScoredDataset) -> None:
    model = build(ARCHITECTURES[name])
    samples = [dataset.sample(index) for index in (0, 5)]
    views = [View(input_ids=sample.input_ids, scored=sample.scored) for sample in samples]
    with reading(model) as forward:
        assert forward.can_share(views, [int(sample.scored.argmax()) - 1 for sample in samples]) == (name not in ALONE)


# ---- What hosts and adapters make of a model ----


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="the extra 'demo' is not installed")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["on the attention", "on the head", "with the head trained beside it"],
)
def test_an_adapter_is_scored(
    peft: Any, settings: dict[str, Any], model: PreTrainedModel, dataset: ScoredDataset
) -> None:
    plain = scores(model, dataset)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **settings))
    if "modules_to_save" in settings:
        with torch.no_grad():
            adapted.get_output_embeddings().weight.mul_(1.5)
    assert_same(scores(adapted, dataset, batch_tokens=300), reference(adapted, dataset), rtol=1e-4)
    assert abs(scores(adapted, dataset)["mean_surprisal"] - plain["mean_surprisal"]).max() > 1e-3


def test_a_bias_of_the_head_counts(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    model.lm_head.bias = nn.Parameter(torch.linspace(-2, 2, tiny.VOCAB))
    assert_same(scores(model, dataset, batch_tokens=300), reference(model, dataset), rtol=1e-4)


def test_a_compiled_student_runs_uncompiled(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    expected = reference(model, dataset)

    def compiler(*_: object) -> Any:
        raise AssertionError("compiled for a batch of scoring")

    compiled: Any = torch.compile(model, backend=compiler)
    assert_same(scores(compiled, dataset, batch_tokens=300), expected, rtol=1e-4)
    model.compile(backend=compiler)
    assert_same(scores(model, dataset, batch_tokens=300), expected, rtol=1e-4)


def test_a_student_inside_ddp_is_scored(model: PreTrainedModel, dataset: ScoredDataset, tmp_path: Path) -> None:
    expected = reference(model, dataset)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        assert_same(scores(nn.parallel.DistributedDataParallel(model), dataset, batch_tokens=300), expected, rtol=1e-4)
    finally:
        dist.destroy_process_group()


def test_a_student_with_trls_fused_head_is_scored(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    from trl.trainer.utils import add_fused_lm_head

    expected = reference(model, dataset)
    add_fused_lm_head(model, temperature=2.0)  # its temperature is for its own output only
    assert_same(scores(model, dataset, batch_tokens=300), expected, rtol=1e-4)


def test_autocast_is_seen_and_the_head_stays_exact(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert Scorer().numerics(model)["dtype"] == "bfloat16"
        cast = scores(model, dataset)
    exact = scores(model, dataset)
    assert 0 < abs(cast["mean_surprisal"] - exact["mean_surprisal"]).max() < 0.05
    assert Scorer().numerics(model) == {"dtype": "float32", "head": "float32 product", "ties": "strict"}
