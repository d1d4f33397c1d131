"""Imports run one way, and importing the package does nothing but import."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

import jaxinfer

PACKAGE = Path(jaxinfer.__file__).parent

TIERS = (
    {"errors", "_utils"},
    {"distributed", "sharding", "structured_outputs", "speculative_config"},
    {"kernels", "outputs", "sampling_params", "config", "demo", "steering", "adapter"},
    {"beam_params", "kv", "recording"},
    {"layers"},
    {"checkpoint"},
    {"media"},
    {"models"},
    {"functional"},
    {"engine"},
    {"results"},
    {"inputs"},
    {"loading"},
    {"llm_base"},
    {"llm"},
    {"async_control", "integrations"},
    {"async_llm"},
    {"commands"},
    {"serve"},
    {"jaxinfer"},
    {"cli"},
    {"__main__"},
)
"""The files and folders of the package, lowest first: each imports only from lines above its own."""

TRITON = (
    "jaxinfer.kernels.triton.jit",
    "jaxinfer.kernels.triton.triton_kernels",
    "jaxinfer.kernels.matmul.triton_products",
)
"""What imports triton."""
MOSAIC = "jaxinfer.kernels.attention.mosaic_kernel"
"""What imports Pallas' compiler for NVIDIA GPUs, which sets variables of its own."""
SERVER = "jaxinfer.serve."
"""What imports the libraries of the extra `serve`."""
ADAPTERS = {"jaxinfer.integrations.lm_eval": "lm_eval", "jaxinfer.integrations.tunix": "tunix"}
"""What imports the library that it adapts `LLM` to."""


def files() -> dict[str, Path]:
    """All modules by their dotted names; a package by its own."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("jaxinfer", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it and in any form."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in known or node.module in known:
                    yield whole if whole in known else str(node.module)


def graph() -> dict[str, set[str]]:
    """For each module those it imports."""
    known = files()
    return {name: set(imported(ast.parse(path.read_text()), known)) for name, path in known.items()}


def tier(module: str) -> int:
    top = module.split(".")[1] if "." in module else module
    ranks = [rank for rank, names in enumerate(TIERS) if top in names]
    assert ranks, f"jaxinfer.{top} is new: say in TIERS what it may know"
    return ranks[0]


def test_every_import_runs_downwards():
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if name.split(".")[1:2] != other.split(".")[1:2] and tier(other) >= tier(name)
    ]
    assert wrong == []


@pytest.mark.slow
def test_sharding_knows_no_model_until_it_is_asked_for_a_plan():
    found = "os.environ['MODELS'] = str('jaxinfer.models' in sys.modules)"
    loaded = f"import sys, os; from jaxinfer import sharding; {{}}; {found}"
    assert ["MODELS", "False"] in report(loaded.format("pass"))["changed"]
    assert ["MODELS", "True"] in report(loaded.format("sharding.plan"))["changed"]


def test_no_file_needs_itself():
    order = list(TopologicalSorter(graph()).static_order())  # CycleError names the cycle
    assert set(order) == set(files())


@pytest.mark.parametrize(
    "line", ["import jaxinfer.kv.pool", "from jaxinfer.kv import pool", "from jaxinfer.kv.pool import BlockPool"]
)
def test_the_reader_of_imports_sees_every_form(line: str):
    inside = f"def f():\n    if TYPE_CHECKING:\n        {line}\n"
    assert list(imported(ast.parse(inside), files())) == ["jaxinfer.kv.pool"]


REPORT = """
import json, os, sys
before = dict(os.environ)
{statement}
after = dict(os.environ)
started = False
if "jax" in sys.modules:
    from jax._src import xla_bridge
    started = xla_bridge.backends_are_initialized()
print(json.dumps(dict(
    changed=sorted(set(before.items()) ^ set(after.items())), started=started,
    loaded=[name for name in ("jax", "torch", "transformers") if name in sys.modules],
)))
"""


def report(statement: str) -> dict:
    """What a fresh interpreter says after a statement."""
    command = [sys.executable, "-c", REPORT.format(statement=statement)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_the_package_loads_nothing_else():
    assert report("import jaxinfer") == {"changed": [], "started": False, "loaded": []}


@pytest.mark.parametrize(
    "statement",
    [
        pytest.param("from jaxinfer import LLM, EngineConfig, SamplingParams", marks=pytest.mark.slow),
        pytest.param("from jaxinfer import models, sharding, kv, functional", marks=pytest.mark.slow),
        "import importlib; [importlib.import_module(name) for name in {modules!r}]",
    ],
    ids=["names", "wings", "every module"],
)
def test_importing_starts_no_backend_sets_no_variable_and_needs_no_torch(statement: str):
    # Without the extras that bring triton and the server's libraries, what needs them is never imported.
    known = [name for name in files() if name not in TRITON or find_spec("triton")]
    known = [name for name in known if not name.startswith(SERVER) or find_spec("uvicorn")]
    known = [name for name in known if name != MOSAIC and name not in ADAPTERS]  # lm_eval imports torch
    found = report(statement.format(modules=known))
    assert (found["changed"], found["started"]) == ([], False)
    assert "torch" not in found["loaded"]


def test_a_started_backend_and_a_set_variable_are_seen():
    found = report("import os, jax; jax.devices(); os.environ['JAXINFER_TEST'] = '1'")
    assert found["started"] and ["JAXINFER_TEST", "1"] in found["changed"]


def test_the_public_names_are_there_and_others_are_not():
    assert all(getattr(jaxinfer, name) is not None for name in jaxinfer.__all__)
    assert set(jaxinfer.__all__) <= set(dir(jaxinfer))
    with pytest.raises(AttributeError, match="no_such_name"):
        jaxinfer.no_such_name  # noqa: B018
