"""Whatever happens to a checkpoint, a resume trains the planned order or says why it cannot; logs are verified."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from typer.testing import CliRunner

from distill_sampler import BestOf, Curriculum, Shuffle, attach
from distill_sampler.artifacts.manifest import MANIFEST
from distill_sampler.artifacts.record import RECORD, Record, read_run
from distill_sampler.artifacts.state import ARRAYS
from distill_sampler.cli import app
from distill_sampler.integrations.checkpoints import STATE_ENTRY, last_whole, why_broken
from distill_sampler.integrations.sample_log import read_log
from distill_sampler.integrations.versions import BEGINS_ANYWHERE
from tests import tiny
from tests.test_attach import RSR, RecordedTrainer, arguments, curriculum, plain_trainer, trained

steps_may_change = pytest.mark.skipif(
    not BEGINS_ANYWHERE, reason="transformers before 5.3 refuses a resume with steps of another size (test_versions.py)"
)
SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> tuple[Path, list[int]]:
    """The output folder of a run of two epochs of three steps, and what it trained."""
    output = tmp_path_factory.mktemp("whole")
    trainer = plain_trainer(output, tokenizer, **SAVING)
    attach(trainer, curriculum(), sample_log=True)
    trainer.train()
    return output, trained(trainer)


@pytest.fixture
def output(whole_run: tuple[Path, list[int]], tmp_path: Path) -> Path:
    """A copy of it to break. (Checkpoint folders can be moved and copied.)"""
    return Path(shutil.copytree(whole_run[0], tmp_path / "copy"))


def resumed(output: Path, tokenizer: PreTrainedTokenizerBase, resume: Any = True, **changes: Any) -> list[int]:
    """What a run trains that goes on from there."""
    options = {name: changes.pop(name) for name in ("accept_changes",) if name in changes}
    attached = changes.pop("curriculum", None) or curriculum()
    trainer = plain_trainer(output, tokenizer, **{**SAVING, **changes})
    attach(trainer, attached, **options)
    trainer.batches = []
    trainer.train(resume_from_checkpoint=resume)
    return trained(trainer)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    change(state)
    path.write_text(json.dumps(state), encoding="utf-8")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# ---- What is saved ----


def test_the_trainers_state_does_not_grow_with_the_samples(output: Path) -> None:
    state = json.loads((output / "checkpoint-5" / "trainer_state.json").read_text(encoding="utf-8"))
    assert '"data"' not in json.dumps(state["stateful_callbacks"][STATE_ENTRY])


def test_only_the_process_that_writes_checkpoints_takes_the_state(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = plain_trainer(tmp_path / "run", tokenizer, **SAVING)
    attached = curriculum(observe=True)
    attach(trainer, attached)
    monkeypatch.setattr(TrainingArguments, "should_save", property(lambda args: False))
    monkeypatch.setattr(attached, "state_dict", lambda *_: pytest.fail("another process takes the state"))
    trainer.train()


# ---- Damage ----

DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "killed before the end of the save": (lambda c: (c / "trainer_state.json").unlink(), "no trainer_state.json"),
    "state cut off": (lambda c: cut(c / "trainer_state.json"), "trainer_state.json is cut off or damaged"),
    "state empty": (lambda c: (c / "trainer_state.json").write_bytes(b""), "trainer_state.json is cut off or damaged"),
    "state foreign": (lambda c: (c / "trainer_state.json").write_text("[1, 2]"), "not one that a trainer wrote"),
    "another step": (lambda c: rewrite(c, lambda s: s.update(global_step=4)), "contradicts itself"),
    "another epoch": (
        lambda c: rewrite(c, lambda s: s["stateful_callbacks"][STATE_ENTRY]["curriculum"].update(epoch=0)),
        "entry in its trainer_state.json is damaged",
    ),
    "array bit-flipped": (lambda c: flip(c / ARRAYS, -1), "is damaged"),
    "arrays lost": (lambda c: (c / ARRAYS).unlink(), "is missing"),
    "arrays cut off": (lambda c: cut(c / ARRAYS), f"{ARRAYS} cannot be read"),
    "arrays empty": (lambda c: (c / ARRAYS).write_bytes(b""), f"{ARRAYS} cannot be read"),
    "arrays of another step": (lambda c: shutil.copy(c.with_name("checkpoint-1") / ARRAYS, c), "is damaged"),
    "arrays' folder": (lambda c: ((c / ARRAYS).unlink(), (c / ARRAYS).mkdir()), f"{ARRAYS} cannot be read"),
    "weights cut off": (lambda c: cut(c / "model.safetensors"), "model.safetensors is cut off"),
    "weights foreign": (lambda c: (c / "model.safetensors").write_text("nothing of ours"), "model.safetensors is cut"),
    "optimizer cut off": (lambda c: cut(c / "optimizer.pt"), "optimizer.pt is cut off"),
    "optimizer lost": (lambda c: (c / "optimizer.pt").unlink(), "it has no optimizer.pt"),
    "random state lost": (lambda c: (c / "rng_state.pth").unlink(), "it has no rng_state.pth"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_is_whole(name: str, output: Path) -> None:
    damage, reason = DAMAGE[name]
    assert why_broken(output / "checkpoint-5") == ""
    damage(output / "checkpoint-5")
    assert reason in why_broken(output / "checkpoint-5")
    shutil.rmtree(output / "checkpoint-6")
    found, passed_over = last_whole(output)
    assert found == output / "checkpoint-4"
    assert len(passed_over) == 1
    assert reason in passed_over[0]


@pytest.mark.parametrize("name", ["places", "samples_per_step", "run"])
def test_an_entry_that_lacks_something_is_recognised_and_what_it_has_beyond_is_ignored(name: str, output: Path) -> None:
    checkpoint = output / "checkpoint-5"
    (checkpoint / MANIFEST).unlink()
    rewrite(checkpoint, lambda state: state["stateful_callbacks"][STATE_ENTRY].update(beyond=1))
    assert why_broken(checkpoint) == ""

    def leave_out(state: dict[str, Any]) -> None:
        entry = state["stateful_callbacks"][STATE_ENTRY]
        entry["progress"].pop(name, None)
        entry.pop(name, None)

    rewrite(checkpoint, leave_out)
    assert why_broken(checkpoint).endswith(f"lacks {name}")


def test_a_resume_skips_broken_checkpoints_with_a_warning(
    output: Path,
    whole_run: tuple[Path, list[int]],
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for step, name in ((6, "killed before the end of the save"), (5, "array bit-flipped")):
        DAMAGE[name][0](output / f"checkpoint-{step}")
    with caplog.at_level(logging.WARNING, "distill_sampler"):
        assert resumed(output, tokenizer) == whole_run[1][8:]
    assert caplog.text.count("is passed over") == 2
    assert "Resuming from checkpoint-4" in caplog.text


def test_naming_a_broken_checkpoint_is_refused_and_a_whole_one_is_offered(
    output: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    DAMAGE["state cut off"][0](output / "checkpoint-5")
    with pytest.raises(
        ValueError, match=r"checkpoint-5 cannot be resumed from: its trainer_state.*checkpoint-6 instead"
    ):
        resumed(output, tokenizer, str(output / "checkpoint-5"))
    with pytest.raises(ValueError, match="there is no such folder"):
        resumed(output, tokenizer, str(output / "checkpoint-50"))
    for step in range(1, 7):
        (output / f"checkpoint-{step}" / "trainer_state.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"no complete checkpoint in .*resume_from_checkpoint=None"):
        resumed(output, tokenizer)


def test_a_new_run_does_not_resume_from_an_old_runs_checkpoints(
    output: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = plain_trainer(output, tokenizer, **SAVING)
    attach(trainer, curriculum())

    class Killed(Exception):
        pass

    def kill(*args: Any, **kwargs: Any) -> None:
        raise Killed

    save = trainer._save_checkpoint

    def save_and_kill(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        trainer.save_model = kill  # in the middle of the next checkpoint, over that of the old run

    trainer._save_checkpoint = save_and_kill
    with pytest.raises(Killed):
        trainer.train()
    assert "no trainer_state.json" in why_broken(output / "checkpoint-2")  # not a mixture of two runs
    with caplog.at_level(logging.WARNING, "distill_sampler"):
        assert len(resumed(output, tokenizer)) == 10
    assert "an earlier run that began anew in the same folder wrote it" in caplog.text


HOLD = """
import sys
from pathlib import Path
from distill_sampler.integrations.checkpoints import claimed
with claimed(Path(sys.argv[1]), write=True) as claim:
    claim.take_over("other")
    print("holding", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_run(output: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        yield process
        process.kill()


def test_two_runs_cannot_write_to_one_folder_until_one_is_dead(
    output: Path, other_run: subprocess.Popen[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=rf"Another run \(process {other_run.pid} on .*output_dir of its own"):
        resumed(output, tokenizer, None, max_steps=1)
    with pytest.raises(ValueError, match="Another run"):  # scores and plans are written there too
        resumed(output, tokenizer, None, max_steps=1, save_strategy="no")
    other_run.kill()
    other_run.wait()
    assert len(resumed(output, tokenizer, None, max_steps=1)) == 2


@pytest.mark.parametrize("where", ["in another folder", "after another run"])
def test_a_run_that_goes_on_elsewhere_takes_its_record_along(
    where: str, output: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    record = output / RECORD
    folder = tmp_path / "new"
    if where == "after another run":  # which has moved the record aside
        folder, record = output, record.rename(record.with_name(f"record-{read_run(record)['run']}"))
    before = {path.name: path.read_bytes() for path in record.iterdir()}
    plans = [planned.plan for planned in Record(record, write=False).plans]
    attached = curriculum()
    resumed(folder, tokenizer, str(output / "checkpoint-5"), curriculum=attached)
    assert list(attached.plans) == plans
    assert set(attached.history("teacher")["epoch"].to_pylist()) == {0, 1}
    assert "lacks" not in caplog.text
    if where == "after another run":  # it is moved back
        assert not record.exists()
        record = output / RECORD
    assert {path.name: path.read_bytes() for path in record.glob("p*")} == {
        name: content for name, content in before.items() if name.startswith("p")
    }
    assert not list(record.parent.glob("*.begun"))


def test_a_run_that_goes_on_elsewhere_twice_has_the_record_of_the_checkpoint_that_it_goes_on_from(
    output: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = tmp_path / "new"
    (tmp_path / "latest").symlink_to(output / "checkpoint-5")
    whole = [planned.plan for planned in Record(output / RECORD, write=False).plans]
    for checkpoint in (output / "checkpoint-2", tmp_path / "latest"):
        attached = curriculum()
        resumed(folder, tokenizer, str(checkpoint), curriculum=attached)
        assert list(attached.plans) == whole
    (folder / RECORD).with_name("record.begun").mkdir()  # what a kill in the middle leaves
    shutil.rmtree(folder / RECORD)
    attached = curriculum()
    resumed(folder, tokenizer, str(output / "checkpoint-5"), curriculum=attached)
    assert list(attached.plans) == whole


def test_a_record_of_plans_alone_is_moved_aside_too(
    output: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "shared"
    for _ in range(2):
        trainer = plain_trainer(folder, tokenizer, **SAVING)
        attach(trainer, Curriculum(metrics=[], policies=[Shuffle()]))
        trainer.train()
    assert "held the record of another run" in caplog.text
    assert len(list((folder / RECORD).parent.glob("record-*"))) == 1


def test_a_sample_log_goes_along_with_the_run(output: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, checkpoint in ((first, None), (second, str(first / "checkpoint-2"))):
        trainer = plain_trainer(folder, tokenizer, **SAVING)
        attach(trainer, curriculum(), sample_log=True)
        trainer.train(resume_from_checkpoint=checkpoint)
    logs = [read_log(folder / RECORD.parent) for folder in (first, second)]
    assert logs[0] == logs[1]


# ---- Settings ----


@steps_may_change
def test_half_the_batch_and_twice_the_accumulation_train_the_same_order(
    output: Path, whole_run: tuple[Path, list[int]], tokenizer: PreTrainedTokenizerBase
) -> None:
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert resumed(output, tokenizer, str(output / "checkpoint-4"), **changes) == whole_run[1][8:]


@steps_may_change
@pytest.mark.parametrize("saving", [SAVING, {"save_strategy": "epoch"}], ids=["steps", "epochs"])
def test_a_run_whose_epochs_were_ended_early_is_resumed_at_its_place(
    saving: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    class EndsFirstEpochEarly(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = state.global_step == 2

    def run(folder: Path, resume: Path | None = None) -> tuple[Any, list[int]]:
        trainer = plain_trainer(folder, tokenizer, **saving, num_train_epochs=3, lr_scheduler_type="linear")
        attach(trainer, curriculum())
        trainer.add_callback(EndsFirstEpochEarly())
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer, trained(trainer)

    whole, order = run(tmp_path / "whole")
    assert len(order) == 4 + 6 + 6
    for step in (1, 2, 3, 5, 6) if saving is SAVING else (2, 5):
        rest, rest_order = run(tmp_path / f"rest-{step}", tmp_path / "whole" / f"checkpoint-{step}")
        assert rest_order == order[2 * step :]
        for left, right in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
            assert torch.equal(left, right)


def test_another_configuration_is_refused_and_the_option_is_named(
    output: Path, whole_run: tuple[Path, list[int]], tokenizer: PreTrainedTokenizerBase
) -> None:
    other = {"policies": [BestOf(RSR, per="prompt_id"), Shuffle()], "seed": 7}
    checkpoint = str(output / "checkpoint-1")
    with pytest.raises(ValueError, match=r"seed: was 0, is now 7.*accept_changes=True"):
        resumed(output, tokenizer, checkpoint, curriculum=curriculum(**other))
    changed = resumed(output, tokenizer, checkpoint, curriculum=curriculum(**other), accept_changes=True)
    assert changed[:4] == whole_run[1][2:6]
    assert changed[4:] != whole_run[1][6:]


@pytest.mark.parametrize(
    "settings",
    [
        {"save_only_model": True},
        {"save_total_limit": 1},
        {"restore_callback_states_from_checkpoint": True},
        {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_checkpoint_settings_of_the_trainer_do_not_change_the_order(
    settings: dict[str, Any],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    whole_run: tuple[Path, list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def trainer() -> Any:
        made = RecordedTrainer(
            model=tiny.model(),
            processing_class=tokenizer,
            train_dataset=tiny.tokenised(tiny.candidates(), tokenizer),
            eval_dataset=tiny.tokenised(tiny.candidates(2), tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            args=TrainingArguments(**arguments(tmp_path / "run", **SAVING, **settings)),
        )
        attach(made, curriculum())
        return made

    class Killed(Exception):
        pass

    first = trainer()
    step = first.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        if first.state.global_step == 2:
            raise Killed
        return step(*args, **kwargs)

    first.training_step = training_step
    with pytest.raises(Killed):
        first.train()
    second = trainer()
    with caplog.at_level(logging.WARNING, "distill_sampler"):
        second.train(resume_from_checkpoint=True)
    begun = trained(second)[:2]
    assert begun == whole_run[1][4:6]  # the rest of the epoch; what the next trains depends on the optimizer
    assert ("has no optimizer (save_only_model=True)" in caplog.text) == ("save_only_model" in settings)
    if "save_only_model" not in settings:
        assert trained(second) == whole_run[1][4:]


# ---- verify ----


def verified(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_verify_agrees_with_a_log_of_the_run(output: Path) -> None:
    code, said = verified(output / "checkpoint-2", output / "checkpoint-6")
    assert code == 0, said
    assert said.count("The log agrees") == 2
    assert "epoch 0, plan" in said
    assert "4 of 6 samples trained" in said


def test_verify_agrees_after_a_resume(output: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = plain_trainer(output, tokenizer, **SAVING, dataloader_num_workers=2)
    attach(trainer, curriculum(), sample_log=True)
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    assert verified(output / "checkpoint-3", output / "checkpoint-6")[0] == 0
    lines = (output / "distill_sampler" / "samples-0.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines[1:]] == [1, 2, 3, 4, 5, 6]


def test_verify_finds_samples_that_were_not_trained_as_planned(output: Path) -> None:
    log = output / "distill_sampler" / "samples-0.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    fifth = json.loads(lines[5])  # behind the line of the run
    for changed in (
        lines[:5] + lines[6:],
        [*lines[:5], json.dumps({**fifth, "samples": fifth["samples"][::-1]}) + "\n"],
    ):
        log.write_text("".join(changed), encoding="utf-8")
        code, said = verified(output / "checkpoint-5")
        assert code == 1
        assert "The log DISAGREES in 1 places" in said
        assert verified(output / "checkpoint-2")[0] == 0


def test_verify_knows_what_completes_the_last_step(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = plain_trainer(tmp_path / "run", tokenizer, **SAVING, per_device_train_batch_size=4)
    attach(trainer, curriculum(), sample_log=True)
    trainer.train()
    code, said = verified(tmp_path / "run" / "checkpoint-4")
    assert code == 0, said
    assert "8 of 8 samples trained (2 of them are the plan's first samples" in said
    log = tmp_path / "run" / "distill_sampler" / "samples-0.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    last = json.loads(lines[-1])
    log.write_text("".join([*lines[:-1], json.dumps({**last, "samples": last["samples"][:2]})]), encoding="utf-8")
    code, said = verified(tmp_path / "run" / "checkpoint-4")
    assert code == 1
    assert "2 of 8 trained samples are not in the log; the first is at place 6" in said


def test_verify_says_what_it_cannot_read(output: Path) -> None:
    for path, sentence in (
        (output / "checkpoint-70", "there is no such folder"),
        (output / "checkpoint-5", "cannot be read: its trainer_state.json is cut off"),
        (output / "checkpoint-4", "There is no sample log in"),
    ):
        cut(output / "checkpoint-5" / "trainer_state.json")
        if path.name == "checkpoint-4":
            shutil.rmtree(output / "distill_sampler")
        code, said = verified(path)
        assert code == 2
        assert sentence in said
