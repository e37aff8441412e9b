"""Checkpoint folders of Hugging Face's `Trainer`: which are complete, which belong to this run, and who may write here.

The curriculum's state is an entry of `trainer_state.json`, which the trainer writes last, so a checkpoint cannot have
one without the other. Its arrays are in a file beside it, and the entry has their hashes. This module looks for what
can still go wrong, before the trainer loads anything: a save that a kill or a full disk interrupted, a lost or damaged
file, two runs that write to one folder.

A checkpoint with a manifest (`artifacts/manifest.py`) is compared with it. Without one, files must only be as long as
they say themselves.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
import socket
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distill_sampler.artifacts.manifest import damage
from distill_sampler.artifacts.state import ARRAYS, read_arrays
from distill_sampler.distributed import Ranks
from distill_sampler.serialize import digest, unpacked

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

STATE_ENTRY = "distill_sampler"
"""Name of the curriculum's entry in `TrainerState.stateful_callbacks`."""

FOLDER = "distill_sampler"
"""The folder in the trainer's output folder for everything that a run keeps besides its checkpoints."""

TRAINER_STATE = "trainer_state.json"

_ENTRY = {"run", "world_size", "samples_per_step", "files", "curriculum", "progress"}
_PROGRESS = {"step", "epoch", "places", "over"}
"""What a resume reads of the curriculum's entry. Whatever else is in it is ignored."""
_LOOP = {"run", "curriculum", "arrays", "step"}
"""By these keys the state of a `CurriculumLoop` is known."""


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's `trainer_state.json`.

    Raises:
        ValueError: it is missing or damaged; the message says which.
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


def entry_of_loop(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What `CurriculumLoop.state_dict` left in a checkpoint of accelerate, as a trainer's entry, and its arrays; None
    if there is no such state, or it is damaged.

    Raises:
        ValueError: an older release wrote it.
    """
    for path in sorted(checkpoint.glob("custom_checkpoint_*.pkl")):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):  # of another object, or damaged
            continue
        if not isinstance(state, dict) or not state.keys() >= _LOOP:
            continue
        if "places_per_epoch" not in state:
            raise ValueError(
                f"{checkpoint} was written by an older release, which did not save how long an epoch is. Verify it "
                "with that release, or give a checkpoint that this one wrote."
            )
        progress = {"places": state["curriculum"]["progress"] or 0, "step": state["step"]}
        return {**state, "progress": progress}, {name: array.numpy() for name, array in state["arrays"].items()}
    return None


def curriculum_of(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The curriculum's entry in a checkpoint, of a trainer or of a loop, and its arrays.

    Raises:
        ValueError: the checkpoint cannot be read, or has no curriculum.
    """
    of_loop = not (checkpoint / TRAINER_STATE).exists() and any(checkpoint.glob("custom_checkpoint_*.pkl"))
    if reason := why_damaged(checkpoint) if of_loop else why_broken(checkpoint):
        raise ValueError(f"{checkpoint} cannot be read: {reason}.")
    if not of_loop:
        if (entry := entry_of(read_state(checkpoint))) is None:
            raise ValueError(f"{checkpoint} was written without a curriculum, so its order is not known.")
        return entry, read_arrays(checkpoint)
    if (found := entry_of_loop(checkpoint)) is None:
        raise ValueError(
            f"{checkpoint} has no state of a CurriculumLoop that can be read. Save it with "
            "accelerator.register_for_checkpointing(loop), after accelerator.prepare."
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Readers:
    """The processes that look at checkpoints together, each at its share of the bytes, and decide the same."""

    ranks: Ranks = field(default_factory=Ranks)
    """All processes of the run. All of them call the functions that have an argument `readers`."""
    sharing: Ranks | None = None
    """The processes that see the same folder as this one. None: all of `ranks`."""
    compare: bool = True
    """Whether files are compared with the manifest, if there is one."""

    def first(self, look: Callable[[], str]) -> str:
        """The reason that the first process finds which finds one."""
        try:
            reason = look()
        except OSError as error:
            reason = f"it cannot be read ({error})"
        return next(filter(None, self.ranks.gather(reason)), "")


ALONE = Readers()


class Unloadable(Exception):
    """The trainer failed to load a checkpoint that nothing seemed to be wrong with. The text is why."""


def why_broken(checkpoint: Path, readers: Readers = ALONE) -> str:
    """Why a checkpoint cannot be resumed from, as the rest of a sentence; empty if nothing is wrong with it.

    Args:
        checkpoint: the folder.
        readers: who looks. All of them return the reason that the first of them finds.
    """
    return _why_incomplete(checkpoint, readers) or why_damaged(checkpoint, readers)


def _why_incomplete(checkpoint: Path, readers: Readers) -> str:
    return readers.first(lambda: _at_first_sight(checkpoint))


def why_damaged(checkpoint: Path, readers: Readers = ALONE) -> str:
    """What of a checkpoint does not match its manifest, in the same form."""
    return readers.first(lambda: damage(checkpoint, readers.sharing or readers.ranks)) if readers.compare else ""


def _at_first_sight(checkpoint: Path) -> str:
    """What is wrong with a checkpoint at first sight.

    Reads only what is small: the trainer's state, with the curriculum's entry. Of the weights and the optimizer it
    checks that the files exist and are as long as their headers say.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        state = read_state(checkpoint)
    except ValueError as error:
        return str(error)
    entry = entry_of(state)
    if entry is not None:
        curriculum, progress = entry.get("curriculum", {}), entry.get("progress", {})
        if lacking := sorted((_ENTRY - entry.keys()) | (_PROGRESS - progress.keys())):
            return f"the curriculum's entry in its {TRAINER_STATE} lacks {', '.join(lacking)}"
        if curriculum.get("digest") != digest(curriculum):
            return f"the curriculum's entry in its {TRAINER_STATE} is damaged"
        try:
            unpacked(curriculum, read_arrays(checkpoint))
        except ValueError as error:
            return f"the curriculum's arrays in its {ARRAYS} are not whole: {str(error).rstrip('.')}"
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


def last_whole(
    output: Path, run: str | None = None, readers: Readers = ALONE, unloadable: Mapping[Path, str] | None = None
) -> tuple[Path | None, list[str]]:
    """The last checkpoint that can be resumed from, and one sentence for each later one that was passed over.

    Args:
        output: the trainer's output folder.
        run: the run whose checkpoints count; those of other runs are passed over. None: those of every run count.
        readers: who looks.
        unloadable: checkpoints that are passed over, and why.
    """
    passed_over: list[str] = []
    for name in readers.ranks.gather([checkpoint.name for checkpoint in checkpoints_in(output)])[0]:
        checkpoint = output / name
        reason = (unloadable or {}).get(checkpoint) or _why_incomplete(checkpoint, readers)
        if not reason and run is not None and (entry_of(read_state(checkpoint)) or {}).get("run", run) != run:
            reason = "an earlier run that began anew in the same folder wrote it"
        if not (reason := reason or why_damaged(checkpoint, readers)):
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint} is passed over: {reason}.")
    return None, passed_over


def checkpoint_to_resume(
    requested: str | bool | None,
    output: Path,
    run: str | None,
    readers: Readers = ALONE,
    unloadable: Mapping[Path, str] | None = None,
) -> Path | None:
    """The complete checkpoint that `trainer.train(resume_from_checkpoint=requested)` must load; None: start anew.

    `True` stands for the last complete one of the run that owns the folder; it logs which later ones it passed over.

    Args:
        requested: what the trainer was asked for.
        output: the trainer's output folder.
        run: the run that the folder belongs to; None: unknown.
        readers: who looks.
        unloadable: checkpoints that the trainer has failed to load, and why.

    Raises:
        ValueError: there is none, or the requested one is incomplete.
    """
    requests = readers.ranks.gather(requested or None if isinstance(requested, bool | None) else "a folder")
    if len(set(requests)) > 1:
        raise ValueError(f"The processes have different resume_from_checkpoint: {requests}. Give all of them the same.")
    if requested is None or requested is False:
        return None
    if requested is True:
        found, passed_over = last_whole(output, readers.ranks.gather(run)[0], readers, unloadable)
        if found is None:
            raise ValueError(
                " ".join([f"There is no complete checkpoint in {output}.", *passed_over])
                + " Start from the beginning, with resume_from_checkpoint=None."
            )
        if readers.ranks.rank == 0:
            for sentence in passed_over:
                logger.warning("%s Resuming from %s.", sentence, found.name)
        return found
    checkpoint = Path(requested)
    if reason := (unloadable or {}).get(checkpoint) or why_broken(checkpoint, readers):
        found, _ = last_whole(checkpoint.parent, readers=readers, unloadable=unloadable)
        instead = (
            f"Resume from {found} instead, which is complete."
            if found
            else f"No other checkpoint in {checkpoint.parent} is complete; start with resume_from_checkpoint=None."
        )
        raise ValueError(f"{checkpoint} cannot be resumed from: {reason}. {instead}")
    return checkpoint


# ---- One writer for each folder ----


class Claim:
    """The exclusive right to write to an output folder, and the run that holds it. Made by `claimed`."""

    def __init__(self, file: int | None, run: str | None) -> None:
        self._file = file
        self.run = run
        """The run that wrote here last; None: unknown."""

    def take_over(self, run: str) -> None:
        """Note in the folder that it now belongs to this run."""
        self.run = run
        if self._file is not None:
            text = json.dumps({"run": run, "pid": os.getpid(), "host": socket.gethostname()}).encode()
            os.pwrite(self._file, text, 0)
            os.ftruncate(self._file, len(text))


def new_run() -> str:
    """A random identity for a run."""
    return uuid.uuid4().hex[:16]


_CLAIMED_HERE: set[Path] = set()
"""Output folders that this process has claimed. The file lock only keeps out other processes."""


@contextmanager
def claimed(output: Path, *, write: bool) -> Iterator[Claim]:
    """Keep other runs from writing to an output folder while this one does.

    The lock is a POSIX file lock: it ends with the process, even one that is killed, and data loader workers do not
    inherit it.

    Args:
        output: the trainer's output folder.
        write: whether this process is the one that writes for its run. The others only read who owns the folder.

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
    """The part of a claim that other processes see: a lock on `run.json`."""
    path = output / FOLDER / "run.json"
    if not write or sys.platform == "win32":
        yield Claim(None, _owner(path.read_bytes()).get("run") if path.is_file() else None)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        logger.warning("%s cannot be written to (%s), so other runs are not kept out of it.", path.parent, error)
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
            logger.warning("%s cannot be locked (%s), so other runs are not kept out of it.", path, error)
        yield Claim(file, owner.get("run"))
    finally:
        os.close(file)


def _owner(content: bytes) -> dict[str, Any]:
    """What `run.json` says of the run that owns the folder; empty if it says nothing readable."""
    try:
        owner = json.loads(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_whole_safetensors(path: Path) -> bool:
    """Whether the file is as long as its header says. (The file: 8 bytes with the header's length, header, tensors.)"""
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
