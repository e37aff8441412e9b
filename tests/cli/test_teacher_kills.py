"""`distill-sampler teacher-logprobs` is killed where it stands, by one process or two, and run again."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import tiny
from tests.cli.conftest import rows, write_lines

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
TWO = ["-m", "accelerate.commands.launch", "--config_file", str(HERE.parents[1] / "accelerate_configs" / "cpu.yaml")]
TWO += ["--main_process_port", "0"]
RESPONSES = 480


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    tiny.model(3).save_pretrained(folder / "teacher")
    tiny.tokenizer().save_pretrained(folder / "teacher")
    write_lines(folder / "data.jsonl", rows(RESPONSES // 3))
    return folder


def begin(stage: Path, name: str, *launcher: str) -> subprocess.Popen[str]:
    options = [str(stage / "data.jsonl"), "--model", str(stage / "teacher"), "--output", str(stage / name)]
    return subprocess.Popen(
        [sys.executable, *launcher, str(HERE / "teacher_run.py"), *options, "--top-k", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=HERE.parents[1],
    )


def end(run: subprocess.Popen[str]) -> str:
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said[-3000:]
    return said


def parts(stage: Path, name: str) -> list[Path]:
    return sorted((stage / f"{name}.parts").glob("[0-9]*.parquet"))


def kill(stage: Path, name: str, run: subprocess.Popen[str], *, at: int) -> int:
    """Kill a run when it has written so many parts. Returns how many responses are on disk then."""
    until = time.monotonic() + 200
    while len(parts(stage, name)) < at:
        assert run.poll() is None, run.communicate()[0][-3000:]
        assert time.monotonic() < until
        time.sleep(0.001)
    of_launcher = psutil.Process(run.pid)
    for process in [of_launcher, *of_launcher.children(recursive=True)]:  # the launcher's processes outlive it
        process.kill()
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    return sum(pq.read_metadata(path).num_rows for path in parts(stage, name))


def continued(said: str) -> int:
    (found,) = re.findall(r"Continuing after ([\d,]+) responses", said)
    return int(found.replace(",", ""))


@pytest.fixture(scope="module")
def whole(stage: Path) -> Path:
    """The store of one run that nobody killed."""
    end(begin(stage, "whole.arrow"))
    return stage / "whole.arrow"


def test_a_store_that_was_killed_twice_is_that_of_one_run(stage: Path, whole: Path) -> None:
    first = kill(stage, "t.arrow", begin(stage, "t.arrow"), at=15)
    assert 60 <= first < RESPONSES
    second = kill(stage, "t.arrow", begin(stage, "t.arrow"), at=first // 4 + 25)
    assert first < second < RESPONSES
    assert continued(end(begin(stage, "t.arrow"))) == second  # nothing that was on disk was computed again
    assert (stage / "t.arrow").read_bytes() == whole.read_bytes()
    assert not list(stage.glob("t.arrow.*"))


def test_two_processes_that_were_killed_give_the_numbers_of_one(stage: Path, whole: Path) -> None:
    done = kill(stage, "two.arrow", begin(stage, "two.arrow", *TWO), at=15)
    assert 60 <= done < RESPONSES
    assert continued(end(begin(stage, "two.arrow", *TWO))) == done
    one, two = (pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in (whole, stage / "two.arrow"))
    assert one.schema.names == two.schema.names
    for name in one.schema.names:
        left, right = one[name].combine_chunks(), two[name].combine_chunks()
        if name == "logprobs":  # in other batches, numbers are rounded otherwise
            assert left.value_lengths().equals(right.value_lengths())
            np.testing.assert_allclose(left.flatten(), right.flatten(), atol=1e-5)
        elif name not in ("top_ids", "top_logprobs"):
            assert left.equals(right), name
