"""Runs a benchmark of this folder and keeps what it prints, with the machine, in `results/NAME.txt`.

    python recipes/benchmarks/keep.py NAME -- scoring.py forward --dtype bfloat16 --data FILE

The first lines of the file say what ran when, on which machine, with which versions, and whether the machine was quiet:
its load average, and how many cores other programs used meanwhile. Folders of this machine are left out. If the
benchmark fails, nothing is written.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGES = ("distill_sampler", "torch", "transformers", "trl", "numpy", "triton")
PLAIN = {"PYTHONUNBUFFERED": "1", "COLUMNS": "150", "NO_COLOR": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""The environment of a benchmark: lines at once, of this width, without colours and loading bars."""
QUIET = 0.1
"""Of a quiet machine, other programs use less than this share of the cores."""


def keep(name: str, command: Sequence[str], into: Path) -> int:
    """Run `command`, a benchmark of this folder and its options, and write what it prints. Returns its exit status."""
    began, load, busy, own = datetime.now(UTC), os.getloadavg()[0], seconds_of_all(), seconds_of_ours()
    started = time.perf_counter()
    printed = []
    with subprocess.Popen(
        [sys.executable, str(HERE / command[0]), *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **PLAIN},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.decode(errors="replace").rstrip("\n")
            print(text, flush=True)
            printed.append(text.rsplit("\r", 1)[-1])  # of a progress bar, its last state
    seconds = time.perf_counter() - started
    if process.returncode:
        print(f"{command[0]} failed with status {process.returncode}, so nothing was kept.", file=sys.stderr)
        return process.returncode
    others = max((seconds_of_all() - busy - (seconds_of_ours() - own)) / seconds, 0.0)
    verdict = "quiet" if others < QUIET * (os.cpu_count() or 1) else "busy"
    header = {
        "command": shlex.join(["python", *command]),
        "date": f"{began:%Y-%m-%d %H:%M} UTC, {seconds:.0f} s",
        "code": code(),
        "machine": machine(),
        "threads": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')}",
        "versions": ", ".join([f"python {platform.python_version()}", *versions()]),
        "load average": f"{load:.2f} at the start, {os.getloadavg()[0]:.2f} at the end",
        "other programs": "unknown" if math.isnan(others) else f"{others:.2f} cores, {verdict}",
    }
    into.mkdir(parents=True, exist_ok=True)
    lines = [f"{key}: {value}" for key, value in header.items()]
    (into / f"{name}.txt").write_text(without_folders("\n".join([*lines, "", *printed])) + "\n", encoding="utf-8")
    return 0


def seconds_of_all() -> float:
    """Processor time that all programs of this machine have used since it started; NaN where that is not known."""
    if not Path("/proc/stat").exists():
        return float("nan")
    user, nice, system, _idle, _waiting, interrupts, soft, stolen, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def seconds_of_ours() -> float:
    """Processor time of this program and of those that it started."""
    of = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in of)


def code() -> str:
    """The commit of this repository."""
    asked = [("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no")]
    try:
        commit, changes = (subprocess.check_output(["git", *each], cwd=HERE, text=True).strip() for each in asked)
    except (OSError, subprocess.CalledProcessError):
        return "not a clone"
    return f"{commit}, and changes" if changes else commit


def machine() -> str:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    accelerators = "no NVIDIA accelerator"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        accelerators = subprocess.run(query, capture_output=True, text=True).stdout.strip().replace("\n", "; ")
    return f"{model}, {os.cpu_count()} cores, {memory / 2**30:.0f} GiB; {accelerators}"


def versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def without_folders(text: str) -> str:
    """Paths within the repository as seen from it, and of others their last part."""
    return re.sub(r"(?<![\w./])[~.]{0,2}/(?:[\w.+@~-]+/)+", "", text.replace(f"{ROOT}/", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the file")
    parser.add_argument("--into", type=Path, default=HERE / "results", help="another folder")
    parser.add_argument("command", nargs="+", help="after --: a benchmark and its options")
    options = parser.parse_args()
    sys.exit(keep(options.name, options.command, options.into))


if __name__ == "__main__":
    main()
