"""Every Python block of the pages in `docs/` runs, in order within a page; what they say of names and members is so."""

import re
import sys
import tomllib
import types
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from distill_sampler.contract import members
from distill_sampler.plugins import GROUPS
from distill_sampler.types import Metric, Policy, Reader, Tap
from tests import tiny
from tests.test_readme import stage

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(
    page: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = stage(tmp_path, tokenizer)
    columns = tiny.candidates().add_column("correct", [True] * len(tiny.candidates()))
    names |= {"candidates": tiny.tokenised(columns, tokenizer), "teacher_model": tiny.model(1)}
    module = types.ModuleType(f"page_{page.stem}")  # classes of a module can be copied, as those of a file
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    found = blocks(page, "python")
    assert found
    for number, code in enumerate(found):
        exec(compile(code, f"{page.name}, Python block {number}", "exec"), vars(module))


def test_entry_points_are_of_the_groups_that_are_read() -> None:
    told = [tomllib.loads(code)["project"]["entry-points"] for page in PAGES for code in blocks(page, "toml")]
    assert {group for entry in told for group in entry} == set(GROUPS.values())


@pytest.mark.parametrize(
    ("page", "protocol"), [("metric", Metric), ("policy", Policy), ("reader", Reader), ("host", Tap)]
)
def test_a_page_names_every_member_of_its_protocol(page: str, protocol: type) -> None:
    rows = re.findall(r"^\| `(\w+)", (DOCS / f"{page}.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert members(protocol) <= set(rows)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
