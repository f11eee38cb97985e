"""Pages of the site that are made of files outside docs/, and links that hold on the site.

The README becomes the first page, bench/results the benchmark pages; a link to a file that has no
page stays as its text. Run by mkdocs.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "csrc/README.md": "inside.md",
    "csrc/simulator/README.md": "simulator.md",
}
"""Files of the repository that are pages."""


def _sources() -> dict[str, str]:
    """Every file of the repository that the site has, and where."""
    found = dict(FILES)
    for path in sorted((ROOT / "docs").glob("*")):
        if path.is_file():
            found[f"docs/{path.name}"] = path.name
    for path in sorted((ROOT / "bench" / "results").iterdir()):
        if path.suffix in (".md", ".png"):
            found[f"bench/results/{path.name}"] = f"benchmarks/{path.name}"
    return found


SOURCES = _sources()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, place in SOURCES.items():
        if source.startswith("docs/"):
            continue
        path = ROOT / source
        content = path.read_text() if path.suffix == ".md" else path.read_bytes()
        files.append(File.generated(config, place, content=content))
    files.append(File.generated(config, "benchmarks.md", content=_benchmarks()))
    return files


def _benchmarks() -> str:
    """The list of what was measured."""
    lines = [
        "# Benchmarks",
        "",
        "What was measured, with the machine and the command that repeats it; made from "
        "`bench/results`. No figure here is of a GPU unless its page says so.",
        "",
    ]
    for source, place in SOURCES.items():
        if source.startswith("bench/") and place.endswith(".md"):
            title = (ROOT / source).read_text().partition("\n")[0].lstrip("# ")
            lines.append(f"- [{title}]({place})")
    return "\n".join(lines) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    places = {place: source for source, place in SOURCES.items()}
    source = places.get(page.file.src_uri)
    if source is None:
        return markdown
    here = os.path.dirname(source)

    def link(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        place = SOURCES.get(os.path.normpath(os.path.join(here, target)))
        if place is None:  # a file of the repository that is no page
            return (
                text
                if text.startswith("`")
                else f"{text} (`{os.path.normpath(os.path.join(here, target))}`)"
            )
        relative = os.path.relpath(place, os.path.dirname(page.file.src_uri) or ".")
        return f"{mark}[{text}]({relative}{anchor or ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)", link, markdown)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    # :class:`Name` of docstrings, and ~ before a long one.
    return re.sub(
        r":(?:class|func|meth|mod|attr|data|exc):<code>~?([^<]*)</code>", r"<code>\1</code>", html
    )
