"""The shape of the package: imports only go down, hosts stay outside, importing is quick."""

import ast
import dataclasses
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import distill_sampler

PACKAGE = Path(distill_sampler.__file__).parent
LAYERS = [
    {"field_docs", "column_names", "correlation", "progress", "short_names", "showing", "vocabulary"},
    {"types"},
    {"protocols"},
    {"hashing", "serialize", "distributed"},
    {"content", "watch"},
    {"dataset", "store", "contract", "engines"},
    {"truncation"},
    {"metrics", "policies", "sources"},
    {"reading"},
    {"planning"},
    {"plugins"},
    {"specs"},
    {"artifacts"},
    {"scoring", "tracing", "rows"},
    {"report"},
    {"cycle"},
    {"notebook"},
    {"curriculum"},
    {"objectives"},
    {"integrations", "testing"},
    {"compare"},
    {"cli"},
]
"""From the bottom up. A module imports from layers below its own, and from its own package."""
LONGEST_FILE = 430
HOSTS = {"transformers", "trl", "deepspeed", "peft", "datatrove", "ray", "axolotl"}
PUBLIC_FUNCTIONS = ("attach", "attached", "detach", "score_rows")
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def layer_of(module: str) -> int:
    """`distill_sampler.policies.best_of -> 4`"""
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
    layer, package = layer_of(module), module.split(".")[1]
    for name in imports_of(path):
        root, _, part = name.partition(".")
        if root == "distill_sampler":
            if part in ("__version__", "_HOME_OF"):  # loads nothing
                continue
            if part[:1].isupper() or part in (
                "attach",
                "attached",
                "detach",
                "score_rows",
            ):  # public names, loaded when used
                assert package in ("cli", "report"), f"{module} imports {name} through the package"
            else:
                own = part.split(".")[0] == package
                assert own or layer_of(name) < layer, f"{module} imports {name}"
        if layer < layer_of("distill_sampler.integrations"):
            assert root not in HOSTS, f"{module} imports the host {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_too_long_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_every_module_says_what_it_owns() -> None:
    assert [path.name for path in MODULES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []


def test_importing_loads_nothing_heavy() -> None:
    code = """
import sys
import distill_sampler
heavy = ("torch", "numpy", "pyarrow", "transformers", "trl", "deepspeed", "peft", "datasets", "plotly")
assert [name for name in heavy if name in sys.modules] == []
hosts = {"attach", "attached", "detach", "CurriculumLoop", "score_rows"}
assert all(hasattr(distill_sampler, name) for name in set(distill_sampler.__all__) - hosts)
assert [name for name in ("transformers", "trl", "deepspeed", "peft", "datasets") if name in sys.modules] == []
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_offered_where_it_lives() -> None:
    assert sorted(distill_sampler._HOME_OF) == sorted(distill_sampler.__all__)


def test_every_public_name_has_a_docstring() -> None:
    assert [name for name in distill_sampler.__all__ if not getattr(distill_sampler, name).__doc__] == []


def test_help_shows_what_each_field_is() -> None:
    for name in distill_sampler.__all__:
        item = getattr(distill_sampler, name)
        if dataclasses.is_dataclass(item):
            for field in dataclasses.fields(item):
                assert f"    {field.name}: " in item.__doc__, f"{name}.{field.name}"
    shown = pydoc.render_doc(distill_sampler.BestOf, renderer=pydoc.plaintext)
    assert re.search(r"^ \|      k: \w", shown, flags=re.MULTILINE)
