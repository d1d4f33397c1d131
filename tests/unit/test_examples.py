"""The examples in the README and in docstrings run as they stand."""

import re
import textwrap
from pathlib import Path

import pytest

from jaxinfer.functional import forward, growing

pytestmark = pytest.mark.xdist_group("demo")
README = Path(__file__).parents[2] / "README.md"


def test_the_ten_lines_of_the_readme(capsys):
    code, *_ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "17 plus 25 is 42." in out and out.count("capital of France is Paris") >= 1
    assert len(code.strip().splitlines()) <= 12


@pytest.mark.slow
def test_the_loop_of_rl_in_thirty_lines(capsys):
    text = (README.parent / "docs/rl.md").read_text()
    code, *_ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(compile(code, "rl.md", "exec"), names)
    assert re.findall(r"^\d \S+ (\S+) (\S+)$", capsys.readouterr().out, re.MULTILINE) == [("1.0", "1.0")] * 3
    assert names["llm"].weight_version == 3
    names["llm"].close()
    assert len([line for line in code.splitlines() if line.strip()]) <= 36


def run_example(module):
    """The names that the indented lines of a module's docstring leave."""
    lines = module.__doc__.splitlines()
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line.strip()))
    names = {}
    exec(compile("import jax, numpy as np\n" + code, module.__name__, "exec"), names)
    return names


def test_the_example_of_functional():
    names = run_example(forward)
    assert names["position"] == 19 and names["logits"].shape == (1, names["program"].vocab)


def test_the_example_of_growing():
    names = run_example(growing)
    assert names["cache"].lengths == (3 + 20,) and names["logits"].shape == (1, names["program"].vocab)
