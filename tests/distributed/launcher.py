"""Scripts on one process, or several under `accelerate launch`; one that hangs ends with its stacks.

python launcher.py SECONDS SCRIPT …    what each process runs: the script, watched
"""

import atexit
import faulthandler
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

LIMIT = 400
"""Seconds after which a process counts as hanging. Most take half a minute, DeepSpeed's first minutes: it compiles."""


def launch(
    script: Path,
    *options: str,
    cwd: Path,
    config: Path | None = None,
    environment: Mapping[str, str] | None = None,
    limit: int = LIMIT,
    processes: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, with `config` under `accelerate launch`, on `processes` if not on the config's number.

    A process that is not done after `limit` seconds writes the stacks of its threads to stderr and exits with 1. That
    ends the launcher, and the other processes with it.
    """
    command = [sys.executable]
    if config is not None:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
        if processes is not None:
            command += ["--num_processes", str(processes)]
    command += [__file__, str(limit), str(script), *options]
    everything = {**os.environ, **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=limit + 120, cwd=cwd, env=everything)


class LeaveAfterDeepSpeed:
    """Ends a process whose script ran to its end under DeepSpeed before the interpreter is torn down.

    DeepSpeed keeps process groups after their destruction, so the threads of gloo live on. One that releases its last
    tensor while the interpreter is torn down aborts the process, although all work is done: a race in PyTorch
    (its issue 190489 and pull request 179291). A script that fails or exits by itself ends as usual, with its own code.
    """

    done = False

    def __init__(self) -> None:
        atexit.register(self._leave)  # registered first, it is called last: when threads and other handlers have ended

    def _leave(self) -> None:
        if self.done and "deepspeed" in sys.modules:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


if __name__ == "__main__":
    leave = LeaveAfterDeepSpeed()
    faulthandler.dump_traceback_later(int(sys.argv[1]), exit=True)
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    leave.done = True
