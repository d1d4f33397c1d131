"""Run the tests that need a GPU, in a pytest process of their own."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.gpu.context import Context, Figures, Skip

ROOT = Path(__file__).resolve().parents[3]
FOLDER = "tests/gpu"


def run(context: Context) -> Figures:
    """Return the result counts of `tests/gpu`; the log is stored with the results.

    Raises:
        Skip: pytest or a GPU is missing.
        RuntimeError: a test failed.
    """
    report, log = (context.out / f"tests.{kind}" for kind in ("xml", "log"))
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", FOLDER, "-q", "-p", "no:cacheprovider", f"--junitxml={report.resolve()}"]
    # JAX would otherwise preallocate three quarters of the memory for a few megabytes.
    more = {"JAXINFER_TEST_GPU": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with log.open("w") as out:
        code = subprocess.run(command, cwd=ROOT, env=os.environ | more, stdout=out, stderr=subprocess.STDOUT).returncode
    text = log.read_text()
    if not report.exists():
        raise Skip(f"pytest did not start (code {code}): {text.strip()[-200:]}")
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    figures = {"passed": total - skipped - len(failed), "skipped": skipped, "failed": len(failed), "failures": failed}
    context.save(figures)
    if failed:
        raise RuntimeError(f"{len(failed)} of {total} failed, see {log}: {', '.join(failed[:5])}")
    if total == skipped and not context.dry:
        raise Skip(f"all {total} were skipped, see {log}")
    return figures
