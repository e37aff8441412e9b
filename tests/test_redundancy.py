"""Loops and near duplicates: how they are told, what is dropped, and the loops of real responses to MATH-500."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_sampler import (
    BestOf,
    CompressionRatio,
    DropDegenerate,
    GlobalNaturalness,
    MinHash,
    RankSurprisalRatio,
    ScoredDataset,
    Scorer,
)
from distill_sampler.integrations.transformers import end_token_ids
from distill_sampler.planning.why import ExplainedPlan
from distill_sampler.protocols import Metric, Pool
from distill_sampler.types import EncodedColumn, EpochPlan, Sample
from tests.test_real_student import conversation

RATIO = "compression_ratio"


def sample(tokens: Any) -> Sample:
    ids = np.r_[0, np.asarray(tokens, np.int64)]
    return Sample(index=0, input_ids=ids, scored=np.arange(len(ids)) > 0)


def sketch(tokens: Any, **fields: Any) -> np.ndarray[Any, Any]:
    pytest.importorskip("datasketch", reason="the extra 'dedup' is not installed")
    return np.array([*MinHash(**fields).reduce(sample(tokens), ()).values()])


def pool(scores: dict[str, Any], metrics: list[Metric], **columns: list[Any]) -> Pool:
    num = len(next(iter(scores.values())))
    encoded = {
        name: EncodedColumn(codes=np.unique(values, return_inverse=True)[1], values=sorted(set(values)))
        for name, values in columns.items()
    }
    return Pool(
        epoch=0,
        metrics={metric.name: metric for metric in metrics},
        scores={name: np.array(values, np.float32) for name, values in scores.items()},
        columns=encoded,
        lengths=np.ones(num, np.int64),
        content_hash=np.arange(num, dtype=np.uint64),
    )


def kept(policy: DropDegenerate, candidates: Pool, *indices: int) -> list[int]:
    plan = EpochPlan(indices=np.array(indices or range(len(candidates.lengths))))
    return policy(plan, candidates, np.random.default_rng(0)).indices.tolist()  # type: ignore[no-any-return]


def test_a_compression_ratio_is_zlibs(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("so so so so so so so so so so so so so so so so ", "The quick brown fox, 3.14 dogs; ünïcode."):
        ids = tokenizer(text)["input_ids"]
        found = CompressionRatio(tokenizer=tokenizer).reduce(sample(ids), ())
        assert found == {RATIO: len(zlib.compress(text.encode())) / len(text.encode())}


def test_equal_bands_tell_the_overlap_of_two_responses() -> None:
    rng = np.random.default_rng(0)
    shares = {0.95: [], 0.8: [], 0.3: []}
    for overlap, found in shares.items():
        for _ in range(60):
            one = rng.integers(1, 50_000, 400)
            same = round(400 * 2 * overlap / (1 + overlap))  # of 400 runs in each, this many are common
            other = np.r_[one[:same], rng.integers(1, 50_000, 400 - same)]
            found.append(bool((sketch(one) == sketch(other)).any()))
    assert np.mean(shares[0.95]) > 0.95
    assert abs(np.mean(shares[0.8]) - (1 - (1 - 0.8**8) ** 8)) < 0.15
    assert np.mean(shares[0.3]) < 0.05


def test_sketches_are_exact_numbers_that_depend_on_order_and_shape() -> None:
    numbers = sketch(range(100))
    assert len(numbers) == 8
    assert np.array_equal(numbers, numbers.astype(np.float32)), "scores are stored as float32"
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert not (numbers == sketch(range(99, -1, -1))).any()
    assert np.array_equal(sketch([5]), sketch([5])), "a response shorter than a run"
    assert not (sketch([5]) == sketch([6])).any()
    assert len(sketch(range(100), bands=3)) == 3


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ValueError, match=r"datasketch: pip install 'distill_sampler\[dedup\]'"):
        MinHash().reduce(sample([1]), ())


def test_loops_are_dropped_and_a_prompt_of_loops_keeps_the_least_looping() -> None:
    candidates = pool({RATIO: [0.3, 0.02, 0.05, 0.01, np.nan]}, [CompressionRatio()], prompt_id=list("ppqqr"))
    assert kept(DropDegenerate(duplicates=None), candidates) == [0, 4]
    assert kept(DropDegenerate(duplicates=None, per="prompt_id"), candidates) == [0, 2, 4]
    assert kept(DropDegenerate(duplicates=None, per="prompt_id", if_none="drop"), candidates) == [0, 4]
    assert kept(DropDegenerate(duplicates=None), candidates, 4, 0, 0, 1) == [4, 0, 0], "order and copies stay"


def test_one_of_each_chain_of_near_duplicates_is_kept() -> None:
    bands = {"minhash": [0.1, 0.1, 0.2, 0.3, 0.1], "minhash_2": [0.5, 0.6, 0.6, 0.7, 0.5]}
    metrics: list[Metric] = [CompressionRatio(), MinHash(bands=2)]
    scores = {RATIO: [0.3, 0.4, 0.5, 0.6, 0.9], **bands}
    candidates = pool(scores, metrics, prompt_id=list("ppppq"))
    # 0 and 1 share a band, 1 and 2 another: one chain. 4 answers another prompt
    assert kept(DropDegenerate(per="prompt_id"), candidates) == [2, 3, 4]
    assert kept(DropDegenerate(), candidates) == [3, 4], "without per, 4 belongs to the chain and compresses worst"
    by_rsr = DropDegenerate(per="prompt_id", metric="rsr")
    with_rsr = pool(
        {**scores, "rsr": [1, 2, 3, 4, 5]}, [*metrics, RankSurprisalRatio(name="rsr")], prompt_id=list("ppppq")
    )
    assert kept(by_rsr, with_rsr) == [0, 3, 4], "lower RSR is better"


def test_what_was_dropped_is_explained_by_its_ratio() -> None:
    candidates = pool({RATIO: [0.3, 0.02]}, [CompressionRatio()], prompt_id=["p", "p"])
    policy = DropDegenerate(duplicates=None, per="prompt_id")
    explained = ExplainedPlan.from_policies([policy], np.arange(2), candidates, 0)
    assert explained.reason(1) == "left out by DropDegenerate: compression_ratio 0.02, prompt_id = p"


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        ({"loops": None, "duplicates": None}, "or both"),
        ({"min_ratio": 0}, r"in \(0, 1\)"),
        ({"if_none": "error"}, "'keep_best' or 'drop'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        DropDegenerate(**arguments)


def math500(shared: Path) -> list[dict[str, Any]]:
    with gzip.open(shared / "data" / "skythought_math500.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_of_real_responses_no_loop_is_left_for_a_score_that_loves_repetition(shared: Path) -> None:
    traces = math500(shared)
    ratios = [len(zlib.compress(t["response"].encode())) / len(t["response"].encode()) for t in traces]
    loops = {row for row, ratio in enumerate(ratios) if ratio < 0.08}
    assert Counter(traces[row]["teacher"] for row in loops).most_common(1)[0][1] == 78
    assert len(loops) == 84
    # the worst score there could be: the more repetitive, the better
    scores = {RATIO: ratios, "rank_surprisal_ratio": ratios}
    candidates = pool(
        scores, [CompressionRatio(), RankSurprisalRatio()], prompt_id=[trace["prompt_id"] for trace in traces]
    )
    best = BestOf("rank_surprisal_ratio", per="prompt_id")
    dropped = [DropDegenerate(per="prompt_id", duplicates=None), best]
    looping = len({traces[row]["prompt_id"] for row in loops})
    for policies, chosen_loops in (([best], looping), (dropped, 0)):
        plan = ExplainedPlan.from_policies(policies, np.arange(len(traces)), candidates, 0).plan
        assert len(plan) == 500
        assert len(loops & set(plan.indices.tolist())) == chosen_loops


@pytest.mark.slow
def test_no_score_of_the_real_student_chooses_a_loop_after_it(
    student: tuple[PreTrainedModel, PreTrainedTokenizerBase], shared: Path
) -> None:
    """Prompts with a response that ends in a tight loop, of whose responses the last 300 tokens are read."""
    model, tokenizer = student
    groups: dict[str, list[dict[str, Any]]] = {}
    for trace in math500(shared):
        groups.setdefault(trace["prompt_id"], []).append(trace)
    rows: dict[str, list[dict[str, Any]]] = {}
    for prompt, traces in groups.items():
        content = [trace["response"].encode() for trace in traces]
        if min(len(zlib.compress(each)) / len(each) for each in content) > 0.05 or len(rows) == 8:
            continue
        for trace in traces:
            row = conversation(tokenizer, trace["prompt"], trace["response"])
            first = next(place for place, label in enumerate(row["labels"]) if label != -100)
            end = row["input_ids"][first:][-300:]
            text = tokenizer.decode(end).encode()
            read = {"input_ids": row["input_ids"][:first] + end, "labels": [-100] * first + end}
            loops = len(zlib.compress(text)) / len(text) < 0.12
            rows.setdefault(prompt, []).append({**read, "prompt_id": prompt, "loops": loops})
    looping = [group for group in rows.values() if any(row["loops"] for row in group)][:4]
    candidates = [row for group in looping for row in group]
    assert sum(row["loops"] for row in candidates) >= len(looping) > 1
    dataset = ScoredDataset(candidates, end_token_ids=end_token_ids(tokenizer, model))
    metrics: list[Metric] = [RankSurprisalRatio(), GlobalNaturalness(), CompressionRatio(tokenizer=tokenizer)]
    chosen: dict[tuple[str, bool], int] = {}
    columns: dict[str, np.ndarray[Any, Any]] = {}
    for scored in Scorer(progress=False).score(model, dataset, metrics, np.arange(len(dataset))):
        for name, values in scored.columns.items():
            columns.setdefault(name, np.full(len(dataset), np.nan))[scored.indices] = values
    dropped = DropDegenerate(per="prompt_id", duplicates=None, min_ratio=0.12)
    pool_of = pool(columns, metrics, prompt_id=[row["prompt_id"] for row in candidates])
    for name in ("rank_surprisal_ratio", "global_naturalness"):
        best = BestOf(name, per="prompt_id")
        for drops in (False, True):
            policies = [dropped, best] if drops else [best]
            plan = ExplainedPlan.from_policies(policies, np.arange(len(candidates)), pool_of, 0).plan
            chosen[name, drops] = sum(candidates[row]["loops"] for row in plan.indices.tolist())
    assert chosen["global_naturalness", False] > 0, "loops are a trap"
    assert chosen["global_naturalness", True] == chosen["rank_surprisal_ratio", True] == 0
