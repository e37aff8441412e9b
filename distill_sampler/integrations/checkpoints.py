"""Checkpoint folders of Hugging Face's `Trainer`: which are whole, which belong to this run, who may write here.

The curriculum's state is an entry of `trainer_state.json`, the file that a checkpoint is complete with, so the two
cannot part. What can happen all the same is looked for here before the trainer loads anything: a save cut off by a
kill or a full disk, a file lost or damaged on the way, a folder that two runs write to.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import socket
import sys
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill_sampler.serialize import digest

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

STATE_ENTRY = "distill_sampler"
"""Where the curriculum's state lies in `TrainerState.stateful_callbacks`."""

FOLDER = "distill_sampler"
"""In the trainer's output folder: what a run keeps there besides its checkpoints."""

TRAINER_STATE = "trainer_state.json"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's `trainer_state.json`.

    Raises:
        ValueError: it is not there, or not whole; the message says why.
    """
    try:
        state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"it has no {TRAINER_STATE}, which is written last: saving it was interrupted") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"its {TRAINER_STATE} is cut off or damaged") from None
    if not isinstance(state, dict) or "global_step" not in state:
        raise ValueError(f"its {TRAINER_STATE} is not one that a trainer wrote")
    return state


def entry_of(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The curriculum's entry in a trainer's state; None if the checkpoint was written without one."""
    entry = (state.get("stateful_callbacks") or {}).get(STATE_ENTRY)
    return entry if isinstance(entry, dict) else None


def why_broken(checkpoint: Path) -> str:
    """Why a checkpoint cannot be resumed from, as the rest of a sentence; empty if nothing is wrong with it.

    Read is what is small: the trainer's state with the curriculum's entry, and of weights and optimizer whether the
    files are there and have their length.
    """
    try:
        state = read_state(checkpoint)
    except ValueError as error:
        return str(error)
    entry = entry_of(state)
    if entry is not None:
        curriculum, progress = entry.get("curriculum", {}), entry.get("progress", {})
        if curriculum.get("digest") != digest(curriculum):
            return f"the curriculum's entry in its {TRAINER_STATE} is damaged"
        if progress.get("step") != state["global_step"]:
            return (
                f"its {TRAINER_STATE} contradicts itself: the trainer is at step {state['global_step']}, the "
                f"curriculum at step {progress.get('step')}"
            )
        for name in entry.get("files", []):
            if not (checkpoint / name).exists():
                return f"it has no {name}"
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors" and not _is_whole_safetensors(path):
            return f"its {path.name} is cut off or damaged"
        if path.suffix in (".pt", ".pth") and path.is_file() and not zipfile.is_zipfile(path):
            return f"its {path.name} is cut off or damaged"
    return ""


def checkpoints_in(output: Path) -> list[Path]:
    """The checkpoint folders in a trainer's output folder, the latest step first."""
    if not output.is_dir():
        return []
    found = [path for path in output.iterdir() if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: -int(path.name.partition("-")[2]))


def last_whole(output: Path, run: str | None = None) -> tuple[Path | None, list[str]]:
    """The last checkpoint that can be resumed from, and a sentence for each later one that was passed over.

    Args:
        output: the trainer's output folder.
        run: pass over checkpoints of other runs. None: take those of any.
    """
    passed_over: list[str] = []
    for checkpoint in checkpoints_in(output):
        reason = why_broken(checkpoint)
        if not reason:
            entry = entry_of(read_state(checkpoint))
            if entry is None or run is None or entry.get("run") == run:
                return checkpoint, passed_over
            reason = "an earlier run that began anew in the same folder wrote it"
        passed_over.append(f"{checkpoint} is passed over: {reason}.")
    return None, passed_over


def checkpoint_to_resume(asked: str | bool | None, output: Path, run: str | None) -> Path | None:
    """What `trainer.train(resume_from_checkpoint=asked)` is to load: a checkpoint known to be whole.

    `True` is the last whole one of the run that the folder belongs to; those passed over are logged.

    Raises:
        ValueError: there is none, or the one that was asked for is not whole.
    """
    if asked is None or asked is False:
        return None
    if asked is True:
        found, passed_over = last_whole(output, run)
        if found is None:
            raise ValueError(
                " ".join([f"There is no whole checkpoint in {output}.", *passed_over])
                + " Start from the beginning, with resume_from_checkpoint=None."
            )
        for sentence in passed_over:
            logger.warning("%s Resuming from %s.", sentence, found.name)
        return found
    checkpoint = Path(asked)
    if not checkpoint.is_dir():
        raise ValueError(f"resume_from_checkpoint={asked!r}: there is no such folder.")
    if reason := why_broken(checkpoint):
        found, _ = last_whole(checkpoint.parent)
        instead = f"{found} is whole" if found else f"no other checkpoint in {checkpoint.parent} is whole"
        raise ValueError(f"{checkpoint} cannot be resumed from: {reason}. Of the others, {instead}.")
    return checkpoint


# ---- Who writes here ----


class Claim:
    """The right to write to an output folder, and the identity of the run that does. Made by `claimed`."""

    def __init__(self, file: int | None, run: str | None) -> None:
        self._file = file
        self.run = run
        """The run that wrote here last; None: unknown."""

    def take_over(self, run: str) -> None:
        """From now on the folder belongs to this run."""
        self.run = run
        if self._file is not None:
            text = json.dumps({"run": run, "pid": os.getpid(), "host": socket.gethostname()}).encode()
            os.pwrite(self._file, text, 0)
            os.ftruncate(self._file, len(text))


def new_run() -> str:
    return uuid.uuid4().hex[:16]


_CLAIMED_HERE: set[Path] = set()
"""Output folders that this process holds. The lock of the operating system keeps out other processes only."""


@contextmanager
def claimed(output: Path, *, write: bool) -> Iterator[Claim]:
    """Keep other processes from writing to an output folder while this one does.

    A lock of the operating system that a killed process loses (POSIX, so its data loader workers do not inherit it).

    Args:
        output: the trainer's output folder.
        write: whether this process is the one of its run that writes; the others only read whose folder it is.

    Raises:
        ValueError: another run is writing there, in this process or another one.
    """
    here = output.resolve()
    if here in _CLAIMED_HERE:
        raise ValueError(
            f"Another trainer of this process is training into {output}. Give each an output_dir of its own."
        )
    _CLAIMED_HERE.add(here)
    try:
        with _locked(output, write=write) as claim:
            yield claim
    finally:
        _CLAIMED_HERE.remove(here)


@contextmanager
def _locked(output: Path, *, write: bool) -> Iterator[Claim]:
    """What other processes see of a claim."""
    path = output / FOLDER / "run.json"
    if not write or sys.platform == "win32":
        yield Claim(None, _owner(path.read_bytes()).get("run") if path.is_file() else None)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        logger.warning("%s cannot be written to (%s), so other runs cannot be kept from it.", path.parent, error)
        yield Claim(None, None)
        return
    try:
        owner = _owner(os.read(file, 4096))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"Another run (process {owner.get('pid')} on {owner.get('host')}) is writing to {output}. Give "
                    "this one an output_dir of its own, or wait for the other to end."
                ) from None
            logger.warning("%s cannot be locked (%s), so other runs cannot be kept from it.", path, error)
        yield Claim(file, owner.get("run"))
    finally:
        os.close(file)


def _owner(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_whole_safetensors(path: Path) -> bool:
    """The file is as long as its header says. (Eight bytes with the header's length, the header, the tensors.)"""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if not 0 < length <= size - 8:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
    return size == 8 + length + max(ends, default=0)
