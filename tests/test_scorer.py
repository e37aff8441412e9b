"""Running the student: scores equal full logits whatever the batches, and training does not notice."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from distill_sampler import Curriculum, GlobalNaturalness, RankSurprisalRatio, ScoredDataset, Scorer
from distill_sampler.protocols import Metric
from distill_sampler.reading.batching import token_batches
from distill_sampler.reading.blocks import units_of
from distill_sampler.reading.forward import reading
from distill_sampler.reading.structure import unwrap
from distill_sampler.reading.token_stats import available
from distill_sampler.types import Sample, TokenStats, View
from tests import tiny

PLAIN = {
    "dtype": "float32",
    "head": "float32 product",
    "operands": "float32 × float32",
    "float32_products": "ieee",
    "ties": "strict",
}
METRICS = [RankSurprisalRatio(), GlobalNaturalness()]


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


def test_scores_do_not_depend_on_whether_prompts_are_shared(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    read = {}
    for share in (True, False):
        scorer = Scorer(progress=False, batch_tokens=300, share_prompts=share)
        read[share] = sum(scored.tokens for scored in scorer.score(model, dataset, METRICS, np.arange(len(dataset))))
    # of each prompt, all tokens but the last are read once instead of three times
    saved = sum(2 * (int(dataset.sample(index).scored.argmax()) - 1) for index in range(0, len(dataset), 3))
    assert read == {True: dataset.lengths.sum() - saved, False: dataset.lengths.sum()}
    assert_same(scores(model, dataset, batch_tokens=300), scores(model, dataset, batch_tokens=300, share_prompts=False))


def test_a_student_that_goes_on_from_a_prompt_wrongly_reads_whole_sequences(
    model: PreTrainedModel, dataset: ScoredDataset
) -> None:
    expected = reference(model, dataset)
    forward = model.model.forward

    def forgetful(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            kwargs["attention_mask"] = None
        return forward(*args, **kwargs)

    model.model.forward = forgetful
    assert_same(scores(model, dataset, batch_tokens=300), expected)


def test_what_is_done_is_left_out_and_the_rest_is_as_before(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    scorer = Scorer(progress=False, batch_tokens=100)
    blocks = list(scorer.score(model, dataset, METRICS, np.arange(len(dataset))))
    done = np.zeros(len(dataset), bool)
    done[blocks[0].indices] = True
    rest = list(scorer.score(model, dataset, METRICS, np.arange(len(dataset)), done=done))
    assert len(blocks) > 1
    assert len(rest) == len(blocks) - 1
    for before, after in zip(blocks[1:], rest, strict=True):
        assert np.array_equal(before.indices, after.indices)
        assert all(np.array_equal(before.columns[name], after.columns[name]) for name in before.columns)


def rows(*lengths: tuple[int, int], vocab: int = 258) -> ScoredDataset:
    """Random tokens: so many of a prompt, and so many of a response."""
    rng = np.random.default_rng(0)
    return ScoredDataset(
        [
            {"input_ids": rng.integers(vocab, size=prompt + response), "labels": [-100] * prompt + [1] * response}
            for prompt, response in lengths
        ]
    )


def test_a_response_of_one_token_and_a_prompt_of_none(model: PreTrainedModel) -> None:
    dataset = rows((5, 1), (1, 1), (0, 2), (0, 30), (40, 3))
    assert_same(scores(model, dataset), reference(model, dataset))


def test_a_response_of_16k_tokens() -> None:
    model = tiny.model(num_hidden_layers=1, max_position_embeddings=2**15, hidden_size=16, num_attention_heads=2)
    dataset = rows((100, 16_384), (3, 10))
    assert_same(scores(model, dataset), reference(model, dataset), rtol=1e-4)


def test_a_sample_of_exactly_the_students_positions_is_read_and_one_token_more_is_too_long() -> None:
    torch.manual_seed(0)
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    for student in (tiny.model(max_position_embeddings=64), learned):
        dataset = rows((40, 24), (40, 23), (40, 25))
        (scored,) = Scorer(progress=False).score(student, dataset, METRICS, np.arange(3))
        assert scored.too_long.tolist() == [2]
        (traced,) = Scorer(progress=False).score(student, dataset, METRICS, np.arange(3), traces=[0, 2])
        assert set(traced.traces) == {0}
        expected = reference(student, rows((40, 24), (40, 23)))
        assert_same({name: values[scored.indices.argsort()][:2] for name, values in scored.columns.items()}, expected)


def test_samples_of_one_prompt_are_read_together_in_pieces_of_so_many_tokens() -> None:
    prompt = list(range(1, 41))
    data = [{"input_ids": [*prompt, *[90 + n] * 10], "labels": [-100] * 40 + [90 + n] * 10} for n in range(6)]
    for unit_tokens, sizes in ((1000, [6]), (100, [2, 2, 2]), (50, [1] * 6)):
        units = units_of(ScoredDataset(data), np.arange(6), unit_tokens)
        assert np.bincount(units).tolist() == sizes


def test_running_out_of_memory_halves_the_batches_and_loses_nothing(
    model: PreTrainedModel, dataset: ScoredDataset, caplog: pytest.LogCaptureFixture
) -> None:
    expected = scores(model, dataset)
    largest: list[int] = []

    def small_machine(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].numel() > 200:
            raise torch.OutOfMemoryError("too much")
        largest.append(kwargs["input_ids"].numel())

    model.model.register_forward_pre_hook(small_machine, with_kwargs=True)
    assert_same(scores(model, dataset, batch_tokens=1500), expected)
    assert max(largest) <= 200
    assert caplog.text.count("Out of memory") == 3  # 1500, 750, 375, 187


def test_a_batch_that_was_begun_before_memory_ran_out_is_not_read_again(
    model: PreTrainedModel, dataset: ScoredDataset
) -> None:
    expected = scores(model, dataset, share_prompts=False)
    rows: list[int] = []

    def full_once(module: Any, args: Any, kwargs: Any) -> None:
        samples, length = kwargs["input_ids"].shape
        rows.append(samples if length > 4 else 0)  # the probe of the model and idle forwards are shorter
        if len(rows) == 3:  # the probe, a batch, and this one
            raise torch.OutOfMemoryError("too much")

    model.model.register_forward_pre_hook(full_once, with_kwargs=True)
    assert_same(scores(model, dataset, batch_tokens=300, share_prompts=False), expected)
    assert sum(rows) - rows[2] == len(dataset)


def test_memory_that_does_not_hold_a_single_sequence_is_an_error(
    model: PreTrainedModel, dataset: ScoredDataset
) -> None:
    def tiny_machine(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].numel() > 40:
            raise torch.OutOfMemoryError("too much")

    model.model.register_forward_pre_hook(tiny_machine, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError):
        scores(model, dataset, batch_tokens=1500, share_prompts=False)


@dataclass(frozen=True)
class Certainty(Metric):
    """A metric that asks for more than surprisal and rank."""

    name: str = "certainty"
    columns: tuple[str, ...] = ("certainty", "entropy", "sum_p2", "ties")
    higher_is_better: bool = True
    uses_statistics: tuple[str, ...] = ("entropy", "top1", "sum_p2")

    def views(self, sample: Sample) -> list[View]:
        return [View(input_ids=sample.input_ids, scored=sample.scored)]

    def reduce(self, sample: Sample, stats: Sequence[TokenStats]) -> dict[str, float]:
        (tokens,) = stats
        assert tokens.top1 is not None
        assert tokens.entropy is not None
        assert tokens.sum_p2 is not None
        assert tokens.ties is not None
        assert tokens.top1[tokens.rank == 1] == pytest.approx(np.exp(-tokens.surprisal[tokens.rank == 1]), rel=1e-5)
        return {
            "certainty": float(tokens.top1.mean()),
            "entropy": float(tokens.entropy.mean()),
            "sum_p2": float(tokens.sum_p2.mean()),
            "ties": float(tokens.ties.mean()),
        }

    def aggregate(self, columns: Mapping[str, Any]) -> float:
        return float(columns["certainty"].mean())


def test_a_metric_gets_the_statistics_that_it_asks_for(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    (scored,) = Scorer(progress=False).score(model, dataset, [Certainty(), *METRICS], np.array([3]))
    sample = dataset.sample(3)
    model.eval()
    with torch.no_grad():
        logp = model(input_ids=torch.from_numpy(sample.input_ids)[None]).logits[0, :-1].double().log_softmax(1)
    logp = logp[torch.from_numpy(sample.scored[1:])]
    assert scored.columns["certainty"][0] == pytest.approx(logp.exp().amax(1).mean().item(), rel=1e-5)
    assert scored.columns["entropy"][0] == pytest.approx(-(logp.exp() * logp).sum(1).mean().item(), rel=1e-5)
    assert scored.columns["sum_p2"][0] == pytest.approx(logp.exp().square().sum(1).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"Certainty\.uses_statistics names 'kurtosis'"):
        next(Scorer(progress=False).score(model, dataset, [Certainty(uses_statistics=("kurtosis",))], np.arange(1)))


def test_tied_tokens_count_half_with_mid_ranks(dataset: ScoredDataset) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all 258 tokens are tied
    assert scores(model, dataset, ties="strict")["mean_rank"] == pytest.approx(np.ones(18))
    unclipped = RankSurprisalRatio(rank_clip=1000)
    (scored,) = Scorer(progress=False, ties="mid").score(model, dataset, [unclipped], np.arange(2))
    assert scored.columns["mean_rank"] == pytest.approx(np.full(2, 1 + 257 / 2))
    with pytest.raises(ValueError, match="'strict', 'mid'"):
        Scorer(ties="worst")  # type: ignore[arg-type]


def test_numerics_name_what_scores_depend_on(model: PreTrainedModel) -> None:
    assert Scorer().numerics(model) == PLAIN
    assert Scorer(ties="mid").numerics(model.bfloat16())["dtype"] == "bfloat16"
    assert Scorer(ties="mid").numerics(model)["ties"] == "mid"


def test_bfloat16_students_score_close_to_float32_with_and_without_shared_prompts(dataset: ScoredDataset) -> None:
    exact = scores(tiny.model(), dataset)["mean_surprisal"]
    for share in (True, False):
        rounded = scores(tiny.model().bfloat16(), dataset, batch_tokens=300, share_prompts=share)["mean_surprisal"]
        np.testing.assert_allclose(rounded, exact, rtol=0.02)


def test_scoring_twice_gives_the_same_bits(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    first, second = scores(model, dataset), scores(model, dataset)
    assert all(np.array_equal(first[name], second[name]) for name in first)


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


def test_an_infinite_weight_is_reported_for_every_sample(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("inf")
    (scored,) = Scorer(progress=False).score(model, dataset, METRICS, np.arange(5))
    assert sorted(scored.non_finite.tolist()) == [0, 1, 2, 3, 4]


def test_nothing_to_score_gives_nothing(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    assert list(Scorer(progress=False).score(model, dataset, METRICS, np.empty(0, np.int64))) == []


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


def test_the_positions_of_a_student_are_those_of_its_configuration(model: PreTrainedModel) -> None:
    def positions(**config: Any) -> float:
        for name, value in config.items():
            setattr(model.config, name, value)
        with reading(model) as forward:
            return forward.positions

    assert positions() == 512
    yarn = {**model.config.rope_parameters, "factor": 4.0, "original_max_position_embeddings": 512}
    assert positions(rope_parameters=yarn) == 2048


def test_what_is_no_causal_language_model_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear is not a causal language model"):
        unwrap(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        unwrap(AutoModel.from_config(tiny.model().config))


# ---- Compiled layers ----


@pytest.mark.slow
def test_compiled_layers_change_rounding_only_and_are_named(dataset: ScoredDataset) -> None:
    if available("compiled", torch.device("cpu")) != "compiled":
        pytest.skip("torch.compile does not work on this machine")
    model = tiny.model()
    counters = importlib.import_module("torch._dynamo.utils").counters
    before = counters["stats"]["unique_graphs"]
    expected = scores(model, dataset, batch_tokens=300)
    found = scores(model, dataset, batch_tokens=300, compile_layers=True)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=name)
    assert 1 <= counters["stats"]["unique_graphs"] - before <= 4  # for all shapes of batches and all layers
    assert Scorer(compile_layers=True).numerics(model) == {**PLAIN, "layers": "compiled"}
    assert all("forward" not in module.__dict__ for module in model.modules())
    # a hook that comes later counts, and a metric may bring one
    handle = model.base_model.layers[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    hooked = scores(model, dataset, batch_tokens=300)
    again = scores(model, dataset, batch_tokens=300, compile_layers=True)
    handle.remove()
    for name, values in hooked.items():
        np.testing.assert_allclose(again[name], values, rtol=1e-4, err_msg=name)
    assert not np.allclose(hooked["mean_surprisal"], expected["mean_surprisal"], rtol=1e-3)
    # training afterwards is not compiled, and the scores of a student that the host compiles are the same
    torch.testing.assert_close(scores(model, dataset, batch_tokens=300), expected, rtol=0, atol=0)
    host = torch.compile(model)
    again = scores(host, dataset, batch_tokens=300, compile_layers=True)  # type: ignore[arg-type]
    for name, values in found.items():
        np.testing.assert_array_equal(again[name], values)


@pytest.mark.slow
def test_activations_are_seen_in_compiled_layers() -> None:
    if available("compiled", torch.device("cpu")) != "compiled":
        pytest.skip("torch.compile does not work on this machine")
    model = tiny.model()
    ids = np.arange(3, 43)
    view = View(
        input_ids=ids, scored=np.arange(40) >= 20, parts=np.where(np.arange(40) < 20, -1, np.arange(40) // 10 - 2)
    )
    near = []
    for compiled in (True, False):
        with reading(model, compile_layers=compiled):  # before there is a hook
            pass
        with reading(model, extras=["near_first"], compile_layers=compiled) as forward:
            near.append(forward([view])[0].near_first)
    np.testing.assert_allclose(near[0], near[1], rtol=1e-4)


def test_observed_scores_and_compiled_layers_are_refused_together() -> None:
    with pytest.raises(ValueError, match=r"observe=True.*compile_layers=True.*Give the curriculum one"):
        Curriculum(metrics=METRICS, policies=[], observe=True, scorer=Scorer(compile_layers=True))


def test_layers_that_cannot_be_compiled_run_as_they_are_and_one_line_says_why(
    dataset: ScoredDataset, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.model()
    expected = scores(model, dataset)
    layer: Any = model.base_model.layers[0]
    layer.forward = layer.forward  # as hooks do that move weights
    for _ in range(2):
        found = scores(model, dataset, compile_layers=True)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)
    assert "layers" not in Scorer(compile_layers=True).numerics(model)
    assert "forward" in layer.__dict__
    (line,) = [record.getMessage() for record in caplog.records if "compile_layers" in record.getMessage()]
    assert "hooks" in line


# ---- Accelerators ----


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("compiled", [False, True])
def test_an_accelerator_gives_the_scores_of_a_cpu(dataset: ScoredDataset, compiled: bool) -> None:
    expected = scores(tiny.model(), dataset)
    for batch_tokens in (64, 300, None):
        found = scores(tiny.model().cuda(), dataset, batch_tokens=batch_tokens, compile_layers=compiled)
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-3, err_msg=name)
