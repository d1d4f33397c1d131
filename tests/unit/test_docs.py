"""The documents are wrapped, and the files, modules and links that they name exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxinfer.models import registry

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jaxinfer"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
WIDTH = 120
WRITTEN = {"results/report.md"}
"""Files that a command of the docs writes."""

PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*/(?:[\w-]+\.(?:py|md|json|cc|h|ipynb|txtpb|txt))?")
MODULE = re.compile(r"[a-z_]+(?:\.[A-Za-z_]\w*)+")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code(page: Path) -> Iterator[str]:
    """Yield the words within backticks, and those of fenced commands."""
    text = page.read_text(encoding="utf-8")
    fence = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
    for language, block in fence.findall(text):
        yield from block.split() if language == "bash" else ()
    for span in re.findall(r"`([^`]+)`", fence.sub("", text)):
        yield from span.split()


def exists(path: str, page: Path) -> bool:
    folders = ROOT, PACKAGE, ROOT / "scripts", page.parent
    return path in WRITTEN or any((folder / path).exists() for folder in folders)


def found(name: str) -> bool:
    """Return whether a dotted name is a module, or a name that the module's source has."""
    parts = name.removeprefix("jaxinfer.").split(".")
    for length in range(len(parts), -1, -1):
        path = PACKAGE.joinpath(*parts[:length])
        source = next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)
        if source is not None:
            return set(parts[length:]) <= set(re.findall(r"\w+", source.read_text(encoding="utf-8")))
    return False


@pages
def test_lines_are_wrapped(page: Path):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [f"{number}: {len(line)}" for number, line in enumerate(lines, 1) if len(line) > WIDTH] == []


def test_sources_are_wrapped_and_formatted_without_exceptions():
    """Ruff checks the width of Python alone, and leaves alone what a comment takes out of it."""
    exempt = re.compile(r"# fmt: (?:skip|off)\b")
    folders = [ROOT / name for name in ("jaxinfer", "scripts", "tests", "notebooks", "examples")]
    sources = [path for folder in folders for end in ("*.py", "*.cc", "*.h") for path in folder.rglob(end)]
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*sources, ROOT / "pyproject.toml", ROOT / ".ci/run"]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDTH or exempt.search(line)
    ]
    assert wrong == []


@pages
def test_files_that_are_named_exist(page: Path):
    paths = {word.strip("'\"(),") for word in code(page)}
    named = {path for path in paths if PATH.fullmatch(path) and not re.search(r"[A-Z]{3}", path)}
    assert sorted(path for path in named if path.endswith((".py", ".md")) and not exists(path, page)) == []
    folders = {
        path
        for path in named
        if path.split("/")[0] in {"jaxinfer", "tests", "scripts", "docs", "notebooks", "examples"}
    }
    assert sorted(path for path in folders if not exists(path, page)) == []


@pages
def test_modules_that_are_named_exist(page: Path):
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    words = {re.split(r"[(\[=]", word.strip(",;:"))[0] for word in code(page)}
    named = {word for word in words if MODULE.fullmatch(word) and word.split(".")[0] in packages | {"jaxinfer"}}
    names = {word for word in named if not word.endswith((".py", ".weight", ".bias", ".json"))}
    assert sorted(name for name in names if not found(name)) == []


@pages
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\((?!http)([^)#]*)(#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert sorted(link for link, _ in links if link and not (page.parent / link).exists()) == []


def test_decisions_are_numbered_newest_first():
    text = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")
    numbers = [int(number) for number in re.findall(r"^## (\d+)\. ", text, re.MULTILINE)]
    assert numbers == sorted(set(numbers), reverse=True) and len(numbers) >= 75


def test_what_is_missing_is_found():
    page = ROOT / "README.md"
    assert exists("models/llama.py", page) and not exists("models/nowhere.py", page)
    assert found("kv.spec.Full") and found("jaxinfer.sharding.plan") and not found("kv.nowhere.Full")


def test_the_readme_lists_the_architectures_of_the_registry():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"^\*\*Architectures\.\*\*\n(.*?)^They cover", text, re.DOTALL | re.MULTILINE)
    assert listed and sorted(re.findall(r"`(\w+)`", listed[1])) == sorted(registry.families())
