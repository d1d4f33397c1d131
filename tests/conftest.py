"""Run all tests on eight virtual CPU devices with run-time type checks, and count compiled programs.

With JAXINFER_TEST_GPU=1, JAX uses the GPU instead, and with JAXINFER_TEST_DEVICES=1 a single CPU device
(`tests/gpu/run.py`).
"""

import contextlib
import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(__file__))
from support import compiler, deadline

if os.environ.get("JAXINFER_TEST_GPU") != "1":
    devices = int(os.environ.get("JAXINFER_TEST_DEVICES", "8"))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{compiler.flags(devices)} {os.environ.get('XLA_FLAGS', '')}"  # the last duplicate wins
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # with several test workers, torch's threads contend for cores
os.environ |= compiler.cache_settings(os.environ)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

with contextlib.suppress(ImportError):  # tests that need hypothesis are skipped
    import hypothesis

    # Otherwise a test fails outside CI if one example takes 200 ms.
    hypothesis.settings.register_profile(
        "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("patient")

import jax
import pytest
from jaxtyping import install_import_hook
from support.families import families

# Type annotations are checked at run time in tests only. They take a fifth of the time.
if os.environ.get("JAXINFER_TEST_TYPES") != "0":
    install_import_hook("jaxinfer", "support.checked")

COMPILATIONS = "/jax/core/compile/backend_compile_duration"
COMPILE_BUDGET = 8350 + sum(12 if data.variant else 25 for data in families().values() if data.architecture)
"""Maximum number of programs that the whole suite may compile; a test that needs a new shape must raise it. The tests
on real checkpoints, which run only if these are available, account for 34, those of the Triton kernels, which need
Triton 3.9, for about 470, and a decoder family for 25, or 12 if it is compared with transformers alone."""

_compiled: Counter[str] = Counter()
"""Number of programs compiled or read from the compilation cache so far, by test file."""
_running = ["collection"]
_crashed: list[object] = []
"""What workers that ended too early said."""


def _count(name: str, _seconds: float, **_labels: object) -> None:
    if name == COMPILATIONS:
        _compiled[_running[0]] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that would start after the run's time limit."""
    deadline.skip_late(item)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fail if pytest-xdist ignores the tests' groups: every worker would then compile every model."""
    if not getattr(config.option, "loadgroup", False):
        return
    for item in items:
        groups = sorted(_groups(item))
        if groups and not item.nodeid.endswith(f"@{'_'.join(groups)}"):
            raise pytest.UsageError(
                f"--dist loadgroup: pytest-xdist ignores the group of {item.nodeid}; install pytest<9.2"
            )


NUMERIC = ("tests/unit/kernels/", "tests/unit/layers/")
"""Folders of the tests that depend most on JAX's version; CI runs all of them on the newer one."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests of kernels and layers, so that one run of pytest has these and the quick tier."""
    if item.nodeid.startswith(NUMERIC):
        item.add_marker("numeric")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """Attribute programs compiled from here on to this test."""
    _running[0] = item.location[0]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Add up the counts of the workers; fail the run if the total exceeds the budget or a worker has crashed."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["compilations"] = dict(_compiled)
        return
    # Neither shows again where failed tests run once more, so it is not their status.
    if _crashed or _compiled.total() > COMPILE_BUDGET:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """Add the counts of a finished worker, or record that it crashed."""
    if error:
        _crashed.append(error)
    _compiled.update(getattr(node, "workeroutput", {}).get("compilations", {}))


@pytest.fixture(scope="session", autouse=True)
def _no_freezing() -> Iterator[None]:
    """Disable `heap.freeze`: a full collection for each LLM would take longer than most tests."""
    from jaxinfer._utils import heap  # import only after the type checker is installed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heap, "freeze", lambda: None)
        yield


MAPPINGS = 20_000
"""Number of memory mappings of the process above which compiled programs are dropped. Each compiled program has about
thirty; a process at Linux's limit of 65,530 (vm.max_map_count) crashes while compiling."""
RESIDENT = 4 << 30
"""Memory of the process, in bytes, above which compiled programs are dropped as well: two workers run side by side."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After the last test of a group, drop its compiled programs and the runners that hold them."""
    from jaxinfer._utils import heap  # import only after the type checker is installed

    if nextitem is None or _groups(item) == _groups(nextitem):
        return
    if _resident() > RESIDENT:
        heap.trim()
    if _mappings() < MAPPINGS and _resident() < RESIDENT:
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("support."):
            for kept in vars(module).values():
                if hasattr(kept, "cache_clear"):
                    kept.cache_clear()
    jax.clear_caches()
    gc.collect()
    heap.trim()


def _groups(item: pytest.Item) -> set[str]:
    return {marker.args[0] for marker in item.iter_markers("xdist_group")}


def _mappings() -> int:
    """Return the number of memory mappings of this process; 0 if unknown."""
    path = Path("/proc/self/maps")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _resident() -> int:
    """Return the memory of this process in bytes; 0 if unknown."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Report the number of compiled programs, the files with the most, and tests left out for want of time."""
    total = _compiled.total()
    verdict = "within" if total <= COMPILE_BUDGET else "ABOVE"
    most = ", ".join(f"{file.removeprefix('tests/')} {count}" for file, count in _compiled.most_common(12))
    terminalreporter.write_line(f"compilations: {total}, {verdict} the budget of {COMPILE_BUDGET} ({most})")
    if late := deadline.left_out(terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(late)
