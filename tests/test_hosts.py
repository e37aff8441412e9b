"""Trainers of other projects: reductions of theirs to what decides the order, called as their projects call them."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, Trainer, TrainingArguments

from distill_sampler import BestOf, Curriculum, RankSurprisalRatio, Shuffle, attach, attached, detach
from tests import tiny
from tests.test_attach import RSR, RecordedTrainer, arguments, curriculum, planned, trained

TOKENS = ["input_ids", "attention_mask", "labels"]


class LlamaFactorys(RecordedTrainer):
    """As LLaMA-Factory's `CustomSeq2SeqTrainer`: what the sampler reads is set after the constructor of `Trainer`."""

    def __init__(self, *args: Any, disable_shuffling: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.disable_shuffling = disable_shuffling

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_shuffling:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]
        return super()._get_train_sampler(*args, **kwargs)


class Swifts(RecordedTrainer):
    """As ms-swift's: a data loader of its own, which asks for no sampler, and a `train` around that of `Trainer`."""

    prepared = 0

    def get_train_dataloader(self, skip_batches: int = 0) -> Any:
        return torch.utils.data.DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.prepared += 1
        return super().train(*args, **kwargs)


class Axolotls(RecordedTrainer):
    """As axolotl's: packs in a batch sampler if it is configured so; builds the loader from `sampler_fn`."""

    packs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.packs:
            return torch.utils.data.BatchSampler(range(len(train_dataset)), 2, drop_last=True)
        return super()._get_train_sampler(train_dataset)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._get_dataloader(dataset, *args, **kwargs)


class Deaf(RecordedTrainer):
    """Overrides a method further down, and does not ask for a sampler either."""

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._get_dataloader(dataset, *args, **{**kwargs, "sampler_fn": None})


def made(kind: type[Trainer], output: Path, tokenizer: PreTrainedTokenizerBase, **own: Any) -> Any:
    """A trainer whose host has dropped every column but the tokens."""
    rows = tiny.tokenised(tiny.candidates(), tokenizer)
    rows = rows.map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})
    return kind(
        model=tiny.model(),
        processing_class=tokenizer,
        train_dataset=rows.select_columns(TOKENS),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        args=TrainingArguments(**arguments(output)),
        **own,
    )


def check(trainer: Any, attached_curriculum: Curriculum) -> None:
    """What was trained is what was planned: one response to each of the six prompts."""
    assert trained(trainer) == planned(attached_curriculum)
    assert all(sorted(plan.indices // 3) == [0, 1, 2, 3, 4, 5] for plan in attached_curriculum.plans)


@pytest.mark.parametrize(
    ("kind", "options"), [(LlamaFactorys, {}), (Axolotls, {}), (Swifts, {"replace_sampler": True})]
)
def test_trainers_that_others_make_and_train_follow_the_plan(
    kind: type[Any], options: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    made_by_host: list[Any] = []

    def run_exp() -> None:
        made_by_host.append(made(kind, tmp_path, tokenizer))
        made_by_host[0].train()

    original, ours = Trainer.__init__, curriculum()
    with attached(ours, prompt_column="prompt_id", **options):
        run_exp()
    assert Trainer.__init__ is original
    (trainer,) = made_by_host
    check(trainer, ours)
    assert not isinstance(trainer, Swifts) or trainer.prepared == 1
    before = detach(trainer)
    assert before is ours
    assert "get_train_dataloader" not in vars(trainer)


@pytest.mark.parametrize(
    ("kind", "own", "sentence"),
    [
        (LlamaFactorys, {"disable_shuffling": True}, r"LlamaFactorys .*SequentialSampler.*replace_sampler=True"),
        (Swifts, {}, r"Swifts .*data loader \(get_train_dataloader\).*replace_sampler=True"),
    ],
)
def test_an_order_of_the_trainers_own_is_refused_until_its_replacement_is_asked_for(
    kind: type[Any],
    own: dict[str, Any],
    sentence: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = made(kind, tmp_path, tokenizer, **own)
    with pytest.raises(ValueError, match=sentence):
        attach(trainer, curriculum(), prompt_column="prompt_id")
    ours = curriculum()
    attach(trainer, ours, prompt_column="prompt_id", replace_sampler=True)
    assert f"the plan takes the place of its {'sampler' if own else 'data loader'}" in caplog.text
    trainer.train()
    check(trainer, ours)


def test_a_sampler_that_packs_batches_is_refused_all_the_same(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Axolotls, "packs", True)
    with pytest.raises(ValueError, match=r"Axolotls draws whole batches \(BatchSampler\).*Turn that setting"):
        attach(made(Axolotls, tmp_path, tokenizer), curriculum(), prompt_column="prompt_id", replace_sampler=True)


def test_packs_need_the_data_loaders_of_transformers(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"pack_to=.*Axolotls overrides _get_dataloader"):
        attach(made(Axolotls, tmp_path, tokenizer), curriculum(), prompt_column="prompt_id", pack_to=400)


def test_a_trainer_that_does_not_draw_from_the_plan_stops_before_it_trains(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = made(Deaf, tmp_path, tokenizer)
    attach(trainer, curriculum(), prompt_column="prompt_id")
    with pytest.raises(ValueError, match=r"Deaf has read a batch, but not from the plan.*distill-sampler select"):
        trainer.train()
    assert not hasattr(trainer, "batches")


def test_a_block_in_which_nothing_is_trained_is_an_error() -> None:
    original = Trainer.__init__
    with pytest.raises(ValueError, match=r"attached\(curriculum\): no trainer"), attached(curriculum()):
        pass
    with pytest.raises(TypeError, match="promt_column"), attached(curriculum(), promt_column="prompt_id"):
        pass
    assert Trainer.__init__ is original


def test_a_second_trainer_in_the_block_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with attached(curriculum(metrics=[], policies=[Shuffle()])):
        made(LlamaFactorys, tmp_path / "a", tokenizer).train()
        second = made(LlamaFactorys, tmp_path / "b", tokenizer)
        with pytest.raises(ValueError, match="attached to a LlamaFactorys already"):
            second.train()


def test_a_column_for_the_prompts_needs_a_new_name(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="column 'labels' already"):
        attach(made(LlamaFactorys, tmp_path, tokenizer), curriculum(), prompt_column="labels")


# ---- axolotl's plug-in ----


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """The plug-in, with a base class as axolotl's where axolotl is not installed."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = object  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    pytest.importorskip("pydantic", reason="axolotl would bring it")
    module = __import__("distill_sampler.integrations.axolotl", fromlist=["CurriculumPlugin"])
    monkeypatch.delitem(sys.modules, module.__name__)
    plugin: Callable[[], Any] = module.CurriculumPlugin
    return plugin


SECTION = {
    "metrics": "rsr",
    "policies": ["BestOf(rsr, per=prompt_id)", "Shuffle"],
    "attach": {"prompt_column": "prompt_id"},
}


def test_a_curriculum_from_yaml_alone(
    plugin: Callable[[], Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = made(Axolotls, tmp_path, tokenizer)
    trainer.args.max_steps = 18  # axolotl's count: two epochs of all 18 candidates, two in a step
    plugin().post_trainer_create({"distill_sampler": SECTION}, trainer)
    trainer.train()
    check(trainer, ours := detach(trainer))
    assert trainer.state.global_step == 6
    assert len(ours.plans) == 2
    assert plugin().get_input_args() == "distill_sampler.integrations.axolotl.CurriculumInput"


def test_a_number_of_steps_in_the_yaml_is_kept(
    plugin: Callable[[], Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = made(Axolotls, tmp_path, tokenizer)
    trainer.args.max_steps = 2
    plugin().post_trainer_create({"distill_sampler": SECTION, "max_steps": 2}, trainer)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        (None, "no section distill_sampler"),
        ({"metrics": "rsr"}, "no policies:"),
        ({**SECTION, "polices": []}, r"no setting 'polices'.*section distill_sampler.*Did you mean 'policies'"),
        ({**SECTION, "rescore": "often"}, "Rescore"),
    ],
)
def test_a_wrong_section_is_refused_by_name(
    section: Any, sentence: str, plugin: Callable[[], Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=sentence):
        plugin().post_trainer_create({"distill_sampler": section}, made(Axolotls, tmp_path, tokenizer))


def test_the_prompt_column_tells_prompts_apart_by_their_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    ours = Curriculum(metrics=[RankSurprisalRatio()], policies=[BestOf(RSR, per="prompt_id")])
    trainer = made(LlamaFactorys, tmp_path, tokenizer)
    attach(trainer, ours, prompt_column="prompt_id")
    column = ours.dataset.column("prompt_id")
    assert column.codes.tolist() == [prompt for prompt in range(6) for _ in range(3)]
    assert ours.dataset.samples([4], ["prompt_id"])[0].columns["prompt_id"] == column.values[1]
    assert trainer.train_dataset.column_names == TOKENS
