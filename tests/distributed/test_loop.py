"""A loop of one's own: weights, observed scores and re-planning as in a trainer, and an exact resume at any step."""

import math
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from distill_sampler import (
    BestOf,
    Curriculum,
    CurriculumLoop,
    KeepTop,
    RankSurprisalRatio,
    Rescore,
    ScoredDataset,
    Scorer,
    Shuffle,
    WeightBySoftmax,
    watch,
)
from distill_sampler.artifacts.manifest import MANIFEST, damage
from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.integrations.sample_log import compare, read_log
from tests import tiny
from tests.resume.test_checkpoints import verified
from tests.test_attach import TRAINERS

RSR = "rank_surprisal_ratio"
REPLANNED = Rescore(every_steps=2, lag=2, fraction=0.5)


def make(
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | None,
    accumulation: int = 1,
    batch_size: int = 2,
    drop_last: bool = False,
    model: Any = None,
    manifests: bool = True,
    report_every: int | None = None,
    timeout: timedelta | None = None,
    **changes: Any,
) -> tuple[CurriculumLoop, Any, Any, Any]:
    rows = tiny.tokenised(tiny.candidates(6), tokenizer)
    settings: dict[str, Any] = {
        "metrics": [RankSurprisalRatio()],
        "policies": [BestOf(RSR, per="prompt_id", k=2), Shuffle()],
        "scorer": Scorer(progress=False),
        **changes,
    }
    handlers = [] if timeout is None else [InitProcessGroupKwargs(timeout=timeout)]
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, kwargs_handlers=handlers)
    loop = CurriculumLoop(
        Curriculum(**settings),
        ScoredDataset(rows, end_token_ids=[257]),
        accelerator,
        output_dir=folder,
        sample_log=folder is not None,
        manifests=manifests,
        report_every=report_every,
    )
    model = model or tiny.model(attention_dropout=0.1)
    loader = DataLoader(
        rows.select_columns(["input_ids", "labels"]),  # type: ignore[arg-type]
        batch_size=batch_size,
        drop_last=drop_last,
        sampler=loop.sampler,
        collate_fn=DataCollatorForSeq2Seq(tokenizer),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(loop)
    return loop, model, optimizer, loader


def trained_batches(parts: tuple[CurriculumLoop, Any, Any, Any]) -> Iterator[Any]:
    """The batches of an epoch, each trained on."""
    loop, model, optimizer, loader = parts
    for batch in loop.batches(model, loader):
        with loop.accelerator.accumulate(model):
            loop.accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        yield batch


def train(parts: tuple[CurriculumLoop, Any, Any, Any], *, save: Path | None = None, stop: int | None = None) -> None:
    """Two epochs; a checkpoint after every batch into `save`; ends after `stop` batches."""
    batches = 0
    for _ in parts[0].epochs(2):
        for _ in trained_batches(parts):
            batches += 1
            if save is not None:
                parts[0].accelerator.save_state(str(save / str(batches)))
            if batches == stop:
                return
    parts[0].finish()


def test_a_checkpoint_within_an_accumulation_is_said_to_lack_its_gradients(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    train(make(tokenizer, None, accumulation=2), save=tmp_path, stop=2)
    assert caplog.text.count("accelerator.sync_gradients is True") == 1


@pytest.mark.parametrize("place", [1, 5, 11])
def test_a_step_that_was_begun_before_a_checkpoint_is_trained_again(
    place: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def made(folder: Path) -> tuple[CurriculumLoop, Any, Any, Any]:
        return make(tokenizer, folder, accumulation=2, model=tiny.model())  # without dropout

    torch.manual_seed(1)
    whole = made(tmp_path / "whole")
    train(whole, save=tmp_path / "saved")
    rest = made(Path(shutil.copytree(tmp_path / "whole", tmp_path / "rest")))
    rest[0].accelerator.load_state(str(tmp_path / "saved" / str(place)))
    train(rest)
    assert torch.equal(parameters(whole[1]), parameters(rest[1]))
    assert rest[0].step == whole[0].step
    assert rest[0].curriculum.times_trained().tolist() == whole[0].curriculum.times_trained().tolist()
    assert read_log(tmp_path / "rest" / "distill_sampler") == read_log(tmp_path / "whole" / "distill_sampler")


@pytest.mark.parametrize("rescore", [Rescore(), REPLANNED], ids=["once", "replanned"])
def test_the_checkpoints_of_a_loop_are_verified(
    rescore: Rescore, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    train(make(tokenizer, tmp_path, accumulation=2, rescore=rescore), save=tmp_path)
    for step in range(1, 13):
        code, said = verified(tmp_path / str(step))
        assert code == 0, said
        assert f"epoch {(step - 1) // 6}" in said
        assert f"{((step - 1) % 6 + 1) // 2 * 4} of 12 samples trained" in said
    log = tmp_path / "distill_sampler" / "samples-0.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()
    log.write_text("\n".join([*lines[:3], *lines[4:]]) + "\n", encoding="utf-8")
    assert verified(tmp_path / "2")[0] == 0
    assert verified(tmp_path / "4")[0] == 1


def test_a_loop_that_was_not_registered_cannot_be_verified(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.save({"other": 1}, tmp_path / "custom_checkpoint_0.pkl")
    code, said = verified(tmp_path)
    assert code == 2
    assert "register_for_checkpointing(loop)" in said


def test_a_loops_checkpoint_of_an_older_release_is_not_verified(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    loop = make(tokenizer, None)[0]
    state = {name: value for name, value in loop.state_dict().items() if name != "places_per_epoch"}
    torch.save(state, tmp_path / "custom_checkpoint_0.pkl")
    code, said = verified(tmp_path)
    assert code == 2
    assert "older release" in said
    assert "register_for_checkpointing" not in said


@pytest.mark.parametrize("manifests", [True, False])
def test_a_loop_does_not_load_a_checkpoint_that_was_damaged(
    manifests: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    train(make(tokenizer, None, manifests=manifests), save=tmp_path)
    assert all((tmp_path / str(step) / MANIFEST).exists() == manifests for step in range(1, 13))
    rest = make(tokenizer, None, manifests=manifests)
    rest[0].accelerator.load_state(str(tmp_path / "11"))
    weights = tmp_path / "11" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    if manifests:
        with pytest.raises(ValueError, match=r"11 cannot be loaded: .*model.safetensors"):
            rest[0].accelerator.load_state(str(tmp_path / "11"))
    else:
        rest[0].accelerator.load_state(str(tmp_path / "11"))


def test_a_loops_state_that_lacks_something_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    loop = make(tokenizer, None)[0]
    with pytest.raises(ValueError, match=r"lacks arrays, curriculum.*Load another checkpoint"):
        loop.load_state_dict({"run": "x", "step": 1})


def test_a_checkpoint_that_is_written_again_gets_a_new_manifest(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    parts = make(tokenizer, None)
    for _ in parts[0].epochs(2):
        for _ in trained_batches(parts):
            parts[0].accelerator.save_state(str(tmp_path / "last"))
            assert not (tmp_path / "last" / MANIFEST).exists()
    parts[0].finish()
    assert damage(tmp_path / "last") == ""
    assert (tmp_path / "last" / MANIFEST).exists()


def parameters(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"observe": True, "rescore": REPLANNED},
        {"policies": [WeightBySoftmax(RSR, temperature=1.0), Shuffle()]},
        {"accumulation": 2, "observe": True, "rescore": Rescore(every_steps=1, lag=1)},
    ],
    ids=["plain", "observing and planning anew", "weights", "accumulation"],
)
@pytest.mark.parametrize("place", [4, 6, 8, 12])
def test_a_loop_resumed_at_any_batch_goes_on_as_if_nothing_had_happened(
    place: int, changes: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(1)
    whole = make(tokenizer, tmp_path / "whole", **changes)
    train(whole, save=tmp_path / "saved")
    rest = make(tokenizer, tmp_path / "rest", **changes)
    rest[0].accelerator.load_state(str(tmp_path / "saved" / str(place)))
    train(rest)
    assert torch.equal(parameters(whole[1]), parameters(rest[1]))
    first, second = whole[0].curriculum, rest[0].curriculum
    assert first.samples() == second.samples()
    assert first.sampler.plan == second.sampler.plan
    assert whole[0].step == rest[0].step


@pytest.mark.parametrize("online", [{}, {"observe": True, "rescore": Rescore(every_steps=1, lag=2, fraction=0.5)}])
@pytest.mark.parametrize("batches", [(1, 1), (3, 1), (5, 1), (1, 4), (12, 1)], ids=str)
@pytest.mark.parametrize("place", [2, 5, 6])
def test_a_loop_resumed_with_other_batches_trains_the_rest_of_the_plan(
    place: int,
    batches: tuple[int, int],
    online: dict[str, Any],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output, per_step = tmp_path / "run", batches[0] * batches[1]
    train(make(tokenizer, output, **online), save=tmp_path / "saved", stop=place)
    parts = make(tokenizer, output, batch_size=batches[0], accumulation=batches[1], **online)
    parts[0].accelerator.load_state(str(tmp_path / "saved" / str(place)))
    train(parts)
    assert f"had 2 samples until this checkpoint and has {per_step}" in caplog.text
    lines = read_log(output / "distill_sampler")
    last = {planned.epoch: planned.plan for planned in parts[0].curriculum.cycle.record.plans}
    first_epoch = 2 * place + -(-(12 - 2 * place) // per_step) * per_step
    for (epoch, plan), length in zip(last.items(), (first_epoch, -(-12 // per_step) * per_step), strict=True):
        assert compare(lines, plan, epoch=epoch, trained=length) == []
        assert sum(len(line["samples"]) for line in lines if line["epoch"] == epoch) == length
    trained_on = [sample for line in lines for sample in line["samples"]]
    assert parts[0].curriculum.times_trained().tolist() == np.bincount(trained_on, minlength=18).tolist()
    assert parts[0].step == place + (len(trained_on) - 2 * place) // per_step


def test_a_rest_of_the_epoch_without_a_whole_step_is_left_out_where_they_are_cut(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    train(make(tokenizer, tmp_path / "run"), save=tmp_path / "saved", stop=4)
    parts = make(tokenizer, tmp_path / "run", batch_size=5, drop_last=True)
    parts[0].accelerator.load_state(str(tmp_path / "saved" / "4"))
    train(parts)
    lines = read_log(tmp_path / "run" / "distill_sampler")
    assert [(line["epoch"], line["start"]) for line in lines] == [(0, 0), (0, 2), (0, 4), (0, 6), (1, 0), (1, 5)]


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_loop_resumed_between_epochs_knows_what_was_trained(
    epoch: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(1)
    whole = make(tokenizer, None)
    for _ in whole[0].epochs(2):
        for _ in trained_batches(whole):
            pass
        whole[0].accelerator.save_state(str(tmp_path / str(whole[0].curriculum.epoch)))
    rest = make(tokenizer, None)
    rest[0].accelerator.load_state(str(tmp_path / str(epoch)))
    train(rest)
    assert torch.equal(parameters(whole[1]), parameters(rest[1]))
    assert rest[0].curriculum.times_trained().tolist() == whole[0].curriculum.times_trained().tolist()
    assert rest[0].curriculum.times_trained().sum() == 24


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loops_epoch_is_whole_steps(accumulation: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    policies = [KeepTop(RSR, num=7), Shuffle()]
    parts = make(tokenizer, tmp_path, accumulation=accumulation, policies=policies)
    train(parts)
    loop = parts[0]
    first, second = loop.curriculum.plans
    lines = read_log(tmp_path / "distill_sampler")
    expected = [index for plan in (first, second) for index in [*plan.indices.tolist(), plan.indices[0]]]
    assert [sample for line in lines for sample in line["samples"]] == expected
    assert loop.curriculum.times_trained().tolist() == np.bincount(expected, minlength=18).tolist()
    assert loop.step == 2 * (4 // accumulation)
    assert "completed by 1 from its start" in loop.curriculum.summaries[0].notes[-1]


@pytest.mark.parametrize("observe", [False, True])
def test_what_a_loop_trained_is_what_was_planned(
    observe: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    parts = make(tokenizer, tmp_path, observe=observe, rescore=REPLANNED)
    train(parts)
    lines = read_log(tmp_path / "distill_sampler")
    last = {planned.epoch: planned.plan for planned in parts[0].curriculum.cycle.record.plans}
    for epoch, plan in last.items():
        assert compare(lines, plan, epoch=epoch, trained=len(plan)) == []
    assert len(parts[0].curriculum.plans) > 2  # it did plan anew
    assert np.isfinite(Scores.open(tmp_path).numbers()[RSR]).all()
    assert (tmp_path / "scores.parquet").exists()


def test_a_loop_writes_the_page_of_every_nth_epoch_and_at_the_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    parts = make(tokenizer, tmp_path, report_every=2)
    page, seen = tmp_path / "report.html", []
    for _ in parts[0].epochs(3):
        for _ in trained_batches(parts):
            seen.append(page.read_text(encoding="utf-8").partition('id="live">')[2].partition(" begins")[0])
    assert list(dict.fromkeys(seen)) == ["Epoch 1 of 3", "Epoch 3 of 3"]
    parts[0].finish()
    assert 'id="live"' not in page.read_text(encoding="utf-8")
    for wrong, cure in ((0, r"report_every=0: .*at least 1"), (1, r"report_every=1 .*output_dir=")):
        with pytest.raises(ValueError, match=cure):
            make(tokenizer, None if wrong else tmp_path, report_every=wrong)


@pytest.mark.parametrize("timeout", [None, timedelta(seconds=33)])
def test_a_rank_that_hangs_in_a_loop_may_do_so_for_the_accelerators_timeout(
    timeout: timedelta | None, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_longest", 1800.0)  # of a trainer in the same process
    make(tokenizer, None, timeout=timeout)
    assert watch._longest == (math.inf if timeout is None else 33)


def test_weights_in_a_loop_are_the_trainers(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """One step on one batch: the gradient is the weighted one."""
    policies = [WeightBySoftmax(RSR, temperature=1.0), Shuffle()]
    loop, model, _, loader = make(tokenizer, None, policies=policies)
    model.eval()  # no dropout
    gradients = []
    for _ in loop.epochs(1):
        for number, batch in enumerate(loop.batches(model, loader)):
            model.zero_grad()
            model(**batch).loss.backward()
            ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            plan = loop.sampler.plan
            assert plan is not None
            weights = torch.tensor(plan.weights[2 * number : 2 * number + 2])
            gradients.append((ours, batch, weights))
            if number == 2:
                break
    for ours, batch, weights in gradients:
        model.zero_grad()
        logits, labels = (
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
            batch["labels"],
        )
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        ((weights[:, None] * losses).sum() / (labels[:, 1:] != -100).sum()).backward()
        expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_observed_scores_are_what_a_pass_would_give(tokenizer: PreTrainedTokenizerBase) -> None:
    loop, model, _, loader = make(tokenizer, None, observe=True)
    for _ in loop.epochs(1):
        for batch in loop.batches(model, loader):
            model.eval()
            model(**batch).loss.backward()  # without an optimizer step the student stays what it was
    seen, store = loop.curriculum.store.observed, loop.curriculum.store
    which = seen.step >= 0
    assert which.sum() == 12
    np.testing.assert_allclose(seen.columns[RSR][which], store.latest[RSR][which], rtol=1e-4)


def test_a_break_in_the_loop_leaves_no_hook_behind(tokenizer: PreTrainedTokenizerBase) -> None:
    loop, model, _, loader = make(tokenizer, None, observe=True, policies=[WeightBySoftmax(RSR, temperature=1.0)])

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    before = hooks()
    for _ in loop.epochs(1):
        batches = loop.batches(model, loader)
        next(batches)
        assert hooks() > before
        batches.close()
    assert hooks() == before


def test_batches_outside_of_epochs_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    loop, model, _, loader = make(tokenizer, None)
    with pytest.raises(ValueError, match=r"for epoch in loop\.epochs"):
        next(loop.batches(model, loader))


@pytest.mark.parametrize("name", ["dispatch_batches", "split_batches"])
def test_a_loader_that_deals_otherwise_is_refused(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**{name: True}))
    rows = ScoredDataset(tiny.tokenised(tiny.candidates(2), tokenizer), end_token_ids=[257])
    curriculum = Curriculum(metrics=[], policies=[Shuffle()])
    with pytest.raises(ValueError, match=rf"DataLoaderConfiguration\({name}=True\)"):
        CurriculumLoop(curriculum, rows, accelerator)


def test_the_loop_and_the_trainer_train_alike(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The same curriculum plans the same epoch for both."""
    from distill_sampler import attach

    trainer = TRAINERS["Trainer"](tmp_path, tokenizer, num_train_epochs=1)
    curriculum = Curriculum(
        metrics=[RankSurprisalRatio()],
        policies=[BestOf(RSR, per="prompt_id", k=2), Shuffle()],
        scorer=Scorer(progress=False),
    )
    attach(trainer, curriculum)
    trainer.train()
    loop, model, _, loader = make(tokenizer, None)
    for _ in loop.epochs(1):
        next(loop.batches(model, loader))
    assert loop.sampler.plan == curriculum.plans[0]
