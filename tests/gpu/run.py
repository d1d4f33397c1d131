"""Run the tests of numbers on the device at hand: `python tests/gpu/run.py --out DIR`, resumable.

The tests are those of `tests/equivalence`, `tests/parity` and `tests/real`, and those of this folder, on one device: a
GPU where JAX sees one, else a CPU. Each group runs in a process of its own and writes DIR/NAME.json; a group that has
passed is not run again by the same command.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENCE = "tests/equivalence/test_"
SECONDS = 470.0
LEAST = 15.0
"""Seconds that must be left to start a group."""


@dataclass(frozen=True)
class Group:
    """Tests that run in one process."""

    name: str
    what: str
    files: tuple[str, ...]
    only: str = ""
    """Expression of pytest's `-k`."""


GROUPS = (
    Group("kernels", "attention and grouped products against the oracle", ("tests/gpu",)),
    Group(
        "parity",
        "logits and greedy tokens of transformers: Llama, experts",
        ("tests/parity/test_parity.py",),
        "llama or (qwen3_moe and not sinks)",
    ),
    Group(
        "batching",
        "batches, chunks, preemption and prefixes change no token",
        tuple(f"{EQUIVALENCE}{name}.py" for name in ("batch", "chunks", "preemption", "prefix")),
        "not variant",
    ),
    Group("levels", "every level of the sampler beside every other", (f"{EQUIVALENCE}levels.py",)),
    Group("recurrent", "recurrent layers: chunks, prefixes, forks", (f"{EQUIVALENCE}recurrent.py",)),
    Group("beams", "beam search", (f"{EQUIVALENCE}beams.py",), "llama and not sharded"),
    Group("contiguous", "a contiguous cache gives a paged one's tokens", (f"{EQUIVALENCE}contiguous.py",), "llama"),
    Group("int8", "int8 products", ("tests/unit/kernels/matmul/test_int8_matmul.py",)),
    Group("deterministic", "the same bits alone and in a batch", (f"{EQUIVALENCE}deterministic.py",), "llama"),
    Group(
        "real", "trained checkpoints against transformers", ("tests/real/test_models.py",), "log_probabilities or int8"
    ),
)
"""In order of worth: what a wrong kernel breaks first."""


def main() -> int:
    """Run the groups without a passed result; return 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=[group.name for group in GROUPS], metavar="GROUP")
    parser.add_argument("--force", action="store_true", help="runs passed groups again")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no group is started or goes on after so many")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device, deadline, results = platform(), time.monotonic() + args.seconds, {}
    print(f"device: {device}", flush=True)
    for group in GROUPS:
        if args.only and group.name not in args.only:
            continue
        path = args.out / f"{group.name}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        if args.force or before.get("status") != "passed" or before.get("device") != device:
            left = deadline - time.monotonic()
            if left < LEAST:
                print(f"{group.name}: not run, the {args.seconds:g} s are over; the same command goes on here")
                continue
            before = run(group, device, args.out.resolve(), left)
            path.write_text(json.dumps(before, indent=1))
        results[group.name] = before
        print(f"{group.name}: {line(before)}", flush=True)
    return int(any(result["status"] == "failed" for result in results.values()))


def platform() -> str:
    """Return the platform of JAX's default device, found in a process of its own, as it takes the GPU's memory."""
    code = "import jax; print(jax.default_backend())"
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout.split()[-1]


def environment(device: str) -> dict[str, str]:
    """Return the environment of a group: one device, and no run-time type checks, which take a fifth of the time."""
    own = {"JAXINFER_TEST_TYPES": "0", "PYTHONPATH": str(ROOT)}
    if device == "gpu":
        return os.environ | own | {"JAXINFER_TEST_GPU": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return os.environ | own | {"JAXINFER_TEST_DEVICES": "1"}


def run(group: Group, device: str, out: Path, limit: float) -> dict[str, Any]:
    """Run a group; return its counts. A group that is ended at the limit is `partial`."""
    report, started = out / f"{group.name}.xml", time.monotonic()
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-k", group.only] if group.only else []
    counts: dict[str, Any] = {"passed": 0, "skipped": 0, "failures": []}
    with (out / f"{group.name}.log").open("w") as log:
        try:
            process = subprocess.run(
                [*command, *group.files],
                cwd=ROOT,
                env=environment(device),
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            status = "partial"
        else:
            counts = read(report) if report.exists() else counts
            status = "failed" if counts["failures"] or process.returncode else "passed"
    seconds = time.monotonic() - started
    return {"group": group.name, "what": group.what, "device": device, "status": status, "seconds": seconds, **counts}


def read(report: Path) -> dict[str, Any]:
    """Return the counts of pytest's report."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - skipped - len(failed), "skipped": skipped, "failures": failed}


def line(result: Mapping[str, Any]) -> str:
    """Return a result in a line."""
    counts = f"{result['passed']} passed, {result['skipped']} skipped, {len(result['failures'])} failed"
    return f"{result['status']} in {result['seconds']:.0f} s on {result['device']}: {counts}"


if __name__ == "__main__":
    sys.exit(main())
