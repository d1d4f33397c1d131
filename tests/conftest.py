"""Runs every test on eight virtual CPU devices with type checks on, and counts compilations.

With JAXINFER_TEST_GPU=1 JAX keeps its GPU instead: for the tests in `tests/gpu`.
"""

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))
from support import compiler

if os.environ.get("JAXINFER_TEST_GPU") != "1":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{compiler.flags(8)} {os.environ.get('XLA_FLAGS', '')}"  # the last one wins
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # beside another worker torch's threads wait for each other
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # nothing is left in the user's folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest
from jaxtyping import install_import_hook

# Annotations are checked at run time, in the tests only.
install_import_hook("jaxinfer", "support.checked")

COMPILATIONS = "/jax/core/compile/backend_compile_duration"
COMPILE_BUDGET = 3690
"""Programs the whole suite may compile: a test that needs one of its own shape pays for it here. The real checkpoints,
which run where there are some, have 34 of them."""

_compiled: Counter[str] = Counter()
"""Programs compiled so far by the file of the test that ran."""
_running = ["collection"]


def _count(name: str, _seconds: float, **_labels: object) -> None:
    if name == COMPILATIONS:
        _compiled[_running[0]] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fails where groups are asked for and ignored: every worker would compile every model."""
    if not getattr(config.option, "loadgroup", False):
        return
    for item in items:
        groups = sorted(_groups(item))
        if groups and not item.nodeid.endswith(f"@{'_'.join(groups)}"):
            raise pytest.UsageError(
                f"--dist loadgroup: pytest-xdist ignores the group of {item.nodeid}; install pytest<9.2"
            )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """What compiles from here on is this test's."""
    _running[0] = item.location[0]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Adds up the workers' counts; a total above the budget fails the run."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["compilations"] = dict(_compiled)
        return
    if _compiled.total() > COMPILE_BUDGET and session.exitstatus == 0:
        session.exitstatus = 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """A worker has finished."""
    _compiled.update(getattr(node, "workeroutput", {}).get("compilations", {}))


@pytest.fixture(scope="session", autouse=True)
def _no_freezing() -> Iterator[None]:
    """A full collection for each LLM that the tests make would take more time than most of them."""
    from jaxinfer._utils import heap  # not before annotations are checked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heap, "freeze", lambda: None)
        yield


MAPPINGS = 20_000
"""Memory mappings of a process from which programs are dropped. Each compiled program has about thirty, and Linux ends
a process that has 65,530 (vm.max_map_count) in the midst of compiling another."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Behind a group's last test what it has compiled is of no more use: programs, and the runners that hold them."""
    if nextitem is None or _groups(item) == _groups(nextitem) or _mappings() < MAPPINGS:
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("support."):
            for kept in vars(module).values():
                if hasattr(kept, "cache_clear"):
                    kept.cache_clear()
    jax.clear_caches()
    gc.collect()


def _groups(item: pytest.Item) -> set[str]:
    return {marker.args[0] for marker in item.iter_markers("xdist_group")}


def _mappings() -> int:
    """Of this process; 0 where it cannot be known."""
    path = Path("/proc/self/maps")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def pytest_terminal_summary(terminalreporter: object) -> None:
    """Says how many programs were compiled, and which files had the most of them."""
    total = _compiled.total()
    verdict = "within" if total <= COMPILE_BUDGET else "ABOVE"
    most = ", ".join(f"{file.removeprefix('tests/')} {count}" for file, count in _compiled.most_common(12))
    terminalreporter.write_line(f"compilations: {total}, {verdict} the budget of {COMPILE_BUDGET} ({most})")
