"""Packs through real trainers: what is trained is what was planned, and no sample sees another."""

from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from distill_sampler import (
    BestOf,
    Curriculum,
    DistillSampler,
    EpochPlan,
    KeepTop,
    Rescore,
    Shuffle,
    SortBy,
    WeightBySoftmax,
    attach,
    unpack,
)
from distill_sampler.integrations.packs import refuse_crossing
from tests import test_attach, tiny, zoo
from tests.online.test_observing import COLUMNS, ScoresBefore, observing
from tests.resume.test_checkpoints import verified
from tests.test_attach import RSR, RecordedTrainer, arguments, curriculum, sft_trainer, trained

PACK = 240
"""Three of the toy samples, which have 57 to 93 tokens."""


def plain_trainer(output: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Any:
    return RecordedTrainer(
        model=changes.pop("model", None) or tiny.model(),
        processing_class=tokenizer,
        train_dataset=tiny.tokenised(tiny.candidates(), tokenizer),
        data_collator=DataCollatorWithFlattening(),
        args=TrainingArguments(**arguments(output, **changes)),
    )


TRAINERS = {"Trainer": plain_trainer, "SFTTrainer": sft_trainer}


def packs_planned(attached: Curriculum) -> list[tuple[int, ...]]:
    """The packs of all epochs, each completed from its start to whole optimizer steps."""
    packs = []
    for plan in attached.plans:
        assert plan.packs is not None
        of_epoch = [tuple(plan.indices[start:stop].tolist()) for start, stop in pairwise(plan.packs)]
        packs += [of_epoch[row % len(of_epoch)] for row in range(len(attached.sampler))]
    return packs


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "one pack a batch": ("SFTTrainer", {"per_device_train_batch_size": 1}),
    "two packs, accumulated": ("SFTTrainer", {"gradient_accumulation_steps": 2}),
    "to a multiple of tokens": ("SFTTrainer", {"pad_to_multiple_of": 16}),
    "workers": (
        "Trainer",
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "num_train_epochs": 3},
    ),
    "the last left out": ("Trainer", {"dataloader_drop_last": True, "per_device_train_batch_size": 4}),
}


@pytest.mark.parametrize(("kind", "settings"), SETTINGS.values(), ids=list(SETTINGS))
def test_the_packs_trained_are_the_packs_planned(
    kind: str, settings: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = TRAINERS[kind](tmp_path, tokenizer, **settings)
    attached = curriculum(policies=[Shuffle()])
    attach(trainer, attached, pack_to=PACK, pack_window=8)
    trainer.train()
    packs = packs_planned(attached)
    if "pad_to_multiple_of" not in settings:  # (the taps have compared it with the plan)
        assert trained(trainer) == [sample for pack in packs for sample in pack]
    size = trainer.args.per_device_train_batch_size
    assert len(trainer.batches) * size == len(packs) == trainer.args.num_train_epochs * len(attached.sampler)
    lengths = attached.dataset.lengths
    assert max(lengths[list(pack)].sum() for pack in packs) <= PACK
    assert len(packs) < 12 * trainer.args.num_train_epochs
    assert "curriculum/pack_fill" in trainer.state.log_history[0]


def test_a_model_that_makes_a_cache_trains_packs_as_one_that_does_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """With a cache, transformers does not look at where samples begin. Before transformers 5, `Trainer` makes one."""
    losses = []
    for cache in (False, True):
        trainer = plain_trainer(tmp_path / str(cache), tokenizer, logging_steps=1, num_train_epochs=1)
        trainer.model.config.use_cache = cache
        attach(trainer, curriculum(policies=[Shuffle()]), pack_to=PACK)
        trainer.train()
        assert trainer.model.config.use_cache is cache
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", [pytest.param("Trainer", marks=pytest.mark.slow), "SFTTrainer"])
def test_padded_batches_of_so_many_tokens_are_trained_as_planned(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = test_attach.TRAINERS[kind](
        tmp_path, tokenizer, per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    attached = curriculum(policies=[Shuffle(), WeightBySoftmax(RSR, temperature=2.0)])
    attach(trainer, attached, batch_tokens=PACK, sample_log=True)
    trainer.train()
    batches = packs_planned(attached)
    assert trained(trainer) == [sample for batch in batches for sample in batch]
    assert [len(batch) for batch in trainer.batches] == [len(batch) for batch in batches]
    lengths = attached.dataset.lengths
    assert max(len(batch) * lengths[list(batch)].max() for batch in batches) <= PACK
    assert "padding" in " ".join(attached.summaries[0].notes)


def test_batch_tokens_with_settings_that_contradict_it_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {}, r"per_device_train_batch_size=2. Set it to 1"),
        ({"per_device_train_batch_size": 1}, {}, r"Use pack_to= instead"),
        ({}, {"pack_to": PACK}, r"pack_to=.*batch_tokens=.*one of the two"),
    ]
    for changes, options, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            attach(plain_trainer(tmp_path, tokenizer, **changes), curriculum(), batch_tokens=PACK, **options)


class FirstGradients(TrainerCallback):
    """Notes the gradients of the first optimizer step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.gradients = [parameter.grad.clone() for parameter in kwargs["model"].parameters()]


POLICIES = {"": [Shuffle()], "weighted": [Shuffle(), WeightBySoftmax(RSR, temperature=0.5)]}


@pytest.mark.parametrize(
    ("kind", "attention", "policies"),
    [
        ("Trainer", "sdpa", ""),
        ("SFTTrainer", "sdpa", "weighted"),
        ("SFTTrainer", "eager", ""),
        ("Trainer", "eager", "weighted"),
    ],
)
def test_the_step_of_packs_is_the_sum_over_its_samples_one_by_one(
    kind: str, attention: str, policies: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = TRAINERS[kind](
        tmp_path,
        tokenizer,
        model=tiny.model(attn_implementation=attention),
        gradient_accumulation_steps=2,
        max_grad_norm=0,
        max_steps=1,
    )
    seen = FirstGradients()
    trainer.add_callback(seen)
    attached = curriculum(policies=POLICIES[policies])
    attach(trainer, attached, pack_to=PACK)
    trainer.train()
    (logged,) = (line["loss"] for line in trainer.state.log_history if "loss" in line)
    model = tiny.model(attn_implementation=attention)
    loss, weighted, tokens = torch.zeros(()), torch.zeros(()), 0
    samples = trained(trainer)
    weights = attached.plans[0].weights[: len(samples)].tolist()
    assert (np.ptp(weights) > 0.1) == (policies == "weighted")
    for index, weight in zip(samples, weights, strict=True):
        row = trainer.train_dataset[index]
        input_ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        of_sample = cross_entropy(model(input_ids=input_ids).logits[0, :-1], labels, reduction="sum")
        loss += of_sample.detach()
        weighted += weight * of_sample
        tokens += int((labels != -100).sum())
    (weighted / tokens).backward()
    assert logged == pytest.approx(loss.item() / tokens, rel=1e-5, abs=1e-4)  # logged with four digits
    for found, parameter in zip(seen.gradients, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", TRAINERS)
def test_scores_observed_in_packs_equal_those_of_a_scoring_pass(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = TRAINERS[kind](tmp_path, tokenizer, num_train_epochs=1, save_strategy="no")
    attached = observing()
    attach(trainer, attached, pack_to=PACK)
    active = ScoresBefore(trainer, attached)
    trainer.add_callback(active)
    trainer.train()
    seen = attached.store.observed
    assert (seen.step >= 0).all()
    for name in COLUMNS:
        expected = [active.scores[step][name][sample] for sample, step in enumerate(seen.step)]
        np.testing.assert_allclose(seen.columns[name], expected, rtol=2e-5)


# ---- Resume, replan ----


def run(
    folder: Path, tokenizer: PreTrainedTokenizerBase, resume: Path | None = None, online: bool = False, **settings: Any
) -> tuple[Any, Curriculum]:
    """Two epochs of six packs, in steps of two, with dropout; online, in steps of one."""
    trainer = plain_trainer(
        folder,
        tokenizer,
        **{
            "model": tiny.model(attention_dropout=0.1),
            "save_strategy": "steps",
            "save_steps": 1,
            "learning_rate": 2e-2,
            "lr_scheduler_type": "linear",
            "per_device_train_batch_size": 1 if online else 2,
            **settings,
        },
    )
    attached = curriculum(
        policies=[SortBy(RSR), BestOf(RSR, per="prompt_id", k=2)] if online else [Shuffle()],
        observe=online,
        rescore=Rescore(every_steps=1, lag=2, fraction=0.5) if online else None,
    )
    attach(trainer, attached, pack_to=160 if online else PACK, pack_window=4, sample_log=True)
    trainer.batches = []
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, attached


@pytest.mark.parametrize(
    "online", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "observing and replanning"]
)
def test_a_resume_trains_the_packs_that_are_left(
    online: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole, attached = run(tmp_path / "whole", tokenizer, online=online)
    steps = whole.state.global_step
    if online:
        assert len(attached.plans) > 2
        assert len({plan.fingerprint for plan in attached.plans}) > 2
    per_epoch = steps // 2
    for step in (1, per_epoch, per_epoch + 2) if online else (2, per_epoch + 1):
        folder = tmp_path / f"rest-{step}"
        rest, _ = run(folder, tokenizer, tmp_path / "whole" / f"checkpoint-{step}", online=online)
        assert rest.batches == whole.batches[step:]
        for left, right in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
            assert torch.equal(left, right)
    for step in (2, steps):
        code, said = verified(tmp_path / "whole" / f"checkpoint-{step}")
        assert code == 0, said
        assert "log agrees" in said


def test_in_a_replanned_epoch_the_packs_trained_are_those_of_its_last_plan(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer, attached = run(tmp_path, tokenizer, online=True)
    packings = [summary.packed for summary in attached.summaries]
    last = {summary.epoch: plan for summary, plan in zip(attached.summaries, attached.plans, strict=True)}
    packs = []
    for plan in last.values():
        assert plan.packs is not None
        assert plan.num_rows == attached.planner.num_rows
        of_epoch = [plan.indices[start:stop].tolist() for start, stop in pairwise(plan.packs)]
        packs += [of_epoch[row % len(of_epoch)] for row in range(len(attached.sampler))]
        assert plan.weights.mean() == pytest.approx(1, abs=1e-3)
    assert trained(trainer) == [sample for pack in packs for sample in pack]
    assert None not in packings
    # the record on disk has the packs too
    assert [plan.fingerprint for plan in attached.plans] == [summary.plan_fingerprint for summary in attached.summaries]


@pytest.mark.parametrize(
    "batches",
    [
        {"per_device_train_batch_size": 3},
        pytest.param({"per_device_train_batch_size": 1, "dataloader_num_workers": 1}, marks=pytest.mark.slow),
        pytest.param({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resume_with_other_batches_trains_the_packs_that_are_left(
    batches: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole, attached = run(tmp_path / "whole", tokenizer, num_train_epochs=1)
    rest, _ = run(tmp_path / "rest", tokenizer, tmp_path / "whole" / "checkpoint-2", num_train_epochs=1, **batches)
    plan = attached.plans[0]
    assert plan.packs is not None
    left = plan.indices[plan.packs[4] :].tolist()
    assert trained(rest)[: len(left)] == left
    assert len(trained(whole)) >= len(plan)


@pytest.mark.parametrize("cut", [False, True])
def test_every_number_of_processes_trains_the_same_packs_in_each_step(cut: bool) -> None:
    rng = np.random.default_rng(0)
    packs = np.cumsum(np.r_[0, rng.integers(1, 5, 50)])
    plan = EpochPlan(indices=rng.permutation(packs[-1]), packs=packs)
    sampler = DistillSampler(50, packs=True)
    sampler.in_whole_steps(12, cut=cut)
    sampler.set_plan(plan)
    expected = [tuple(plan.indices[packs[row % 50] : packs[row % 50 + 1]].tolist()) for row in range(48 if cut else 60)]
    for processes in (1, 2, 3, 4):
        batches = BatchSampler(sampler, batch_size=12 // processes, drop_last=cut)
        shards = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
        dealt = list(zip(*shards, strict=True))
        assert [pack for row in dealt for batch in row for pack in batch] == expected


# ---- What is refused ----


def test_longer_samples_are_refused_truncated_or_split_as_asked(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=r"pack_to=90: 6 of 18 samples .*pack_overlong"):
        attach(plain_trainer(tmp_path, tokenizer), curriculum(), pack_to=90)
    with pytest.raises(ValueError, match=r"pack_overlong='drop'.*'refuse', 'truncate', 'split'"):
        attach(plain_trainer(tmp_path, tokenizer), curriculum(), pack_to=90, pack_overlong="drop")  # type: ignore[arg-type]
    before = plain_trainer(tmp_path, tokenizer).train_dataset
    for overlong in ("truncate", "split"):
        trainer = plain_trainer(tmp_path, tokenizer, max_steps=2)
        attached = curriculum(policies=[Shuffle()])
        attach(trainer, attached, pack_to=90, pack_overlong=overlong, unscorable="drop")  # type: ignore[arg-type]
        trainer.train()
        rows = trainer.train_dataset
        assert max(map(len, rows["input_ids"])) <= 90
        assert [len(row) for row in rows["labels"]] == [len(row) for row in rows["input_ids"]]
        source = attached.dataset.source_rows.tolist()
        if overlong == "truncate":
            assert rows["input_ids"] == [row[:90] for row in before["input_ids"]]
            assert source == list(range(18))
        else:
            whole: dict[int, list[int]] = {}
            for row, tokens in zip(source, rows["input_ids"], strict=True):
                whole[row] = whole.get(row, []) + tokens
            assert list(whole.values()) == before["input_ids"][:]
            assert len(rows) == 24
            assert rows["teacher"] == [before["teacher"][row] for row in source]


def test_data_that_was_packed_before_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for column, values in (("seq_lengths", [[40, 32]] * 18), ("position_ids", [[0, 1, 0, 1]] * 18)):
        trainer = plain_trainer(tmp_path, tokenizer)
        trainer.train_dataset = trainer.train_dataset.add_column(column, values)
        with pytest.raises(ValueError, match=f"{column}.*pack_to=.*unpack"):
            attach(trainer, curriculum())


def test_packs_with_a_sample_id_for_each_token_are_taken_apart_and_trained(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = plain_trainer(tmp_path, tokenizer)
    samples = trainer.train_dataset
    rows = [samples[start : start + 3] for start in range(0, len(samples), 3)]
    by_token = [name for name in ("input_ids", "labels") if name in samples.column_names]
    packed = Dataset.from_list(
        [
            {name: list(chain(*row[name])) if name in by_token else row[name] for name in samples.column_names}
            | {"sample": [number for number, tokens in enumerate(row["input_ids"]) for _ in tokens]}
            | {"seq_lengths": [len(tokens) for tokens in row["input_ids"]]}
            for row in rows
        ]
    )
    unpacked = unpack(packed, by="sample")
    kept = [name for name in samples.column_names if name != "attention_mask"]
    assert unpacked.select_columns(kept)[:] == samples.select_columns(kept)[:]
    trainer.train_dataset = unpacked
    attached = curriculum(policies=[Shuffle()])
    attach(trainer, attached, pack_to=PACK)
    trainer.train()
    assert trained(trainer) == [sample for pack in packs_planned(attached) for sample in pack]


def test_packs_that_cannot_be_taken_apart_are_refused() -> None:
    rows = {"input_ids": [[1, 2, 3]], "sample": [[0, 1, 0]], "short": [[0, 1]], "text": ["a"], "padded": [[0, 0, -1]]}
    packed = Dataset.from_dict(rows)
    assert unpack(packed, by="padded")["input_ids"] == [[1, 2]]
    for by, sentence in (
        ("sample", "row 0 is in several parts"),
        ("short", "3 tokens, but 2 sample ids"),
        ("text", "no list of sample ids"),
        ("seq", "no column 'seq'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            unpack(packed, by=by)


def test_a_collator_that_pads_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = plain_trainer(tmp_path, tokenizer)
    trainer.data_collator = DataCollatorForSeq2Seq(tokenizer)
    with pytest.raises(ValueError, match=r"DataCollatorForSeq2Seq.*DataCollatorWithFlattening"):
        attach(trainer, curriculum(), pack_to=PACK)


def test_what_pack_to_cannot_be_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for pack_to in ("max_length", "8k", 0, True):
        with pytest.raises(ValueError, match="pack_to"):
            attach(plain_trainer(tmp_path, tokenizer), curriculum(), pack_to=pack_to)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num_tokens=500.*pack_to="):
        attach(plain_trainer(tmp_path, tokenizer), curriculum(num_tokens=500))
    with pytest.raises(ValueError, match=r"num_samples=, num_tokens=.*one of the two"):
        curriculum(num_tokens=500, num_samples=3)


def test_an_epoch_has_as_many_packs_as_its_tokens_need(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = sft_trainer(tmp_path, tokenizer, max_length=PACK)
    attached = curriculum(num_tokens=15 * PACK - 100, policies=[KeepTop(RSR, fraction=0.7), Shuffle()])
    attach(trainer, attached, pack_to="max_length")
    trainer.train()
    assert [plan.num_rows for plan in attached.plans] == [15, 15]
    notes = " ".join(attached.summaries[0].notes)
    assert "15 packs of up to 240 tokens" in notes
    assert "from the plan's start once more" in notes


def test_evaluation_is_not_packed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = sft_trainer(tmp_path, tokenizer)
    attach(trainer, curriculum(), pack_to=PACK)
    (batch, *_) = trainer.get_eval_dataloader(trainer.train_dataset)
    assert "attention_mask" in batch
    assert len(batch["input_ids"]) == trainer.args.per_device_eval_batch_size


def test_another_packing_cannot_continue_a_run(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    run(tmp_path / "run", tokenizer, max_steps=1)
    for options, sentence in (
        ({"pack_to": PACK}, f"Resume with pack_to={PACK}, pack_window=4"),
        ({}, f"but here they have none. Resume with pack_to={PACK}"),
    ):
        trainer = plain_trainer(tmp_path / "other", tokenizer, max_steps=2)
        attach(trainer, curriculum(policies=[Shuffle()]), **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=sentence):
            trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_models_whose_samples_see_each_other_are_refused(kind: str) -> None:
    for collator in (DataCollatorWithFlattening(), padding_free()):
        with pytest.raises(ValueError, match=r"pack_to=.*without pack_to="):
            refuse_crossing(zoo.build(kind), collator)


def padding_free() -> Any:
    return DataCollatorForLanguageModeling(pad_token_id=257, padding_free=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", zoo.MODEL_TYPES)
def test_a_model_is_refused_just_where_a_pack_is_not_the_sum_of_its_samples(kind: str) -> None:
    try:
        model = zoo.build(kind)
    except Exception as error:
        pytest.skip(f"transformers cannot build it tiny: {type(error).__name__}")
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, 250, length).tolist() for length in (17, 9, 30)]
    for collator in (DataCollatorWithFlattening(), padding_free()):
        inputs = collator([{"input_ids": text, "labels": text} for text in texts])
        labels = inputs.pop("labels")
        try:
            refuse_crossing(model, collator)
            refused = False
        except ValueError:
            refused = True
        try:
            packed, of_packed = loss_and_gradient(model, inputs, labels)
            rows = [torch.tensor([text]) for text in texts]
            alone = [loss_and_gradient(model, {"input_ids": row}, row) for row in rows]
        except (ValueError, TypeError, AssertionError):
            assert refused
            continue
        gradient = sum(each for _, each in alone)
        assert isinstance(gradient, torch.Tensor)
        same = abs(packed / sum(loss for loss, _ in alone) - 1) < 1e-5
        same &= bool((of_packed - gradient).norm() < 1e-4 * gradient.norm())
        assert refused != same


def loss_and_gradient(model: Any, inputs: Any, labels: torch.Tensor) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits.float()
    loss = cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    loss.backward()
    parts = [torch.zeros_like(part) if part.grad is None else part.grad for part in model.parameters()]
    return loss.item(), torch.cat([part.flatten() for part in parts])
