"""Every notebook runs from top to bottom, and is the pair of its script."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))

SHOWN = {
    "cache": (
        "copies of blocks ((2, 3), (2, 4), (2, 5))",
        "8 sequences",
        "then: evicted under pressure",
        "then: salt differs",
        "preemptions",
        "image/png",
    ),
    "cross_attention": ("inputs encoded: 1 before, 1 now", "encoder input", "image/png"),
    "growth": ("times as fast as concatenation", "CacheConsumedError", "image/png"),
    "serving": ("Paris", "Timeline of 20 sequences", "prompt tokens", "image/png"),
    "quickstart": ("42", "Paris", "image/png"),
    "grpo": ("serving=llm.step_shape     100.0% of", "held-out questions are answered right", "image/png"),
    "placement": ("layers.0 ... layers.79", "none lies on the first device only", "pad_heads=True", "46 all-reduce"),
}
"""What each must show."""

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
def test_it_runs(script, monkeypatch):
    monkeypatch.setenv("GRPO_STEPS", "1")
    book = jupytext.read(script)
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    text = " ".join(str(output) for cell in book.cells for output in cell.get("outputs", []))
    assert all(said in text for said in SHOWN[script.stem])
