"""The launcher of these tests hides no failure of a script."""

from pathlib import Path

import pytest

from tests.distributed.launcher import launch

ABORTS = "import os, sys\nsys.teardown = type('Aborts', (), {'__del__': lambda self, abort=os.abort: abort()})()\n"
UNDER_DEEPSPEED = "import sys\nsys.modules['deepspeed'] = sys\n"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (UNDER_DEEPSPEED + "print('all done')", 0),
        (UNDER_DEEPSPEED + "print('all done')\n" + ABORTS, 0),  # while the interpreter is torn down
        (ABORTS, -6),  # no DeepSpeed: an abort of ours would be seen
        (UNDER_DEEPSPEED + "raise RuntimeError", 1),
        (UNDER_DEEPSPEED + "sys.exit(3)", 3),
        (UNDER_DEEPSPEED + "import atexit, os\natexit.register(os._exit, 4)", 4),
        (UNDER_DEEPSPEED + "import os\nos.abort()", -6),
    ],
)
def test_a_launched_script_keeps_its_exit_code(script: str, code: int, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(script, encoding="utf-8")
    done = launch(path, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert ("all done" in done.stdout) == ("all done" in script)
