"""IFD, LARK, ASLEC-CASL and Rho-1: their papers' formulas in float64, from all logits, one sample at a time."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from distill_sampler import (
    AslecCasl,
    AslecParts,
    BestOf,
    Curriculum,
    InstructionFollowingDifficulty,
    KeepByMargin,
    KeepTop,
    Lark,
    LarkGain,
    ModelReader,
    RankSurprisalRatio,
    Rho1Share,
    Scas,
    ScoredDataset,
    Scorer,
)
from distill_sampler.engines.writing import StoredRow, write_store
from distill_sampler.integrations.transformers import end_token_ids
from distill_sampler.metrics.steps import by_pattern
from distill_sampler.planning.planner import Planner
from distill_sampler.policies import Column
from distill_sampler.protocols import Metric, Policy
from distill_sampler.specs import parse_metrics, parse_policies
from distill_sampler.testing import check_policy
from distill_sampler.types import Sample, TokenStats
from tests import tiny
from tests.test_real_student import conversation

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
Array = npt.NDArray[np.float64]
SENTENCES = r"[.?] "
"""Where the authors of ASLEC split: a step ends with the space."""


def log_probs(model: PreTrainedModel, tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    """`[length - 1, vocab]` float64, of each token after the first."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens)[None]).logits[0, :-1]
    return logits.double().log_softmax(1)


def scores(model: PreTrainedModel, dataset: ScoredDataset, metrics: list[Metric]) -> dict[str, Array]:
    columns: dict[str, Array] = {}
    for scored in Scorer(progress=False).score(model, dataset, metrics, np.arange(len(dataset))):
        for name, values in scored.columns.items():
            columns.setdefault(name, np.full(len(dataset), np.nan))[scored.indices] = values
    return columns


def metrics_of(tokenizer: Any) -> list[Metric]:
    return [
        RankSurprisalRatio(),
        InstructionFollowingDifficulty(limit=None),
        InstructionFollowingDifficulty(limit=None, start_token=1, name="ifd_bos"),
        Lark(),
        Lark(top_50=True, name="lark_top"),
        AslecParts(skip=2, splitter=by_pattern(SENTENCES), min_tokens=1, max_tokens=10**6, tokenizer=tokenizer),
    ]


def reference(model: PreTrainedModel, tokenizer: Any, sample: Sample) -> dict[str, float]:
    """What the papers say of one sample, written down as they say it."""
    tokens, scored = sample.input_ids, sample.scored
    whole = log_probs(model, tokens)[torch.from_numpy(scored[1:])]
    targets = torch.from_numpy(tokens[scored])
    log_p = whole.gather(1, targets[:, None])[:, 0]
    p, loss = log_p.exp(), float(-log_p.mean())

    answer = tokens[scored]
    alone = -log_probs(model, answer).gather(1, targets[1:, None]).mean()
    with_bos = -log_probs(model, np.r_[np.int64(1), answer]).gather(1, targets[:, None]).mean()

    brier = float((1 - 2 * p + whole.exp().square().sum(1)).mean())
    top = whole.topk(50)
    of_top = top.values.softmax(1)
    of_target = (of_top * (top.indices == targets[:, None])).sum(1)
    brier_of_top = float((1 - 2 * of_target + of_top.square().sum(1)).mean())

    text = tokenizer.decode(answer.tolist())
    begins = np.cumsum([0, *(len(tokenizer.decode([token])) for token in answer.tolist())])[:-1]
    cuts = [0, *(match.end() for match in re.finditer(SENTENCES, text))]
    step_begins = sorted({int(np.searchsorted(begins, cut)) for cut in cuts if cut < len(text)} - {len(answer)})
    first = np.zeros(len(answer), bool)
    for start, stop in zip(step_begins, [*step_begins[1:], len(answer)], strict=True):
        first[start : min(start + 2, stop)] = True
    log_p64 = log_p.numpy()
    return {
        "ifd_conditioned": loss,
        "ifd_alone": float(alone),
        "instruction_following_difficulty": loss / float(alone),
        "ifd_bos": loss / float(with_bos),
        "lark_loss": loss,
        "lark_brier": brier,
        "lark": brier / loss,
        "lark_top_brier": brier_of_top,
        "lark_top": brier_of_top / loss,
        "aslec_first_share": float(first.mean()),
        "aslec_first": float(log_p64[first].mean()),
        "aslec_rest": float(log_p64[~first].mean()) if not first.all() else -16.0,
        "aslec": -loss,
    }


def require_parity(model: PreTrainedModel, tokenizer: Any, dataset: ScoredDataset, groups: list[str]) -> None:
    found = scores(model, dataset, metrics_of(tokenizer))
    expected = [reference(model, tokenizer, dataset.sample(index)) for index in range(len(dataset))]
    for name in expected[0]:
        np.testing.assert_allclose(found[name], [each[name] for each in expected], rtol=1e-4, err_msg=name)

    planner = Planner(
        dataset,
        {metric.name: metric for metric in metrics_of(tokenizer)},
        [BestOf(LarkGain(per="prompt_id"), per="prompt_id")],
        seed=0,
        num_samples=None,
    )
    pool = planner.pool(0, found)
    gain = pool.goodness(LarkGain(per="prompt_id"))
    for group in set(groups):
        rows = [row for row, name in enumerate(groups) if name == group]
        losses, rho = (np.array([expected[row][name] for row in rows]) for name in ("lark_loss", "lark"))
        of_group = losses / losses.sum() * (2 * rho - (rho * losses).sum() / losses.sum())
        np.testing.assert_allclose(gain[rows], of_group, rtol=1e-4, atol=1e-6)

    share, first, rest, mean = (
        np.array([each[name] for each in expected])
        for name in ("aslec_first_share", "aslec_first", "aslec_rest", "aslec")
    )
    design = np.stack([rest, first, share, np.ones(len(mean))], 1)
    gamma = np.linalg.lstsq(design, mean, rcond=None)[0][2]
    np.testing.assert_allclose(pool.goodness(AslecCasl()), mean - gamma * share, rtol=1e-3)


def test_scores_are_the_papers_formulas(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: ScoredDataset
) -> None:
    require_parity(model, tokenizer, dataset, [str(dataset[index]["prompt_id"]) for index in range(len(dataset))])


def real_traces(tokenizer: Any, shared: Path, problems: int) -> list[dict[str, Any]]:
    """Four models' solutions of the shortest problems of GSM8K."""
    with gzip.open(shared / "data" / "gsm8k_example_model_solutions.jsonl.gz", "rt", encoding="utf-8") as file:
        shortest = sorted(map(json.loads, file), key=lambda each: len(each["question"]))[:problems]
    return [
        {**conversation(tokenizer, each["question"], answer["solution"]), "prompt_id": each["question"]}
        for each in shortest
        for answer in each.values()
        if isinstance(answer, dict)
    ]


def test_scores_of_sixty_real_traces_are_the_papers_formulas(tokenizer: PreTrainedTokenizerBase, shared: Path) -> None:
    rows = real_traces(tokenizer, shared, problems=15)
    assert len(rows) == 60
    model = tiny.model(max_position_embeddings=4096)
    require_parity(model, tokenizer, ScoredDataset(rows, end_token_ids=[257]), [row["prompt_id"] for row in rows])


@pytest.mark.slow
def test_scores_of_the_real_student_are_the_papers_formulas(
    student: tuple[PreTrainedModel, PreTrainedTokenizerBase], shared: Path
) -> None:
    model, tokenizer = student
    rows = real_traces(tokenizer, shared, problems=4)
    dataset = ScoredDataset(rows, end_token_ids=end_token_ids(tokenizer, model))
    require_parity(model, tokenizer, dataset, [row["prompt_id"] for row in rows])


def test_an_answer_that_the_question_makes_less_likely_is_flagged(
    model: PreTrainedModel, dataset: ScoredDataset
) -> None:
    every = scores(model, dataset, [InstructionFollowingDifficulty(limit=None)])["instruction_following_difficulty"]
    limit = float(np.median(every))
    kept = scores(model, dataset, [InstructionFollowingDifficulty(limit=limit)])["instruction_following_difficulty"]
    np.testing.assert_array_equal(np.isnan(kept), every > limit)
    curriculum = Curriculum(metrics=[InstructionFollowingDifficulty(limit=limit)], policies=[])
    curriculum.bind(dataset)
    curriculum.start_epoch(0, model)
    flagged = int((every > limit).sum())
    assert f"does not apply to {flagged} samples" in " ".join(curriculum.summaries[0].notes)


def test_one_token_alone_is_predicted_by_nothing() -> None:
    sample = Sample(index=0, input_ids=np.arange(4), scored=np.arange(4) == 3)
    assert InstructionFollowingDifficulty().views(sample) is None
    assert InstructionFollowingDifficulty(start_token=2).views(sample) is not None


def test_lark_weights_the_best_three_by_their_gain(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    policy = KeepByMargin(LarkGain(per="prompt_id"), per="prompt_id", k=2)
    curriculum = Curriculum(metrics=[Lark()], policies=[policy])
    curriculum.bind(dataset, applies_weights=True)
    plan = curriculum.start_epoch(0, model)
    assert len(plan) == 2 * 6
    pool = curriculum.planner.pool(0, curriculum.store.latest)
    gain = pool.goodness(LarkGain(per="prompt_id"))
    groups = pool.column("prompt_id").codes
    for row, weight in zip(plan.indices.tolist(), plan.weights.tolist(), strict=True):
        of_group = np.sort(gain[groups == groups[row]])[::-1]
        margins = of_group[:2] - of_group[2]
        assert weight == pytest.approx(2 * (gain[row] - of_group[2]) / margins.sum(), rel=1e-3)


def test_pool_scores_do_not_depend_on_the_order_of_the_rows(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    metrics: list[Metric] = [Lark(), AslecParts(tokenizer=tiny.tokenizer())]
    order = np.random.default_rng(0).permutation(len(dataset))
    mixed = ScoredDataset([dataset[int(row)] for row in order], end_token_ids=[257])
    goodness = []
    found = scores(model, dataset, metrics)
    for data, numbers in ((dataset, found), (mixed, {name: values[order] for name, values in found.items()})):
        policies = [BestOf(LarkGain(per="prompt_id"), per="prompt_id"), BestOf(AslecCasl(per="teacher"), per="teacher")]
        planner = Planner(data, {each.name: each for each in metrics}, policies, seed=0, num_samples=None)
        pool = planner.pool(0, numbers)
        goodness.append([pool.goodness(LarkGain(per="prompt_id")), pool.goodness(AslecCasl(per="teacher"))])
    for left, right in zip(*goodness, strict=True):
        np.testing.assert_array_equal(left[order], right)


@pytest.mark.parametrize(
    ("policy", "metric"),
    [
        (KeepByMargin(LarkGain(per="prompt_id"), per="prompt_id"), Lark()),
        (BestOf(AslecCasl(per="teacher"), per="prompt_id"), AslecParts()),
        (KeepTop(AslecCasl(), fraction=0.5), AslecParts()),
    ],
    ids=repr,
)
def test_policies_by_a_pool_score_keep_their_contract(policy: Policy, metric: Metric) -> None:
    check_policy(policy, metrics=[metric])


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_names_metrics_and_policies_that_there_are(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = StoredRow(text="Yes.", begins=np.array([0]), surprisal=np.array([1.0]))
    write_store(Path("store.arrow"), [row], {"model": "tiny"})
    options = yaml.safe_load(config.read_text(encoding="utf-8"))
    if config.stem != "distill":
        metrics = {metric.name for metric in parse_metrics(options["metrics"])}
        assert {name for policy in parse_policies(options["policy"]) for name in policy.uses_metrics} <= metrics


def test_people_can_type_the_relatives() -> None:
    found = parse_metrics("InstructionFollowingDifficulty,lark,Lark(top_50=True,name=lark_top),aslec")
    assert [each.name for each in found] == ["instruction_following_difficulty", "lark", "lark_top", "aslec"]
    typed = "KeepByMargin(LarkGain(per=prompt_id), per=prompt_id, k=3)"
    assert parse_policies([typed]) == [KeepByMargin(LarkGain(per="prompt_id"), per="prompt_id", k=3)]


def test_a_pool_score_of_another_metric_is_refused(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    metric = RankSurprisalRatio(name="aslec")
    planner = Planner(dataset, {"aslec": metric}, [], seed=0, num_samples=None)
    pool = planner.pool(0, dict.fromkeys(metric.columns, np.ones(len(dataset))))
    with pytest.raises(ValueError, match=r"reads the numbers of AslecParts\(\).*among your metrics"):
        pool.goodness(AslecCasl())
    with pytest.raises(ValueError, match=r"There is no metric 'lark'"):
        pool.goodness(LarkGain(per="prompt_id"))
    assert Column("x") != LarkGain(per="x")


def test_tokens_with_excess_loss_are_counted(model: PreTrainedModel, dataset: ScoredDataset) -> None:
    reference_model = tiny.model(1).eval()
    found = scores(model, dataset, [Rho1Share(reference=ModelReader(reference_model), threshold=0.5)])
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        targets = torch.from_numpy(sample.input_ids[sample.scored])[:, None]
        student, other = (
            -log_probs(each, sample.input_ids)[torch.from_numpy(sample.scored[1:])].gather(1, targets)[:, 0]
            for each in (model, reference_model)
        )
        excess = (student - other).numpy()
        assert found["rho1_share"][index] == pytest.approx((excess > 0.5).mean())
        assert found["rho1_excess"][index] == pytest.approx(excess[excess > 0.5].mean(), rel=1e-4)


def test_a_reference_with_other_tokens_is_refused(tokenizer: PreTrainedTokenizerBase, dataset: ScoredDataset) -> None:
    metric = Rho1Share(reference=ModelReader(tiny.model(1), tokenizer=tiny.tokenizer()), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"reference=.*use ExcessLoss"):
        metric.views(dataset.sample(0))


def test_a_learnability_factor_is_largest_between_certain_and_impossible() -> None:
    sample = Sample(index=0, input_ids=np.arange(2), scored=np.arange(2) == 1)

    def rho(p: float) -> float:
        tokens = TokenStats(surprisal=-np.log(np.array([p])), sum_p2=np.array([p**2 + (1 - p) ** 2]))
        return Lark().reduce(sample, [tokens])["lark"]

    assert rho(0.25) > rho(0.9) > rho(0.999)
    assert rho(0.25) > rho(0.01)


def test_the_learning_cost_is_the_papers_formula(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: ScoredDataset
) -> None:
    metric = Scas(tokenizer=tokenizer, question_share=0.3)
    found = scores(model, dataset, [RankSurprisalRatio(), metric])
    seen: list[torch.Tensor] = []
    hook = model.model.layers[-1].mlp.up_proj.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    special = set(tokenizer.all_special_ids)
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        log_p = log_probs(model, sample.input_ids)
        nll = -log_p.gather(1, torch.from_numpy(sample.input_ids[1:])[:, None])[:, 0].numpy()
        unit = torch.nn.functional.normalize(seen[-1].double(), dim=1).numpy()
        last = int(np.flatnonzero(sample.scored)[-1])
        answer = [place for place in range(len(sample.input_ids)) if sample.scored[place]]
        question = [p for p in range(1, last) if not sample.scored[p] and int(sample.input_ids[p]) not in special]
        of_answer, of_question = nll[np.array(answer) - 1].mean(), nll[np.array(question) - 1].mean()
        within = (unit[answer] @ unit[answer].T).mean()
        across = (unit[answer] @ unit[question].T).mean()
        expected = 0.7 * of_answer**2 * within + 0.3 * of_answer * of_question * across
        assert found["scas"][index] == pytest.approx(expected, rel=1e-4)
        assert found["scas_answer_similarity"][index] == pytest.approx(within, rel=1e-4)
        assert found["scas_question_similarity"][index] == pytest.approx(across, rel=1e-3, abs=1e-5)
    hook.remove()


def test_activations_are_reduced_whatever_is_in_a_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: ScoredDataset
) -> None:
    metric = Scas(tokenizer=tokenizer)
    together = scores(model, dataset, [metric, RankSurprisalRatio()])["scas"]
    alone = []
    for index in range(len(dataset)):
        (scored,) = Scorer(progress=False, batch_tokens=1).score(model, dataset, [metric], np.array([index]))
        alone.append(float(scored.columns["scas"][0]))
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert not any(module._forward_hooks for module in model.modules()), "nothing is left on the student"


def test_a_model_without_the_layer_and_observing_are_refused(
    tokenizer: PreTrainedTokenizerBase, dataset: ScoredDataset
) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=tiny.VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=512))
    with pytest.raises(ValueError, match=r"mlp\.up_proj.*Use another metric"):
        scores(gpt2, dataset, [Scas(tokenizer=tokenizer)])
    with pytest.raises(ValueError, match="scas cannot be observed"):
        Curriculum(metrics=[Scas(tokenizer=tokenizer)], policies=[], observe=True).bind(dataset, observes=True)
