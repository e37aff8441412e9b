"""The contract with transformers: every causal language model is scored as its own full float32 logits would be.

Two layers, random weights, logits that are far from uniform; candidates of several prompts, so that prompts are
shared where the model allows it. An architecture is added with a line.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
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
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from distill_sampler import ScoredDataset, Scorer
from distill_sampler.protocols import PassInfo
from distill_sampler.reading.batching import token_batches
from distill_sampler.reading.forward import reading
from distill_sampler.reading.lengths import switches_at
from distill_sampler.reading.model_reader import ModelReader
from distill_sampler.reading.observer import Observer
from distill_sampler.reading.sharing import can_share
from distill_sampler.types import View
from tests import tiny, zoo
from tests.test_scorer import METRICS, PLAIN, assert_same, reference, scores

DENSE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**DENSE, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 8}
MOE = {**WIDE, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES: dict[str, PretrainedConfig] = {
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


def build(config: PretrainedConfig) -> PreTrainedModel:
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
def test_prompts_are_shared_where_that_is_exact(name: str) -> None:
    with reading(build(ARCHITECTURES[name])) as forward:
        assert can_share(forward, VIEWS, tokens=0) == (name not in ALONE)


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


def test_autocast_is_seen_and_gone_afterwards(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert Scorer().numerics(model)["dtype"] == "bfloat16"
        cast = scores(model, dataset)
    exact = scores(model, dataset)
    assert 0 < abs(cast["mean_surprisal"] - exact["mean_surprisal"]).max() < 0.05
    assert Scorer().numerics(model) == PLAIN


# ---- Lengths and columns that change what the model is ----


def views_of(*shapes: tuple[int, int]) -> list[View]:
    """Random tokens: so many of a prompt, and three responses to it of about so many."""
    rng = np.random.default_rng(0)
    views = []
    for prompt, response in shapes:
        start = rng.integers(1, 250, prompt)
        for more in range(3):
            ids = np.concatenate([start, rng.integers(1, 250, response + 9 * more)])
            views.append(View(input_ids=ids, scored=np.arange(len(ids)) >= prompt))
    return views


def assert_own_logits(model: Any, views: Sequence[View], *, virtual: int = 0, **settings: Any) -> ModelReader:
    """Read views, and compare every token with the model's own logits for that view alone."""
    reader = ModelReader(model, **settings)
    with reader.open(PassInfo(examples=views)) as read:
        found = read(views)
    for view, stats in zip(views, found, strict=True):
        tokens = torch.from_numpy(view.input_ids)
        with torch.no_grad():
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, virtual:-1].double()
        kept = torch.from_numpy(view.scored[1:])
        target = logits.gather(1, tokens[1:, None])
        surprisal = (logits.logsumexp(1) - target[:, 0])[kept]
        np.testing.assert_allclose(stats.surprisal, surprisal, atol=1e-4)
        # logits that are equal up to this may change places
        low, high = (1 + (logits > target + by).sum(1)[kept].numpy() for by in (1e-4, -1e-4))
        assert ((low <= stats.rank) & (stats.rank <= high)).all()
    return reader


VIEWS = views_of((24, 8), (31, 9), (38, 10), (45, 11))


@pytest.mark.slow
def test_every_architecture_of_transformers_scores_as_its_own_logits() -> None:
    wrong: dict[str, str] = {}
    built, shared, refused = [], [], []
    for model_type in zoo.MODEL_TYPES:
        try:
            model = zoo.build(model_type)
        except Exception:  # not with these sizes, or not on this machine
            continue
        built.append(model_type)
        try:
            assert_own_logits(model, VIEWS[::4], batch_tokens=1, share_prompts=False)
            assert_own_logits(model, VIEWS, batch_tokens=300, share_prompts=False)
            if assert_own_logits(model, VIEWS, batch_tokens=300)._sharing:
                shared.append(model_type)
        except ValueError as error:
            if "is not a causal language model" in str(error) and looks_ahead(model):
                refused.append(model_type)
            else:
                wrong[model_type] = f"{type(error).__name__}: {error}"
        except Exception as error:
            wrong[model_type] = f"{type(error).__name__}: {error}"
    assert wrong == {}
    # transformers 5.23: 172 of 189, 116 and 4
    assert len(built) >= 160
    assert len(shared) >= 105
    assert len(refused) <= 8


def looks_ahead(model: Any) -> bool:
    """Whether the logits of tokens change when others follow."""
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        alone, followed = (model(input_ids=tokens[:, :stop], use_cache=False).logits[0, :10] for stop in (10, 20))
    return not torch.allclose(alone, followed, rtol=1e-4, atol=1e-4)


def longrope() -> PreTrainedModel:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [4.0, 3.0, 2.0, 2.5],
    }
    return zoo.build("phi3", original_max_position_embeddings=60, rope_parameters=rope)


AROUND_60 = views_of((30, 10), (45, 10), (50, 25))


@pytest.mark.parametrize("batch_tokens", [300, 2000])
def test_with_longrope_scores_do_not_depend_on_what_else_is_read(batch_tokens: int) -> None:
    assert {len(view.input_ids) > 60 for view in AROUND_60} == {True, False}
    assert not assert_own_logits(longrope(), AROUND_60, batch_tokens=batch_tokens)._sharing


def test_rotations_that_grow_with_the_input_are_never_shared() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert assert_own_logits(tiny.model(), VIEWS, batch_tokens=300)._sharing
    assert not assert_own_logits(tiny.model(rope_parameters=rope), VIEWS, batch_tokens=300)._sharing


def test_rotations_may_be_those_of_one_kind_of_layers() -> None:
    model = longrope()
    assert switches_at(model) == 60
    rope = model.config.rope_parameters
    model.config.rope_parameters = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    assert switches_at(model) == 60
    assert switches_at(tiny.model()) == float("inf")


def test_no_batch_has_sequences_on_both_sides_of_a_boundary() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 200)
    for apart in (1, 100, 299):
        batches = list(token_batches(lengths, 2000, apart=apart))
        assert sorted(chain(*batches)) == list(range(200))
        assert all(len(set((lengths[batch] > apart).tolist())) == 1 for batch in batches)


LEARNED = {
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 7}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 7, "encoder_hidden_size": 16}),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 7}),
}


def with_learned_prompt(peft: Any, model: PreTrainedModel, name: str) -> Any:
    kind, settings = LEARNED[name]
    adapted = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for part in adapted.prompt_encoder.parameters():
            part.normal_(0, 0.5)
    return adapted


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_prompt_is_read_before_every_sequence(peft: Any, model: PreTrainedModel, name: str) -> None:
    with ModelReader(model, share_prompts=False).open(PassInfo()) as read:
        plain = read(VIEWS)
    adapted = with_learned_prompt(peft, model, name)
    # those of prefix tuning are keys and values only, so no state of theirs reaches the head
    reader = assert_own_logits(adapted, VIEWS, virtual=0 if name == "prefix tuning" else 7, batch_tokens=300)
    assert reader._sharing is False
    assert reader.positions == 512 - 7
    with reading(adapted) as forward:
        assert forward.transform is not None
    with reader.open(PassInfo()) as read:
        assert all(np.abs(a.surprisal - b.surprisal).max() > 0.1 for a, b in zip(plain, read(VIEWS), strict=True))


def test_a_learned_prompt_counts_where_rotations_change(peft: Any) -> None:
    assert switches_at(with_learned_prompt(peft, longrope(), "prompt tuning")) == 60 - 7


def test_a_learned_prompt_is_not_observed(peft: Any, model: PreTrainedModel, dataset: ScoredDataset) -> None:
    Observer(model, dataset, METRICS)
    with pytest.raises(ValueError, match=r"observe=True"):
        Observer(with_learned_prompt(peft, model, "prompt tuning"), dataset, METRICS)


def test_more_logits_than_tokens_are_refused(model: PreTrainedModel) -> None:
    class Longer(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = torch.cat([output.logits[:, :1], output.logits], 1)
            return output

    model.__class__ = Longer
    with pytest.raises(ValueError, match=r"shape \(3, 5, .*for \(3, 4\) tokens"), reading(model):
        pass


def masked(logits: torch.Tensor) -> None:
    logits[..., 251:] = float("-inf")


def scaled(logits: torch.Tensor) -> None:
    logits[..., 30:60] *= 1.01


def shifted(logits: torch.Tensor) -> None:
    logits[..., 7] += 0.01


def changing(change: Any) -> type[LlamaForCausalLM]:
    class Changed(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.clone()
            change(output.logits)
            return output

    return Changed


@pytest.mark.parametrize("change", [masked, scaled])
def test_single_columns_that_a_model_changes_are_seen(
    change: Any, model: PreTrainedModel, dataset: ScoredDataset, caplog: pytest.LogCaptureFixture
) -> None:
    model.__class__ = changing(change)
    assert_own_logits(model, VIEWS, batch_tokens=300)
    assert "full logits" in caplog.text
    with pytest.raises(ValueError, match="observe=True"):
        Observer(model, dataset, METRICS)


@pytest.mark.parametrize("change", [masked, scaled, shifted])
def test_single_columns_that_a_model_changes_are_seen_at_low_precision(change: Any, model: PreTrainedModel) -> None:
    """By less than the rounding of a product in bfloat16."""
    with reading(model.bfloat16()) as forward:
        assert forward.transform is not None
    model.__class__ = changing(change)
    with reading(model) as forward:
        assert forward.transform is None


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "llama"])
def test_a_transform_of_all_columns_is_found_at_low_precision(name: str) -> None:
    with reading(build(ARCHITECTURES[name])) as exact, reading(build(ARCHITECTURES[name]).bfloat16()) as rounded:
        assert rounded.transform == exact.transform
        assert rounded.transform is not None


def bert(spread: float, **changes: Any) -> BertLMHeadModel:
    torch.manual_seed(0)
    return BertLMHeadModel(BertConfig(vocab_size=tiny.VOCAB, **DENSE, initializer_range=spread, **changes))


@pytest.mark.parametrize("student", [bert(0.02), bert(0.5), bert(0.5).bfloat16()], ids=["faint", "strong", "bfloat16"])
def test_an_encoder_is_refused(student: PreTrainedModel, dataset: ScoredDataset) -> None:
    with pytest.raises(ValueError, match="BertLMHeadModel is not a causal language model"):
        scores(student, dataset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_is_not_refused(dtype: torch.dtype) -> None:
    for student in (bert(0.5, is_decoder=True), build(ARCHITECTURES["qwen3 moe"]), tiny.model()):
        with reading(student.to(dtype)) as forward:
            assert forward.transform is not None


# ---- What is multiplied ----


def test_under_autocast_the_heads_factors_are_rounded_as_in_training(model: PreTrainedModel) -> None:
    states: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: states.append(args[0].detach()))
    reader = ModelReader(model, share_prompts=False, batch_tokens=1)
    with torch.autocast("cpu", torch.bfloat16), reader.open(PassInfo()) as read:
        found = read(VIEWS[:1])[0]
        assert reader.numerics["operands"] == "bfloat16 × bfloat16"
        states.clear()
        model(input_ids=torch.from_numpy(VIEWS[0].input_ids)[None], use_cache=False)
    handle.remove()
    tokens = torch.from_numpy(VIEWS[0].input_ids)
    kept = torch.from_numpy(VIEWS[0].scored[1:])

    def surprisal(hidden: torch.Tensor, weight: torch.Tensor) -> np.ndarray[Any, Any]:
        logp = (hidden.double() @ weight.detach().double().T).log_softmax(1)
        return -logp.gather(1, tokens[1:, None])[:, 0][kept].numpy()

    hidden, weight = states[0][0, :-1], model.lm_head.weight
    assert hidden.dtype == weight.dtype == torch.float32
    np.testing.assert_allclose(found.surprisal, surprisal(hidden.bfloat16(), weight.bfloat16()), atol=2e-5)
    assert abs(found.surprisal - surprisal(hidden, weight)).max() > 1e-3


def test_numerics_tell_what_must_not_be_mixed(model: PreTrainedModel) -> None:
    found = [ModelReader(model).numerics]
    with torch.autocast("cpu", torch.bfloat16):
        found.append(ModelReader(model).numerics)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        found.append(ModelReader(model).numerics)
    finally:
        settings.fp32_precision = before
    found.append(ModelReader(model.bfloat16()).numerics)
    assert found[0] == PLAIN
    assert found[1] == {
        "dtype": "bfloat16",
        "head": "float32 product",
        "operands": "bfloat16 × bfloat16",
        "ties": "strict",
    }
    assert found[2] == {**PLAIN, "float32_products": "bf16"}
    assert found[3] == found[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_numerics_name_tf32() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert ModelReader(tiny.model().cuda()).numerics["float32_products"] == "tf32"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
