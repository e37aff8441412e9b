"""Planted provenance: texts spliced from sentences that two models really sampled, so that the truth is known.

Teacher, student and a false teacher are tiny models, each trained here on texts of a writer with habits of its own and
others that all writers share, each with a BPE tokenizer trained on its own texts, so that no two have the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from distill_sampler import ModelReader, Provenance
from distill_sampler.metrics.spans import SentenceLogProbs
from distill_sampler.metrics.steps import sentences
from distill_sampler.tracing import Response, read_responses, trace
from distill_sampler.types import FloatArray

TEXT = "we so add two and the sum is then check that it all must be even odd less more than one half of each part next"
WORDS = [*TEXT.split(), "to", "know", "why", "not", "now", "if", "same", "as", "was", "ten", "six"]
OWN_SHARE = 0.8
"""How often a word follows the writer's own habits; else those that all writers share."""


def habits(seed: int) -> FloatArray:
    """`[words, words]` the probability of each word after each, a few of them likely."""
    return np.random.default_rng(seed).dirichlet(np.full(len(WORDS), 0.04), len(WORDS))


def written(rng: np.random.Generator, style: int, count: int) -> str:
    """Sentences of five to nine words, each word drawn by the one before it."""
    chain = OWN_SHARE * habits(style) + (1 - OWN_SHARE) * habits(99)
    said, word = [], 0
    for _ in range(count):
        words = []
        for _ in range(rng.integers(5, 10)):
            word = int(rng.choice(len(WORDS), p=chain[word]))
            words.append(WORDS[word])
        said.append(" ".join(words) + ".")
    return " ".join(said)


@dataclass
class Writer:
    """A model with a tokenizer of its own."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    def samples(self, count: int) -> list[str]:
        """Sentences that the model samples, one after the other."""
        said: list[str] = []
        torch.manual_seed(0)
        while len(said) < count:
            prompt = torch.full((16, 1), self.tokenizer.bos_token_id)
            ids = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                max_new_tokens=120,
                top_k=0,
                pad_token_id=1,
            )
            for text in self.tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True):
                edges = [0, *sentences(text)]
                said += [text[start:stop].strip() for start, stop in pairwise(edges)]  # the last one may be cut
        return said[:count]


def trained(style: int, *, vocabulary: int) -> Writer:
    """A model of one layer after some steps on texts of a style."""
    rng = np.random.default_rng(style)
    texts = [written(rng, style, 8) for _ in range(400)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<s>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    torch.manual_seed(style)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    ids = [[0, *tokenizer(text)["input_ids"]] for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps = 150
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        batch = torch.tensor([ids[place][:48] for place in rng.integers(0, len(ids), 16)])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return Writer(model.eval(), tokenizer)


@pytest.fixture(scope="module")
def writers() -> dict[str, Writer]:
    return {
        name: trained(style, vocabulary=vocabulary)
        for style, (name, vocabulary) in enumerate((("teacher", 400), ("student", 290), ("false", 340)))
    }


@pytest.fixture(scope="module")
def spliced(writers: dict[str, Writer]) -> tuple[list[str], list[list[bool]]]:
    """Texts, and for each of their sentences whether the teacher sampled it."""
    rng = np.random.default_rng(0)
    pools = {style: iter(writers[style].samples(400)) for style in ("teacher", "student")}
    texts, truth = [], []
    for _ in range(40):
        is_teacher = rng.random(10) < 0.5
        said = [next(pools["teacher" if each else "student"]) for each in is_teacher]
        text = " ".join(said)
        found = [0, *(position for position in sentences(text) if position < len(text))]
        if len(found) == len(said):  # no sentence ends in the middle of one, or not at all
            texts.append(text)
            truth.append(is_teacher.tolist())
    assert len(texts) > 20
    return texts, truth


def sentences_of(writers: dict[str, Writer], teacher: str, texts: list[str]) -> list[tuple[SentenceLogProbs, ...]]:
    """What a teacher and the student make of the sentences of each text."""
    responses = [Response(where="", prompt=({"role": "user", "content": "<s>"},), text=text) for text in texts]
    readings = {}
    for name, writer in (("teacher", writers[teacher]), ("student", writers["student"])):
        reader = ModelReader(writer.model, batch_tokens=4096)
        readings[name] = read_responses(reader, responses, tokenizer=writer.tokenizer)
    traced = trace(responses, {**readings, "distilled": readings["student"]}, provenance=Provenance())
    assert not traced.left_out
    return [each.by_model for each in traced.traced]


def auc(positive: FloatArray, negative: FloatArray) -> float:
    """How often a number of the first kind is larger than one of the second."""
    return float((positive[:, None] > negative).mean() + (positive[:, None] == negative).mean() / 2)


def test_the_sentences_that_the_teacher_sampled_are_found(
    writers: dict[str, Writer], spliced: tuple[list[str], list[list[bool]]]
) -> None:
    texts, truth = spliced
    read = sentences_of(writers, "teacher", texts)
    planted = np.concatenate(truth)
    aucs = {}
    for bytes_per_token in (None, 4.0):
        gap = np.concatenate([t.probability(bytes_per_token) - s.probability(bytes_per_token) for t, s, _ in read])
        aucs[bytes_per_token] = auc(gap[planted], gap[~planted])
        print(f"\nper {bytes_per_token or 'own token'}: AUC {aucs[bytes_per_token]:.3f}, {len(planted)} sentences")
        for beta in (0.05, 0.1, 0.15):  # `pytest -s` shows the confusion
            provenance = Provenance(beta=beta, bytes_per_token=bytes_per_token)
            called = np.concatenate([provenance.is_teacher(t, s) for t, s, _ in read])
            found, wrong = called[planted].mean(), called[~planted].mean()
            print(f"  beta {beta}: {found:.0%} of the teacher's found, {wrong:.0%} of the student's taken for it")
            assert found > 0.05
            assert wrong < 0.05
    assert aucs[None] > 0.8
    assert aucs[4.0] > 0.95
    assert aucs[4.0] > aucs[None]  # the student's tokenizer needs more tokens, which raises its geometric means


def test_a_false_teacher_gets_significantly_fewer_sentences(
    writers: dict[str, Writer], spliced: tuple[list[str], list[list[bool]]]
) -> None:
    texts, _ = spliced
    counts = {
        name: np.array([Provenance().is_teacher(t, s).sum() for t, s, _ in sentences_of(writers, name, texts)])
        for name in ("teacher", "false")
    }
    difference = counts["teacher"] - counts["false"]
    assert difference.mean() > 4 * difference.std(ddof=1) / np.sqrt(len(difference))
