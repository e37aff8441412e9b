"""Every Python block of the pages in `docs/` runs, in order within a page; what they say of names and members is so."""

import os
import re
import subprocess
import sys
import tomllib
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerBase

import distill_sampler
from distill_sampler.contract import members
from distill_sampler.plugins import GROUPS
from distill_sampler.protocols import Metric, Policy, Reader, Tap
from tests import tiny
from tests.test_readme import stage

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
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
    for number, code in enumerate(blocks(page, "python")):
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


LINKING = [
    *PAGES,
    ROOT / "recipes" / "README.md",
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
]


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them: `"Does it help?" -> "does-it-help"`."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_to_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), f"{link}#{anchor}"
    for path in re.findall(r"`((?:distill_sampler|tests|recipes|docs)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


def test_every_metric_and_policy_is_in_the_tables() -> None:
    tables = (DOCS / "choosing.md").read_text(encoding="utf-8")
    public = [name for name, home in distill_sampler._HOME_OF.items() if home.split(".")[0] in ("metrics", "policies")]
    assert [name for name in public if f"`{name}" not in tables] == []


def test_every_guide_is_in_the_index_and_in_the_site() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    site = (ROOT / ".mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert page.stem == "index" or f"]({page.name})" in index, page.name
        assert f": {page.name}\n" in site, page.name


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="the site needs the extra [docs]")
    options = ["-f", ".mkdocs.yml", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    command = [sys.executable, "-m", "mkdocs", "build", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "site" / "reference").glob("*.html"))
    assert [name for name in distill_sampler.__all__ if f'.{name}"' not in told and name != "__version__"] == []


def test_modules_that_have_moved_are_where_the_changelog_says() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    moved = re.findall(r"^\| `(distill_sampler[\w.]+)` \| `(distill_sampler[\w.]+)` \|$", text, flags=re.MULTILINE)
    assert moved
    for before, now in moved:
        assert find_spec(now), now
        assert not _exists(before), before


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def test_the_citation_and_the_changelog_are_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == distill_sampler.__version__
    assert f"## [{distill_sampler.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
