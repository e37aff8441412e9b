"""Which releases of transformers and TRL the library works with: each in an environment of its own, the same tests.

    python recipes/matrix.py                      # fresh environments; needs the package index, minutes for each
    python recipes/matrix.py --reuse              # on top of this Python's packages: only what differs is installed
    python recipes/matrix.py --reuse --only 4.57 --quick

The tests are the repository's own: the plan is the same in every release and for every layout of the data, what is
trained is what was planned, in packs too, loss weights are exact, observed scores are those of a scoring pass, and a
resume trains the rest, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RELEASES = {
    "4.57": ("transformers==4.57.6", "trl==0.24.0"),
    "5.3": ("transformers==5.3.0", "trl==1.8.0"),
    "5.14": ("transformers==5.14.0", "trl==1.12.0"),
    "latest": ("transformers", "trl"),
}
QUICK = (
    "tests/test_versions.py::test_every_release_plans_the_same_for_every_layout_and_trains_it",
    "tests/test_versions.py::test_a_resume_trains_the_rest",
)
TESTS = (
    *QUICK,
    "tests/test_attach.py::test_the_order_trained_is_the_order_planned",
    "tests/online/test_loss_weights.py::test_training_descends_the_weighted_loss",
    "tests/online/test_observing.py::test_observed_scores_equal_those_of_a_scoring_pass",
    "tests/test_packed_training.py::test_the_packs_trained_are_the_packs_planned",
    "tests/test_packed_training.py::test_a_model_that_makes_a_cache_trains_packs_as_one_that_does_not",
    "tests/resume/test_matrix.py::test_a_resume_from_any_place_under_any_setting_trains_the_same",
)


def environment(folder: Path, packages: tuple[str, ...], *, reuse: bool) -> Path:
    """Make an environment with these packages.

    Args:
        folder: where to make it.
        packages: what to install, as pip takes it.
        reuse: let it see the packages of this Python, so that only what differs is installed.

    Returns:
        Its Python.

    Raises:
        RuntimeError: pip cannot install the packages.
    """
    venv.create(folder, with_pip=not reuse, clear=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    if reuse:
        seen = [path for path in sys.path if path.endswith("site-packages")]
        (site / "reused.pth").write_text("\n".join(seen) + "\n", encoding="utf-8")
    else:
        packages = (*packages, f"{ROOT}[test]")
    packages = (*packages, f"torch=={_torch()}")
    done = subprocess.run([python, "-m", "pip", "install", "-q", "-U", *packages], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return python


def _torch() -> str:
    """The release of this Python's torch, which all environments get, so that only the named packages differ."""
    import torch

    return str(torch.__version__).partition("+")[0]


def checked(python: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run tests of this repository with another Python. Warnings of other releases are no errors."""
    command = [python, "-m", "pytest", "-m", "", "-o", "filterwarnings=ignore", "-p", "no:cacheprovider", *tests]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def installed(python: Path) -> str:
    """`transformers 4.57.6, trl 0.24.0, …` as that Python sees them."""
    code = "from importlib.metadata import version as v; print(*(f'{n} {v(n)}' for n in %r), sep=', ')"
    names = ("transformers", "trl", "accelerate", "datasets", "torch")
    return subprocess.run([python, "-c", code % (names,)], capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RELEASES, action="append", help="one row of the matrix; may be repeated")
    parser.add_argument("--reuse", action="store_true", help="build on the packages of this Python")
    parser.add_argument("--quick", action="store_true", help="the plans and a resume alone")
    parser.add_argument("--folder", type=Path, default=Path("matrix"), help="where the environments are made")
    options = parser.parse_args(arguments)
    say = Console()
    table = Table("release", "installed", "seconds", "tests", box=None, pad_edge=False)
    failed = 0
    for release in options.only or RELEASES:
        python = environment(options.folder.resolve() / release, RELEASES[release], reuse=options.reuse)
        started = time.perf_counter()
        done = checked(python, QUICK if options.quick else TESTS)
        failed += done.returncode != 0
        if done.returncode:
            say.print(done.stdout[-6000:] + done.stderr[-2000:], markup=False)
        last = (done.stdout.strip().splitlines() or ["no test ran"])[-1]
        table.add_row(release, installed(python), f"{time.perf_counter() - started:.0f}", last)
    say.print(table)
    return failed


if __name__ == "__main__":
    sys.exit(main())
