"""What a run makes of its objectives' teachers: observed scores, and a notice of another chat template."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from distill_sampler import (
    Curriculum,
    CurriculumLoop,
    GlobalNaturalness,
    HiddenHints,
    Metric,
    ModelReader,
    Objective,
    ScoredDataset,
    SoftTargets,
    TeacherStudentGap,
    attach,
)
from distill_sampler.objectives import live
from distill_sampler.protocols import ObjectiveTap
from distill_sampler.types import View
from tests import tiny
from tests.objectives.test_soft_targets import curriculum, teacher
from tests.objectives.test_stored_targets import store_of
from tests.online.test_loss_weights import trainer_of
from tests.online.test_observing import observing

GAP = "teacher_student_gap"


class InTraining(TrainerCallback):
    """Forgets the batches that the first scoring pass has read."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        self.shapes = shapes

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.shapes.clear()


def forwards_of(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """Notes the shape of each batch that a model reads."""
    shapes: list[tuple[int, ...]] = []
    layer = model.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    return shapes


@pytest.mark.parametrize("alpha", [0.5, 0.0])
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer, padding-free"])
def test_the_gap_to_an_objectives_teacher_is_observed_at_no_extra_forward(
    kind: str, alpha: float, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    guide = teacher()
    settings: dict[str, Any] = {"padding_free": True, "max_length": None} if "free" in kind else {}
    shapes = forwards_of(guide)

    def run(*metrics: Any) -> Curriculum:
        trainer = trainer_of(kind.split(",")[0], tmp_path, tokenizer, learning_rate=0.0, **settings)
        trainer.add_callback(InTraining(shapes))
        given = observing(metrics=[GlobalNaturalness(), *metrics])
        attach(trainer, given, objective=[SoftTargets(guide, alpha=alpha), HiddenHints(guide, weight=0.0)])
        trainer.train()
        return given

    run()
    without = [shape for shape in shapes if shape[1] > 4]  # no probe of the library's
    given = run(TeacherStudentGap(teacher=ModelReader(guide)))
    with_gap = [shape for shape in shapes if shape[1] > 4]
    seen = given.store.observed
    assert (seen.step >= 0).all()
    (first,) = given.cycle.record.passes  # of the same weights: nothing was learned
    np.testing.assert_allclose(seen.columns[GAP], first.columns[GAP], rtol=1e-4, atol=1e-6)
    assert len(np.unique(seen.columns[GAP])) == 6
    assert len(without) == (3 if alpha else 0)
    assert with_gap == (without or with_gap)
    assert len(with_gap) == 3


@dataclass(frozen=True)
class TeacherEntropy(Metric):
    """What the teacher does not know: a statistic that is only computed on request."""

    teacher: ModelReader

    @property
    def name(self) -> str:
        return "teacher_entropy"

    @property
    def higher_is_better(self) -> bool:
        return False

    @property
    def readers(self) -> dict[str, Any]:
        return {"teacher": self.teacher}

    @property
    def uses_statistics(self) -> tuple[str, ...]:
        return ("entropy",)

    def views(self, sample: Any) -> list[View]:
        return [View(input_ids=sample.input_ids, scored=sample.scored, reader="teacher")]

    def reduce(self, sample: Any, stats: Any) -> dict[str, float]:
        return {self.name: float(stats[0].entropy.mean())}


def test_every_statistic_of_a_teacher_that_reads_along_is_observed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    guide = teacher()
    trainer = trainer_of("Trainer", tmp_path, tokenizer, learning_rate=0.0)
    given = observing(metrics=[GlobalNaturalness(), TeacherEntropy(ModelReader(guide))])
    attach(trainer, given, objective=SoftTargets(guide))
    trainer.train()
    (first,) = given.cycle.record.passes
    seen = given.store.observed
    np.testing.assert_allclose(seen.columns["teacher_entropy"], first.columns["teacher_entropy"], rtol=1e-4)


def test_the_gap_to_a_stored_teacher_is_observed_without_a_forward(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    store = str(store_of(teacher(), tmp_path / "guide.arrow", tokenizer, 5))
    trainer = trainer_of("SFTTrainer", tmp_path, tokenizer, learning_rate=0.0)
    given = observing(metrics=[TeacherStudentGap(teacher=store)])
    attach(trainer, given, objective=SoftTargets(store))
    trainer.train()
    (first,) = given.cycle.record.passes
    np.testing.assert_allclose(given.store.observed.columns[GAP], first.columns[GAP], rtol=1e-4, atol=1e-6)


def test_the_gap_to_a_teacher_that_does_not_read_along_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = trainer_of("SFTTrainer", tmp_path, tokenizer)
    given = observing(metrics=[TeacherStudentGap(teacher=ModelReader(teacher()))])
    with pytest.raises(ValueError, match=rf"observe=True: {GAP}.*teacher of an objective.*observe=False"):
        attach(trainer, given, objective=SoftTargets(teacher()))


def saved(folder: Path, template: str | None) -> PreTrainedModel:
    """A teacher in a folder of its own, with a tokenizer that has this template."""
    teacher().save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tiny.LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (tiny.CHATML.replace("<|im_end|>", "</s>"), True),
        (tiny.CHATML + "{# the same conversation #}", False),
        (None, False),
        ("{{ raise_exception('no such turn') }}", False),
    ],
    ids=["another", "the same in other words", "none", "one that refuses"],
)
@pytest.mark.parametrize("host", ["trainer", "loop"])
def test_another_chat_template_of_the_teacher_is_told(
    template: str | None,
    told: bool,
    host: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    objective = SoftTargets(saved(tmp_path / "guide", template))
    if host == "trainer":
        attach(trainer_of("SFTTrainer", tmp_path, tokenizer), curriculum(), objective=objective)
    else:
        rows = tiny.tokenised(tiny.candidates(2), tokenizer)  # type: ignore[arg-type]
        dataset = ScoredDataset(rows, end_token_ids=[257])
        CurriculumLoop(curriculum(), dataset, Accelerator(cpu=True), objective=objective, tokenizer=tokenizer)
    assert (f"chat template of the teacher {tmp_path / 'guide'}" in caplog.text) == told


@dataclass(frozen=True)
class MeanState(Objective):
    """An objective of a user's own: how large the teacher's states are, which the student cannot change."""

    teacher: PreTrainedModel

    @property
    def name(self) -> str:
        return "mean_state"

    def tap(self, setting: Any) -> MeanStateTap:
        return MeanStateTap(setting.live(self.teacher))


class MeanStateTap(ObjectiveTap):
    """Reads the teacher in every second batch, and leaves the rest to the run."""

    def __init__(self, guide: Any) -> None:
        self.guide, self.batches, self.value = guide, 0, 0.0

    @contextmanager
    def open(self, model: Any, *, step: int) -> Iterator[None]:
        yield

    def before(self, batch: Any) -> None:
        self.batches += 1

    def expect(self, inputs: Any, *, progress: float) -> None:
        if self.batches % 2:
            self.value = float(self.guide.read(inputs).last.abs().mean())

    def added_to(self, loss: Any, *, scale: Any) -> Any:
        return loss + self.value

    def after(self, batch: Any) -> None:
        pass


def test_the_gap_to_the_teacher_of_an_own_objective_is_observed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    guide = teacher()
    given = observing(metrics=[TeacherStudentGap(teacher=ModelReader(guide))])
    trainer = trainer_of("Trainer", tmp_path, tokenizer, learning_rate=0.0)
    attach(trainer, given, objective=MeanState(guide))
    trainer.train()
    seen = given.store.observed
    assert (seen.step >= 0).all()
    (first,) = given.cycle.record.passes
    np.testing.assert_allclose(seen.columns[GAP], first.columns[GAP], rtol=1e-4, atol=1e-6)


def test_a_sharded_teachers_head_is_only_copied_where_its_predictions_are_needed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor must its logits be the product of its states and its head."""
    monkeypatch.setattr(live, "is_sharded", lambda model: True)
    copied: list[bool] = []
    weights = live.LiveTeacher._weights
    monkeypatch.setattr(
        live.LiveTeacher, "_weights", lambda self, *, copy=False: (copied.append(copy), weights(self, copy=copy))[1]
    )

    def run(*objectives: Any) -> list[float]:
        trainer = trainer_of("Trainer", tmp_path, tokenizer)
        attach(trainer, curriculum(), objective=objectives)
        trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    guide = teacher()
    both = run(HiddenHints(guide), SoftTargets(guide))
    assert copied.count(True) == len(both) == 3
    copied.clear()
    with monkeypatch.context() as strange:
        strange.setattr(live, "transform_of", mock.Mock(side_effect=ValueError("SoftTargets(teacher=): strange")))
        hints = run(HiddenHints(guide))
        with pytest.raises(ValueError, match="strange"):
            run(SoftTargets(guide))
    assert not copied
    monkeypatch.undo()
    np.testing.assert_allclose(hints, run(HiddenHints(guide)), rtol=1e-6)
