"""Packs in a loop of one's own: what a trainer trains on the same packs, and an exact resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerBase

from distill_sampler import (
    BestOf,
    Curriculum,
    CurriculumLoop,
    Rescore,
    ScoredDataset,
    Scorer,
    Shuffle,
    SoftTargets,
    WeightBySoftmax,
    attach,
)
from distill_sampler.integrations.sample_log import read_log
from tests import tiny
from tests.objectives.test_soft_targets import teacher
from tests.test_attach import RSR, curriculum
from tests.test_packed_training import PACK, plain_trainer

RATE = 0.05


def made(
    tokenizer: PreTrainedTokenizerBase,
    given: Curriculum,
    folder: Path | None = None,
    *,
    batch_size: int = 2,
    collate: Any = None,
    rows: Any = None,
    model: Any = None,
    cache: bool = False,
    **options: Any,
) -> tuple[CurriculumLoop, Any, Any, Any]:
    candidates = tiny.tokenised(tiny.candidates(), tokenizer)
    accelerator = Accelerator(cpu=True)
    loop = CurriculumLoop(
        given,
        ScoredDataset(candidates, end_token_ids=[257]),
        accelerator,
        output_dir=folder,
        sample_log=folder is not None,
        **{"pack_to": PACK, "pack_window": 4, **options},
    )
    model = model or tiny.model()
    model.config.use_cache = cache
    loop.prepare(model)
    loader = DataLoader(
        loop.packed(candidates.select_columns(["input_ids", "labels"])) if rows is None else rows,
        batch_size=batch_size,
        sampler=loop.sampler,
        collate_fn=collate or DataCollatorWithFlattening(),
    )
    prepared = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE), loader)
    accelerator.register_for_checkpointing(loop)
    return loop, *prepared


def train(parts: tuple[CurriculumLoop, Any, Any, Any], *, save: Path | None = None) -> list[list[int]]:
    """Two epochs, with a checkpoint after every batch. Returns the tokens of every batch."""
    loop, model, optimizer, loader = parts
    batches = []
    for _ in loop.epochs(2):
        for batch in loop.batches(model, loader):
            batches.append(batch["input_ids"].flatten().tolist())
            loop.accelerator.backward(loop.loss(model(**batch).loss))
            optimizer.step()
            optimizer.zero_grad()
            if save is not None:
                loop.accelerator.save_state(str(save / str(len(batches))))
    loop.finish()
    return batches


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_loop_trains_on_packs_what_a_trainer_does(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def given() -> Curriculum:
        return curriculum(
            policies=[BestOf(RSR, per="prompt_id", k=2), WeightBySoftmax(RSR, temperature=2.0), Shuffle()]
        )

    loop = made(tokenizer, given(), tmp_path / "loop", objective=SoftTargets(teacher()))
    train(loop)
    trainer = plain_trainer(
        tmp_path / "trainer", tokenizer, optim="sgd", learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0
    )
    attach(trainer, given(), objective=SoftTargets(teacher()), pack_to=PACK, pack_window=4)
    trainer.train()
    assert len(trainer.batches) > 4
    start, ours = weights(tiny.model()), weights(loop[1])
    for name, value in weights(trainer.model).items():
        assert not torch.equal(value, start[name])
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("online", [False, True], ids=["", "observing and replanning"])
def test_a_loop_resumes_inside_an_epoch_of_packs(
    online: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def parts(folder: Path) -> tuple[CurriculumLoop, Any, Any, Any]:
        given = curriculum(
            policies=[BestOf(RSR, per="prompt_id", k=2), Shuffle()],
            scorer=Scorer(progress=False),
            observe=online,
            rescore=Rescore(every_steps=1, lag=2, fraction=0.5) if online else None,
        )
        return made(tokenizer, given, folder, batch_size=1, model=tiny.model(attention_dropout=0.1))

    torch.manual_seed(1)
    whole = parts(tmp_path / "whole")
    batches = train(whole, save=tmp_path / "saved")
    assert (len(whole[0].curriculum.plans) > 2) == online
    for place in (1, len(batches) // 2, len(batches) // 2 + 1):
        rest = parts(Path(shutil.copytree(tmp_path / "whole", tmp_path / f"rest-{place}")))
        rest[0].accelerator.load_state(str(tmp_path / "saved" / str(place)))
        assert train(rest) == batches[place:]
        for name, value in weights(whole[1]).items():
            assert torch.equal(weights(rest[1])[name], value)
        assert rest[0].curriculum.times_trained().tolist() == whole[0].curriculum.times_trained().tolist()
        logs = [read_log(folder / "distill_sampler") for folder in (tmp_path / "whole", tmp_path / f"rest-{place}")]
        assert logs[0] == logs[1]


def test_a_loop_with_another_batch_size_trains_the_packs_that_are_left(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    whole = made(tokenizer, curriculum(policies=[Shuffle()]), batch_size=2)
    batches = train(whole, save=tmp_path)
    plan = whole[0].curriculum.plans[0]
    rest = made(tokenizer, curriculum(policies=[Shuffle()]), batch_size=1)
    rest[0].accelerator.load_state(str(tmp_path / "1"))
    left = [token for batch in batches[1 : len(batches) // 2] for token in batch]
    found = [token for batch in train(rest)[: plan.num_rows - 2] for token in batch]
    assert found == left[: len(found)]
    assert "An optimizer step had 2 packs" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": [{"input_ids": [1]}]}, r"pack_to=.*reads a list.*loop\.packed\(rows\)"),
        ({"collate": "pads"}, r"pack_to=.*DataCollatorForSeq2Seq.*DataCollatorWithFlattening\(\)"),
        ({"pack_to": "max_length"}, r"pack_to='max_length': .*whole number"),
        ({"pack_window": 0}, r"pack_window=0"),
        ({"pack_to": 80}, r"pack_to=80.*samples"),
    ],
)
def test_a_loop_that_cannot_train_packs_is_refused(
    wrong: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    if wrong.get("collate") == "pads":
        wrong = {"collate": DataCollatorForSeq2Seq(tokenizer)}
    with pytest.raises(ValueError, match=message):
        train(made(tokenizer, curriculum(policies=[Shuffle()]), **wrong))


@pytest.mark.parametrize("packed", [True, False])
def test_a_cache_does_not_let_samples_see_each_other(packed: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    """Transformers does not look at where samples begin in a forward pass that makes a cache."""
    rows = tiny.tokenised(tiny.candidates(), tokenizer).select_columns(["input_ids", "labels"])
    how: dict[str, Any] = {} if packed else {"pack_to": None, "rows": rows, "batch_size": 2}
    trained = []
    for cache in (False, True):
        parts = made(tokenizer, curriculum(policies=[Shuffle()]), cache=cache, **how)
        train(parts)
        trained.append(weights(parts[1]))
    for name, values in trained[0].items():
        assert torch.equal(values, trained[1][name]), name


def test_a_loop_refuses_a_model_whose_samples_see_each_other(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny.model()
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
    )
    with pytest.raises(ValueError, match=r"pack_to=: with this model, a sample's logits depend"):
        train(made(tokenizer, curriculum(policies=[Shuffle()]), model=model))
