"""Every notebook runs from top to bottom, and is the pair of its script."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("notebooks")]


def test_there_are_notebooks():
    assert SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_is_paired(script):
    stored = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    written = jupytext.read(script)
    assert [(c.cell_type, c.source) for c in stored.cells] == [(c.cell_type, c.source) for c in written.cells]
    assert any(cell.get("outputs") for cell in stored.cells), "the committed notebook shows its results"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_runs(script):
    book = jupytext.read(script)
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    text = " ".join(str(output) for cell in book.cells for output in cell.get("outputs", []))
    assert "42" in text and "Paris" in text and "image/png" in text
