"""Soft targets from a store are a live teacher's, as far as the stored tokens go."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_sampler import ScoredDataset, SoftTargets, attach
from distill_sampler.engines.writing import StoredRow, write_store
from distill_sampler.metrics.second_model import response_text
from tests import tiny
from tests.objectives.test_soft_targets import curriculum, teacher, weights_of
from tests.online.test_loss_weights import RATE, trainer_of


@pytest.fixture(scope="module")
def guide() -> PreTrainedModel:
    return teacher()


def store_of(
    guide: Any, path: Path, tokenizer: PreTrainedTokenizerBase, k: int, rows: slice = slice(None), **facts: Any
) -> Path:
    """What a teacher gives the responses of the trainers' candidates."""
    dataset = ScoredDataset(tiny.tokenised(tiny.candidates(2), tokenizer), end_token_ids=[257])
    stored = []
    for sample in dataset.samples(range(len(dataset)))[rows]:
        ids = torch.from_numpy(sample.input_ids)
        with torch.no_grad():
            log_probs = torch.log_softmax(guide(input_ids=ids[None]).logits[0], -1)
        at = torch.from_numpy(sample.scored).nonzero()[:, 0]
        top = log_probs[at - 1].topk(k)
        response = response_text(sample, tokenizer)
        stored.append(
            StoredRow(
                text="".join(response.turns),
                surprisal=-log_probs[at - 1, ids[at]].numpy(),
                begins=response.begins,
                token_ids=ids[at].numpy(),
                key=str(sample.index),
                top_ids=top.indices.numpy(),
                top_logprobs=top.values.numpy(),
            )
        )
    write_store(path, stored, {"model": "guide", "temperature": 1.0, "key_column": None, **facts}, top_k=k)
    return path


def trained(objective: Any, folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    trainer = trainer_of("SFTTrainer", folder, tokenizer, max_steps=1)
    attach(trainer, curriculum(weighted=True), objective=objective)
    trainer.train()
    return weights_of(trainer)


@pytest.mark.parametrize(
    ("k", "tail", "divergence"), [(5, "bucket", "forward"), (5, "bucket", "reverse"), (5, "renormalise", "js")]
)
def test_a_step_descends_the_formula_over_the_stored_tokens(
    k: int, tail: Any, divergence: Any, guide: PreTrainedModel, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    store = store_of(guide, tmp_path / "guide.arrow", tokenizer, k)
    objective = SoftTargets(str(store), temperature=1.0, alpha=0.6, divergence=divergence, tail=tail)
    given = curriculum(weighted=True)
    trainer = trainer_of("SFTTrainer", tmp_path, tokenizer, max_steps=1)
    attach(trainer, given, objective=objective)
    trainer.train()

    student, exact = tiny.model().double(), copy.deepcopy(guide).double()
    plan, covered = given.sampler.plan, []
    assert plan is not None
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for sample, weight in zip(given.dataset.samples(plan.indices[:2]), plan.weights[:2], strict=True):
        ids = torch.from_numpy(sample.input_ids)
        labels = torch.tensor(trainer.train_dataset[sample.index]["labels"])
        z, v = (model(input_ids=ids[None]).logits[0] for model in (student, exact))
        at = (labels[1:] != -100).nonzero()[:, 0]
        ce = torch.nn.functional.cross_entropy(z[at], labels[1:][at], reduction="sum")
        at = torch.from_numpy(sample.scored).nonzero()[:, 0] - 1  # without the end marker
        q, p = torch.softmax(z[at], -1), torch.softmax(v[at].detach(), -1)
        top = p.topk(k).indices
        covered += p.gather(1, top).sum(1).tolist()
        p, q = (torch.cat([x.gather(1, top), 1 - x.gather(1, top).sum(1, keepdim=True)], 1) for x in (p, q))
        if tail == "renormalise":
            p = torch.cat([p[:, :-1] / p[:, :-1].sum(1, keepdim=True), torch.zeros(len(p), 1).double()], 1)

        def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum()

        m = (p + q) / 2
        d = {"forward": kl(p, q), "reverse": kl(q, p), "js": (kl(p, m) + kl(q, m)) / 2}[divergence]
        total = total + float(weight) * (0.6 * d + 0.4 * ce)
        tokens += int((labels[1:] != -100).sum())
    (logged,) = (line["soft_targets_coverage"] for line in trainer.state.log_history if "loss" in line)
    assert logged == pytest.approx(sum(covered) / len(covered), rel=1e-3)
    (total / tokens).backward()
    for name, value in student.named_parameters():
        expected = value.detach() - RATE * value.grad
        # top log-probabilities are stored in half precision
        torch.testing.assert_close(weights_of(trainer)[name].double(), expected, rtol=1e-3, atol=2e-5)


def test_all_stored_tokens_give_a_live_teachers_training(
    guide: PreTrainedModel, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """At another temperature too: over the whole vocabulary nothing is lost but the end marker, which is not stored."""
    store = store_of(guide, tmp_path / "guide.arrow", tokenizer, tiny.VOCAB)
    live = trained(SoftTargets(guide), tmp_path / "live", tokenizer)
    stored = trained(SoftTargets(str(store)), tmp_path / "stored", tokenizer)
    start = dict(tiny.model().named_parameters())
    moved = torch.cat([(live[name] - start[name].detach()).flatten() for name in live])
    differ = torch.cat([(live[name] - stored[name]).flatten() for name in live])
    assert float(differ.norm() / moved.norm()) < 0.2


@pytest.mark.parametrize(
    ("k", "rows", "arguments", "message"),
    [
        (0, slice(None), {}, r"guide\.arrow.*no most probable tokens.*--top-k 32"),
        (3, slice(2), {}, r"guide\.arrow.*4 of 6 samples.*Make the store from this data"),
        (3, slice(None), {"tail": "bucket"}, r"temperature=2\.0, tail='bucket'.*temperature=1\.0"),
        (3, slice(None), {"divergence": "reverse"}, r"divergence='reverse', tail='renormalise'.*tail='bucket'"),
        (3, slice(None), {"tail": "drop"}, r"tail='drop'.*'renormalise' or 'bucket'"),
    ],
)
def test_what_a_store_cannot_give_is_refused_before_training(
    k: int,
    rows: slice,
    arguments: dict[str, Any],
    message: str,
    guide: PreTrainedModel,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    store = store_of(guide, tmp_path / "guide.arrow", tokenizer, k, rows)
    with pytest.raises(ValueError, match=message):
        trained(SoftTargets(str(store), **arguments), tmp_path / "run", tokenizer)


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no store .*nothing\.arrow"):
        SoftTargets(str(tmp_path / "nothing.arrow"))
