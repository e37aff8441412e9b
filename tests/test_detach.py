"""`detach` undoes `attach`, and `report_every` writes a page while training goes on."""

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase, TrainerCallback

from distill_sampler import attach, detach
from distill_sampler.integrations.versions import BEGINS_ANYWHERE
from tests.test_attach import curriculum, plain_trainer, sft_trainer


@pytest.mark.parametrize("options", [{}, {"pack_to": 400}], ids=["rows", "packs"])
@pytest.mark.parametrize("begins_anywhere", [True, False], ids=["transformers 5.3", "4.57"])
def test_a_detached_trainer_is_as_before(
    options: dict[str, Any],
    begins_anywhere: bool,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if begins_anywhere and not BEGINS_ANYWHERE:
        pytest.skip("this transformers lacks what 5.3 brought")
    monkeypatch.setattr("distill_sampler.integrations.seams.BEGINS_ANYWHERE", begins_anywhere)
    trainer = sft_trainer(tmp_path, tokenizer)
    before, callbacks = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
    attached = curriculum()
    attach(trainer, attached, **options)
    assert detach(trainer) is attached
    assert vars(trainer).keys() == before.keys()
    assert [name for name, value in vars(trainer).items() if value is not before[name]] == []
    assert trainer.callback_handler.callbacks == callbacks


def test_a_detached_trainer_trains_on_all_its_rows_and_the_curriculum_keeps_what_it_knows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = plain_trainer(tmp_path, tokenizer)
    attached = curriculum()
    attach(trainer, attached)
    trainer.train()
    assert len(trainer.batches) == 2 * 3
    detach(trainer)
    assert attached.history().num_rows == 2 * 18
    trainer.train()
    assert len(trainer.batches) == 2 * 3 + 2 * 9
    again = curriculum()
    attach(trainer, again)
    trainer.train()
    assert len(trainer.batches) == 2 * 3 + 2 * 9 + 2 * 3
    attach(plain_trainer(tmp_path / "other", tokenizer), attached)


def test_detach_refuses_what_it_cannot_undo(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = plain_trainer(tmp_path, tokenizer)
    with pytest.raises(ValueError, match=r"^detach\(trainer\): no curriculum is attached"):
        detach(trainer)

    class Detaches(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            with pytest.raises(ValueError, match="the trainer is training"):
                detach(trainer)

    attach(trainer, curriculum())
    trainer.add_callback(Detaches())
    trainer.train()
    log = trainer.log
    trainer.log = lambda *args, **kwargs: log(*args, **kwargs)
    with pytest.raises(ValueError, match=r"trainer.log was replaced after attach"):
        detach(trainer)


def test_the_page_is_written_at_every_nth_epoch_and_at_the_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    seen: list[str] = []

    class Reads(TrainerCallback):
        def on_step_end(self, args: Any, *others: Any, **kwargs: Any) -> None:
            page = (tmp_path / "report.html").read_text(encoding="utf-8")
            live = page.partition('id="live">')[2].partition("<")[0]
            if live not in seen:
                seen.append(live)

    trainer = plain_trainer(tmp_path, tokenizer, num_train_epochs=3)
    attach(trainer, curriculum(), report_every=2)
    trainer.add_callback(Reads())
    trainer.train()
    assert [sentence.partition("steps")[0][:40].split(" begins")[0] for sentence in seen] == [
        "Epoch 1 of 3",
        "Epoch 3 of 3",
    ]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="live"' not in page
    assert '"shares":[[' in page
    assert "<h2>How the run goes</h2>" in page


def test_a_page_that_cannot_be_written_does_not_stop_training(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = plain_trainer(tmp_path, tokenizer)
    with pytest.raises(ValueError, match=r"report_every=0: .*at least 1"):
        attach(trainer, curriculum(), report_every=0)
    attach(trainer, curriculum(), report_every=1)
    (tmp_path / "report.html").mkdir(parents=True)
    trainer.train()
    assert "report_every=1: the report was not written" in caplog.text
    assert trainer.state.global_step == 6


def test_a_page_needs_plotly_before_training(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    trainer = plain_trainer(tmp_path, tokenizer)
    with pytest.raises(ValueError, match=r"report_every=1 needs plotly.*pip install 'distill_sampler\[report\]'"):
        attach(trainer, curriculum(), report_every=1)
    attached = curriculum()
    attach(trainer, attached)
    with pytest.raises(ValueError, match=r"plot\(\) needs plotly.*pip install 'distill_sampler\[report\]'"):
        attached.plot()
