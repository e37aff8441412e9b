"""Hashes of files: the content alone decides them, and a file that did not change is read once."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from distill_sampler import content
from distill_sampler.content import content_hashes

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTILL_SAMPLER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read, piece by piece."""
    names: list[str] = []
    piece = content._piece

    def counted(of: tuple[Path, int], digest: Any) -> bytes:
        names.append(of[0].name)
        return piece(of, digest)

    monkeypatch.setattr(content, "_piece", counted)
    return names


def written(path: Path, data: bytes) -> Path:
    """A file that was last written a minute ago."""
    path.write_bytes(data)
    os.utime(path, (time.time() - 60,) * 2)
    return path


def test_the_content_decides_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "PIECE", 1000)
    data = os.urandom(2500)
    file = written(tmp_path / "a", data)
    (tmp_path / "folder").mkdir()
    copy = Path(shutil.copy(file, tmp_path / "folder" / "b"))
    others = [
        data[:-1],
        data + b"\0",
        bytes([data[0] ^ 1]) + data[1:],
        data[1000:2000] + data[:1000] + data[2000:],
        b"",
    ]
    hashes = content_hashes([file, copy, *(written(tmp_path / f"o{n}", other) for n, other in enumerate(others))])
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 1 + len(others)


def test_a_file_that_did_not_change_is_read_once_and_one_that_did_is_read_again(
    tmp_path: Path, read: list[str]
) -> None:
    file = written(tmp_path / "weights", b"a" * 2 * MEGABYTE)
    first = content_hashes([file])
    assert content_hashes([file]) == first
    assert read == ["weights"]
    # the same size and the same times, as `cp -p` of another file leaves them
    state = file.stat()
    file.write_bytes(b"b" * 2 * MEGABYTE)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert content_hashes([file]) != first
    assert read == ["weights"] * 2


def test_a_file_that_was_written_just_now_is_read_again(tmp_path: Path, read: list[str]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 2 * MEGABYTE)
    content_hashes([file])
    content_hashes([file])
    assert len(read) == 2


def test_a_damaged_or_unwritable_cache_costs_time_and_nothing_else(
    tmp_path: Path, cache: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "weights", b"a" * 2 * MEGABYTE)
    first = content_hashes([file])
    (entry,) = (cache / "content").iterdir()
    for damage in (b"", b"[1]", b'{"file": "x"}', b"\xff"):
        entry.write_bytes(damage)
        assert content_hashes([file]) == first
    assert len(read) == 5
    monkeypatch.setenv("DISTILL_SAMPLER_CACHE", "/proc/none")
    assert content_hashes([file]) == first


def test_small_files_leave_nothing_in_the_cache(tmp_path: Path, cache: Path) -> None:
    content_hashes([written(tmp_path / "config.json", b"{}")])
    assert not cache.exists()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        content_hashes([tmp_path / "nothing"])
