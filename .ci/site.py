"""mkdocs' hook: pages of the site that lie beside docs/ in the repository, and links between both."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\[([^\]\[]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Make the links of a page lead to pages; a link to a file that is none becomes its text."""
    inside = {page: name for name, page in PAGES.items()}
    here = ROOT / inside[page.file.src_uri] if page.file.src_uri in inside else ROOT / "docs" / page.file.src_uri

    def moved(found: re.Match[str]) -> str:
        target = (here.parent / found[2]).resolve()
        if not target.exists():
            return found[0]
        name = target.relative_to(ROOT).as_posix()
        if name in PAGES:
            uri = PAGES[name]
        elif name.startswith("docs/") and target.suffix == ".md":
            uri = name.removeprefix("docs/")
        else:
            return found[1]
        up = "../" * page.file.src_uri.count("/")
        return f"[{found[1]}]({up}{uri}{found[3] or ''})"

    return LINK.sub(moved, markdown)
