"""The shape of the package: imports only go down, hosts stay outside, importing is quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import distill_sampler

PACKAGE = Path(distill_sampler.__file__).parent
LAYERS = [
    {"types", "hashing", "serialize", "distributed"},
    {"dataset", "store", "metrics", "policies", "sources"},
    {"reading", "planning", "specs"},
    {"artifacts"},
    {"curriculum"},
    {"integrations", "report"},
    {"cli"},
]
HOSTS = {"transformers", "trl", "deepspeed", "peft"}
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def layer_of(module: str) -> int:
    """`distill_sampler.policies.best_of -> 1`"""
    part = module.split(".")[1]
    (layer,) = (number for number, names in enumerate(LAYERS) if part in names)
    return layer


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "distill_sampler"
                else {node.module}
            )
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    module = ".".join(("distill_sampler", *path.relative_to(PACKAGE).with_suffix("").parts))
    layer = layer_of(module)
    for name in imports_of(path):
        package, _, part = name.partition(".")
        if package == "distill_sampler":
            public = part[:1].isupper() or part in ("attach", "__version__")
            assert layer > 4 if public else layer_of(name) <= layer, f"{module} imports {name}"
        if layer < layer_of("distill_sampler.integrations"):
            assert package not in HOSTS, f"{module} imports the host {name}"


def test_every_module_says_what_it_owns() -> None:
    assert [path.name for path in MODULES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []


def test_importing_needs_no_host_and_is_quick() -> None:
    code = """
import sys, time, torch
started = time.perf_counter()
import distill_sampler
seconds = time.perf_counter() - started
hosts = [name for name in ("transformers", "trl", "deepspeed", "peft", "datasets") if name in sys.modules]
assert not hosts, hosts
assert all(hasattr(distill_sampler, name) for name in distill_sampler.__all__ if name != "attach")
print(seconds)
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert float(output) < 5  # a second on a quiet machine


def test_every_public_name_has_a_docstring() -> None:
    assert [name for name in distill_sampler.__all__ if not getattr(distill_sampler, name).__doc__] == []
