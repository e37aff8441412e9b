"""What `.mkdocs.yml` needs beside the guides: a page of the reference for each group of public names, and the recipes.

Guides link to files of the repository as people read them there (`../recipes/README.md`). In the site, the recipes are
copied under `recipes/`, and these links are rewritten.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

import distill_sampler

ROOT = Path(__file__).parents[1]
GROUPS = {
    "curriculum": ("Curriculum and hosts", ("curriculum", "dataset", "integrations", "planning", "reading", "sources")),
    "metrics": ("Metrics", ("metrics",)),
    "policies": ("Policies", ("policies",)),
    "objectives": ("Objectives", ("objectives",)),
    "protocols": ("Protocols and values", ("protocols", "types")),
}
"""By page: its title, and the packages whose public names it has."""
COPIED = ("recipes/*.md", "recipes/*.py", "recipes/*.ipynb", "recipes/configs/*.yaml", "recipes/benchmarks/*.svg")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the reference and the recipes."""
    for page in GROUPS:
        files.append(File.generated(config, f"reference/{page}.md", content=reference(page)))
    for pattern in COPIED:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Turn links to files of the repository into links of the site."""
    if page.file.src_uri.startswith("recipes/"):
        return markdown.replace("](../docs/", "](../")
    return re.sub(r"\]\(\.\./(recipes/)", r"](\1", markdown)


def reference(page: str) -> str:
    """The Markdown of a page of the reference: each name, described by its docstring."""
    title, packages = GROUPS[page]
    names = [
        f"::: distill_sampler.{home}.{name}"
        for name, home in distill_sampler._HOME_OF.items()
        if home.partition(".")[0] in packages
    ]
    return "\n\n".join([f"# {title}", *sorted(names)]) + "\n"
