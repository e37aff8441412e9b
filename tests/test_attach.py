"""The drop-in, through real trainers: what is trained is what was planned, and the trainer stays what it was."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
import trl
from accelerate import Accelerator
from packaging.version import Version
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from distill_sampler import (
    BestOf,
    Curriculum,
    CurriculumLoop,
    KeepTop,
    LocalNaturalness,
    RankSurprisalRatio,
    RuleQuality,
    ScoredDataset,
    Scorer,
    Shuffle,
    SortBy,
    attach,
)
from distill_sampler.integrations import versions
from tests import tiny

NEWER = Version(transformers.__version__) >= Version("5.2")
GROUPED = {"train_sampling_strategy": "group_by_length"} if NEWER else {"group_by_length": True}
RSR = "rank_surprisal_ratio"


def curriculum(**changes: Any) -> Curriculum:
    settings: dict[str, Any] = {
        "metrics": [RankSurprisalRatio()],
        "policies": [BestOf(RSR, per="prompt_id"), Shuffle()],
        "scorer": Scorer(progress=False),
        **changes,
    }
    return Curriculum(**settings)


def arguments(output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }


class Recorded:
    """Mixed into a trainer: notes the rows of every batch where the loss is computed."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            vars(self).setdefault("batches", []).append(rows_of(inputs))
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]


class RecordedTrainer(Recorded, Trainer):
    pass


class RecordedSFTTrainer(Recorded, SFTTrainer):
    pass


def rows_of(inputs: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """The samples of a batch as tuples of token ids, padded or laid end to end."""
    if "attention_mask" in inputs:
        pairs = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        return [tuple(row[kept].tolist()) for row, kept in pairs]
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    return [tuple(part.tolist()) for part in torch.tensor_split(inputs["input_ids"][0], starts[1:])]


def trained(trainer: Any) -> list[int]:
    """Sample indices in the order that they were trained on."""
    index = {tuple(row["input_ids"]): place for place, row in enumerate(trainer.train_dataset)}
    return [index[row] for batch in trainer.batches for row in batch]


def planned(attached: Curriculum) -> list[int]:
    """The plans of all epochs, each completed from its start to whole optimizer steps."""
    places = np.arange(-(-attached.num_samples // attached.sampler.per_step) * attached.sampler.per_step)
    return [index for plan in attached.plans for index in plan.indices[places % len(plan)].tolist()]


def sft_trainer(
    output: Path, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset | None = None, **changes: Any
) -> Any:
    extra = {name: changes.pop(name) for name in ("model", "peft_config", "callbacks") if name in changes}
    return RecordedSFTTrainer(
        model=extra.pop("model", None) or tiny.model(),
        processing_class=tokenizer,
        train_dataset=tiny.candidates() if rows is None else rows,
        args=SFTConfig(**{"bf16": False, **arguments(output, gradient_checkpointing=False, **changes)}),
        **extra,
    )


def truncating(mode: str) -> dict[str, str]:
    """The setting of `SFTConfig` that keeps this end of a long row. TRL before 1.0 always keeps the start."""
    if Version(trl.__version__) >= Version("1.0"):
        return {"truncation_mode": mode}
    if mode == "keep_end":
        pytest.skip("truncation_mode came with TRL 1.0")
    return {}


def plain_trainer(output: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Any:
    return RecordedTrainer(
        model=changes.pop("model", None) or tiny.model(),
        processing_class=tokenizer,
        train_dataset=tiny.tokenised(tiny.candidates(), tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        args=TrainingArguments(**arguments(output, **changes)),
    )


TRAINERS: dict[str, Callable[..., Any]] = {"Trainer": plain_trainer, "SFTTrainer": sft_trainer}


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_order_trained_is_the_order_planned(
    kind: str, workers: int, accumulation: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = TRAINERS[kind](
        tmp_path, tokenizer, dataloader_num_workers=workers, gradient_accumulation_steps=accumulation
    )
    attached = curriculum()
    attach(trainer, attached)
    trainer.train()
    assert len(attached.plans) == 2
    assert trained(trainer) == planned(attached)


def test_each_epoch_trains_on_the_best_response_of_each_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = sft_trainer(tmp_path, tokenizer)
    attached = curriculum()
    attach(trainer, attached)
    trainer.train()
    prompts = trainer.train_dataset["prompt_id"]
    for taken, plan in zip(attached.cycle.record.passes, attached.plans, strict=True):
        scores = taken.columns[RSR]
        best = {
            min((i for i, p in enumerate(prompts) if p == prompt), key=lambda i: scores[i]) for prompt in set(prompts)
        }
        assert set(plan.indices.tolist()) == best
    assert attached.cycle.record.passes[1].step == 3  # scored anew by the student after epoch 0
    assert not np.allclose(*(taken.columns[RSR] for taken in attached.cycle.record.passes))


@pytest.mark.parametrize("kind", TRAINERS)
def test_with_only_shuffle_losses_and_weights_are_the_stock_trainers(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    attached = curriculum(policies=[Shuffle()])
    ours = TRAINERS[kind](tmp_path, tokenizer, model=tiny.model(attention_dropout=0.1))
    attach(ours, attached)
    ours.train()
    stock = TRAINERS[kind](tmp_path, tokenizer, model=tiny.model(attention_dropout=0.1))
    order = iter([plan.indices.tolist() for plan in attached.plans])

    class SameOrder(torch.utils.data.Sampler[int]):
        def __len__(self) -> int:
            return len(attached.plans[0])

        def __iter__(self) -> Any:
            return iter(next(order))

    stock._get_train_sampler = lambda dataset=None: SameOrder()
    stock.train()
    losses = [[line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in (ours, stock)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 18
    for left, right in zip(ours.model.parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_log_carries_the_curriculums_numbers_once_an_epoch(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    reported: list[dict[str, Any]] = []

    class Reporter(TrainerCallback):
        """Stands for whatever `report_to` names: those are callbacks too."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            reported.append(dict(logs))

    trainer = sft_trainer(tmp_path, tokenizer, callbacks=[Reporter()])
    attached = curriculum()
    attach(trainer, attached)
    trainer.train()
    for lines in (reported, trainer.state.log_history):
        lines = [line for line in lines if "curriculum/score_age_max" in line]
        assert len(lines) == 2
        for line in lines:
            assert sum(line.get(f"curriculum/share/{teacher}", 0) for teacher in tiny.TEACHERS) == pytest.approx(1)
            assert line[f"curriculum/{RSR}/chosen"] < line[f"curriculum/{RSR}/candidates"]
            assert len([name for name in line if name.startswith("curriculum/")]) <= 2 * 2 + 3 + 3
            assert "loss" in line
    shares = [line["curriculum/scoring_share"] for line in reported if "curriculum/scoring_share" in line]
    assert len(shares) == 2
    assert all(0 < share < 1 for share in shares)
    # SFTTrainer's own running means were not flushed by a line of ours
    assert all("entropy" in line for line in reported if "loss" in line)


def test_each_rescoring_prints_one_table(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = sft_trainer(tmp_path, tokenizer)
    attach(trainer, curriculum(scorer=Scorer(progress=True)))
    trainer.train()
    printed = capsys.readouterr().err
    assert printed.count("candidates, plan") == 2
    assert all(teacher in printed for teacher in tiny.TEACHERS)


# ---- Formats ----


def scored_texts(trainer: Any, attached: Curriculum, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    samples = [attached.dataset.sample(index) for index in range(len(attached.dataset))]
    return [tokenizer.decode(sample.input_ids[sample.scored]) for sample in samples]


def answers() -> list[str]:
    return [row["completion"][0]["content"] for row in tiny.candidates()]


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": row["prompt"] + row["completion"]}


def as_strings(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"][0]["content"] + "\n", "completion": row["completion"][0]["content"]}


def as_text(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": row["prompt"][0]["content"] + "\n" + row["completion"][0]["content"]}


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (lambda rows: rows, {}),
        (lambda rows: rows, {"completion_only_loss": False}),
        (lambda rows: rows, {"padding_free": True, "max_length": None}),
        (lambda rows: rows.map(as_messages, remove_columns=["prompt", "completion"]), {}),
        (lambda rows: rows.map(as_messages, remove_columns=["prompt", "completion"]), {"assistant_only_loss": True}),
        (lambda rows: rows.map(as_strings), {}),
        (lambda rows: rows.map(as_strings), {"completion_only_loss": False}),
    ],
    ids=[
        "prompt-completion",
        "prompt-completion, trained on both",
        "padding_free",
        "messages",
        "messages, assistant_only_loss",
        "strings",
        "strings, trained on both",
    ],
)  # fmt: skip
def test_every_format_scores_the_responses_and_trains_the_plan(
    rows: Any, settings: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = sft_trainer(tmp_path, tokenizer, rows=rows(tiny.candidates()), **settings)
    attached = curriculum()
    attach(trainer, attached)
    assert scored_texts(trainer, attached, tokenizer) == answers()
    trainer.train()
    assert trained(trainer) == planned(attached)


def test_plain_text_scores_all_of_it_on_request(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = tiny.candidates().map(as_text, remove_columns=["prompt", "completion"])
    trainer = sft_trainer(tmp_path, tokenizer, rows=rows)
    attached = curriculum()
    attach(trainer, attached, score_whole_text=True)
    assert scored_texts(trainer, attached, tokenizer) == [
        text[1:] for text in rows["text"]
    ]  # nothing predicts the first
    trainer.train()
    assert trained(trainer) == planned(attached)


def test_all_turns_of_the_assistant_are_scored(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [("user", "1+1?"), ("assistant", "two"), ("user", "sure?"), ("assistant", "quite sure")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = datasets.Dataset.from_list(
        [{"messages": messages, "prompt_id": "a"}, {"messages": messages[:2], "prompt_id": "a"}]
    )
    for settings in ({}, {"assistant_only_loss": True}):
        trainer = sft_trainer(tmp_path, tokenizer, rows=rows, **settings)
        attached = curriculum()
        attach(trainer, attached)
        assert scored_texts(trainer, attached, tokenizer) == ["twoquite sure", "two"]


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated")
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_a_truncated_response_is_scored_as_far_as_it_goes(
    mode: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    messages = tiny.candidates().map(as_messages, remove_columns=["prompt", "completion"])
    trainer = sft_trainer(tmp_path, tokenizer, rows=messages, max_length=75, **truncating(mode))
    attached = curriculum()
    attach(trainer, attached)
    for text, answer in zip(scored_texts(trainer, attached, tokenizer), answers(), strict=True):
        assert answer.startswith(text) if mode == "keep_start" else answer.endswith(text)
        assert len(text) > 10


def test_the_end_marker_is_scored_on_request(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = sft_trainer(tmp_path, tokenizer)
    attached = curriculum()
    attach(trainer, attached, score_end_marker=True)
    assert scored_texts(trainer, attached, tokenizer) == [f"{answer}<|im_end|>\n" for answer in answers()]


def test_a_lora_student_is_scored_as_it_is_trained(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    peft = pytest.importorskip("peft", reason="the extra 'demo' is not installed")
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    trainer = sft_trainer(tmp_path, tokenizer, peft_config=config, num_train_epochs=3)
    attached = curriculum()
    attach(trainer, attached)
    trainer.train()
    assert trained(trainer) == planned(attached)
    first, _, last = (taken.columns["mean_surprisal"] for taken in attached.cycle.record.passes)
    assert last.mean() < first.mean()  # the adapter has learnt, and the scores show it


def test_gradient_checkpointing_goes_on_after_scoring(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = plain_trainer(tmp_path, tokenizer, gradient_checkpointing=True)
    attached = curriculum()
    attach(trainer, attached)
    trainer.train()
    assert trained(trainer) == planned(attached)
    assert trainer.model.is_gradient_checkpointing


# ---- Resume ----


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("stop", [1, 3, 4, 5, 6])
def test_a_resumed_run_trains_what_the_uninterrupted_one_does(
    kind: str, stop: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "dataloader_num_workers": 0}

    def run(folder: Path, **options: Any) -> tuple[Any, Curriculum]:
        trainer = TRAINERS[kind](folder, tokenizer, model=tiny.model(attention_dropout=0.1), **settings)
        trainer.batches = []
        attached = curriculum()
        attach(trainer, attached)
        trainer.train(**options)
        return trainer, attached

    whole, uninterrupted = run(tmp_path / "whole")
    rest, attached = run(tmp_path / "rest", resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert trained(rest) == trained(whole)[2 * stop :]
    assert attached.times_trained().tolist() == uninterrupted.times_trained().tolist()
    assert attached.times_trained().sum() == 12
    assert len(attached.summaries) == (1 if stop <= 3 else 0)  # the plan of a begun epoch is loaded, not made again
    assert list(attached.plans) == list(uninterrupted.plans)
    for left, right in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_training_again_starts_again(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = sft_trainer(tmp_path, tokenizer)
    attached = curriculum()
    attach(trainer, attached)
    trainer.train()
    scored_first = attached.cycle.record.passes[0]
    trainer.batches.clear()
    trainer.train()
    assert len(attached.plans) == 2  # not four
    assert trained(trainer) == planned(attached)
    assert len(attached.cycle.record.passes) == 2
    assert not np.allclose(
        attached.cycle.record.passes[0].columns[RSR], scored_first.columns[RSR]
    )  # a student that learnt


def test_a_checkpoint_of_other_data_or_without_a_curriculum_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    first = sft_trainer(tmp_path / "a", tokenizer, **saving)
    attach(first, curriculum())
    first.train()
    other = sft_trainer(tmp_path / "b", tokenizer, rows=tiny.candidates().select(range(17)), **saving)
    attach(other, curriculum())
    with pytest.raises(ValueError, match=r"another configuration \(.*dataset: was"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    stock = sft_trainer(tmp_path / "c", tokenizer, **saving, max_steps=1)
    stock.train()
    late = sft_trainer(tmp_path / "c", tokenizer, **saving)
    attach(late, curriculum())
    with pytest.raises(ValueError, match="written without a curriculum"):
        late.train(resume_from_checkpoint=True)


# ---- Bad input: a sentence each ----


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"packing": True}, "packing=True.*packing=False.*pack_to"),
        (GROUPED, "group_by_length.*Leave it at"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True.*Leave it at False"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True.*per_device_train_batch_size"),
    ],
)  # fmt: skip
def test_settings_that_break_a_promise_are_refused_in_a_sentence(
    settings: dict[str, Any], sentence: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = sft_trainer(tmp_path, tokenizer, **settings)
    with pytest.raises(ValueError, match=sentence):
        attach(trainer, curriculum())


def test_a_second_attach_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = sft_trainer(tmp_path, tokenizer)
    attach(trainer, curriculum())
    with pytest.raises(ValueError, match="already attached"):
        attach(trainer, curriculum())


def test_a_curriculum_drives_one_trainer_or_loop(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, dataset: ScoredDataset
) -> None:
    attached = curriculum()
    attach(sft_trainer(tmp_path, tokenizer), attached)
    plan_length = attached.num_samples
    with pytest.raises(ValueError, match=r"attached to a RecordedSFTTrainer already.*second Curriculum"):
        attach(plain_trainer(tmp_path, tokenizer), attached)
    with pytest.raises(ValueError, match=r"attached to a RecordedSFTTrainer already.*second Curriculum"):
        CurriculumLoop(attached, dataset, Accelerator(cpu=True))
    of_a_loop = curriculum()
    CurriculumLoop(of_a_loop, dataset, Accelerator(cpu=True))
    with pytest.raises(ValueError, match="attached to a CurriculumLoop already"):
        attach(plain_trainer(tmp_path, tokenizer), of_a_loop)
    assert attached.num_samples == plan_length  # the first one is what it was


def test_an_attach_that_was_refused_can_be_repeated(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    attached = curriculum(observe=True)
    with pytest.raises(ValueError, match="torch_compile"):
        attach(plain_trainer(tmp_path, tokenizer, torch_compile=True), attached)
    attach(plain_trainer(tmp_path, tokenizer), attached)


def test_a_data_set_replaced_after_attach_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = sft_trainer(tmp_path, tokenizer)
    attach(trainer, curriculum())
    trainer.train_dataset = trainer.train_dataset.select(range(17, -1, -1))
    with pytest.raises(ValueError, match=r"train_dataset was replaced after attach.*before attach"):
        trainer.train()


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_batch_that_is_not_the_plans_stops_the_run(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def trainer(folder: Path, **options: Any) -> Any:
        made = TRAINERS[kind](folder, tokenizer, num_train_epochs=1)
        collate = made.data_collator

        def cut(rows: list[dict[str, Any]]) -> Any:
            return {name: values[:, :40] for name, values in collate(rows).items()}

        made.data_collator = cut
        attach(made, curriculum(), **options)
        return made

    with pytest.raises(ValueError, match=r"does not hold the tokens of sample \d+.*at place 0.*collator.*sample_log"):
        trainer(tmp_path / "a", sample_log=True).train()
    trainer(tmp_path / "b").train()  # nobody looks at the batches


def test_two_trainers_in_one_folder_at_once_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    other = plain_trainer(tmp_path / "run", tokenizer, **saving)
    attach(other, curriculum())

    class TrainsAnother(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            other.train()

    trainer = plain_trainer(tmp_path / "elsewhere" / ".." / "run", tokenizer, **saving)
    attach(trainer, curriculum())
    trainer.add_callback(TrainsAnother())
    with pytest.raises(ValueError, match=r"Another trainer of this process.*output_dir of its own"):
        trainer.train()
    assert len(trainer.batches) == 1
    other.train()  # once the first has ended, the folder is free
    assert len(other.batches) == 6


def test_a_streaming_data_set_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = sft_trainer(tmp_path, tokenizer, rows=tiny.candidates().to_iterable_dataset(), max_steps=2)
    with pytest.raises(ValueError, match=r"IterableDataset.*without streaming=True"):
        attach(trainer, curriculum())


def test_a_misspelt_column_is_answered_with_the_closest(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = sft_trainer(tmp_path, tokenizer)
    sentence = r"no column 'prompt_di'.*'teacher'.*Did you mean 'prompt_id'"
    with pytest.raises(ValueError, match=sentence):
        attach(trainer, curriculum(policies=[BestOf(RSR, per="prompt_di")]))


def test_a_group_of_one_candidate_keeps_it(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = tiny.candidates().select([0, 3, 4, 5])
    trainer = sft_trainer(tmp_path, tokenizer, rows=rows)
    attached = curriculum()
    attach(trainer, attached)
    trainer.train()
    assert all(0 in plan.indices for plan in attached.plans)


def test_a_sample_with_nan_logits_is_never_chosen_and_said(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.candidates().to_list()
    rows[4]["completion"][0]["content"] += " Zonk"
    model = tiny.model()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("Z")["input_ids"][0]] = float("nan")
    trainer = sft_trainer(tmp_path, tokenizer, rows=datasets.Dataset.from_list(rows), model=model)
    attached = curriculum(scorer=Scorer(progress=True))
    attach(trainer, attached)
    trainer.train()
    assert all(4 not in plan.indices and len(plan) == 6 for plan in attached.plans)
    assert [len(summary.scoring.non_finite) for summary in attached.summaries] == [1, 1]
    said = " ".join(capsys.readouterr().err.split())
    assert "NaN or infinite for 1 samples (first: sample 4)" in said
    assert "weights are NaN or infinite (model.embed_tokens.weight" in said
    assert attached.summaries[0].scoring.non_finite_weights.startswith("model.embed_tokens.weight")


def test_nan_weights_are_called_nan_weights(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    trainer = sft_trainer(tmp_path, tokenizer, model=model)
    attach(trainer, curriculum())
    with pytest.raises(ValueError, match=r"weights are NaN or infinite \(model\.layers\.0\.mlp\.up_proj\.weight\)"):
        trainer.train()


def test_the_extension_points_of_the_trainer_are_where_we_expect_them() -> None:
    """If a release of transformers renames one, this fails, and only this needs to be read."""
    assert callable(Trainer._get_train_sampler)
    assert SFTTrainer._get_train_sampler is Trainer._get_train_sampler
    if not versions.BEGINS_ANYWHERE:
        return  # BeginsInLoop counts the steps of these releases
    assert SFTTrainer._init_training_state is Trainer._init_training_state
    assert list(inspect.signature(Trainer._init_training_state).parameters)[1:3] == [
        "max_steps",
        "num_update_steps_per_epoch",
    ]


def test_policies_that_need_no_scores_score_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = sft_trainer(tmp_path, tokenizer)
    attached = curriculum(metrics=[], policies=[Shuffle()])
    attach(trainer, attached)
    trainer.train()
    assert trained(trainer) == planned(attached)
    assert attached.cycle.record.passes == []


def test_selection_and_order_compose(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = sft_trainer(tmp_path, tokenizer)
    attached = curriculum(policies=[KeepTop(RSR, fraction=0.5), SortBy(RSR)])
    attach(trainer, attached)
    trainer.train()
    assert trained(trainer) == planned(attached)
    for taken, plan in zip(attached.cycle.record.passes, attached.plans, strict=True):
        scores = taken.columns[RSR]
        assert scores[plan.indices].tolist() == sorted(scores.tolist())[:9]


def test_metrics_that_read_text_get_the_trainers_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = sft_trainer(tmp_path, tokenizer)
    attached = curriculum(
        metrics=[LocalNaturalness(window=1), RuleQuality()],
        policies=[BestOf("local_naturalness", per="prompt_id"), SortBy("rule_quality")],
    )
    attach(trainer, attached)
    trainer.train()
    assert trained(trainer) == planned(attached)
    assert np.isfinite(attached.store.latest["local_naturalness"]).all()
