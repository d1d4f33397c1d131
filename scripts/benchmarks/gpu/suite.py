"""Run the rows one after another, each with a time limit, and collect their results."""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu import report
from benchmarks.gpu.rows import ROWS, Row, chosen

SCRIPTS = Path(__file__).resolve().parents[2]
WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")
LEAST = 10.0
"""Minimum remaining seconds to start a row."""
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "flax",
    "triton",
    "torch",
    "transformers",
    "numpy",
)


def run(args: argparse.Namespace) -> int:
    """Run all requested rows without a result; return 0 unless one failed.

    Raises:
        ValueError: a row is unknown, or the folder holds results of the other mode (dry run or not).
    """
    rows, out = chosen(args.only), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline, paths = time.monotonic() + args.seconds, [out / f"{row.name}.json" for row in rows]
    to_do = [_to_do(row, path, args) for row, path in zip(rows, paths, strict=True)]
    for row, wanted in zip(rows, to_do, strict=True):
        if wanted:
            left = deadline - time.monotonic()
            if left < LEAST:
                _say(f"{row.name}: not run, {args.seconds:g} s have passed; run the same command to continue")
                continue
            _run(row, out, args, min(row.limit, left))
        _say(f"{row.name}: {report.state(_read(out / f'{row.name}.json'))}")
    found = {row.name: result for row in ROWS if (result := _read(out / f"{row.name}.json"))}
    (out / "report.json").write_text(json.dumps({"machine": machine(out), "rows": found}, indent=1))
    table = report.markdown(machine(out), found)
    (out / "report.md").write_text(table)
    print(table)
    return int(any(result["status"] == "failed" for result in found.values()))


def _to_do(row: Row, path: Path, args: argparse.Namespace) -> bool:
    """Return whether a row has no result yet, or must be repeated."""
    before = _read(path)
    if before and before["dry"] != args.dry_run:
        raise ValueError(
            f"--out {path.parent} holds results of {'a dry' if before['dry'] else 'a real'} run; name another"
        )
    if before and args.force and (not args.only or row.name in args.only):
        path.unlink()
        return True
    return before is None or before["status"] != "done"


def _run(row: Row, out: Path, args: argparse.Namespace, limit: float) -> None:
    """Run a row in its own process, killed at the time limit; figures saved until then are kept."""
    command = [*WORKER, row.name, str(out), args.peer_python]
    path = out / f"{row.name}.json"
    reason = ""
    with (out / f"{row.name}.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *(["dry"] if args.dry_run else [])],
            env=_environment(row),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            if code:
                reason = f"ended with code {code}, see {row.name}.log"
        except BaseException as error:
            os.killpg(process.pid, 9)  # also kills its children, peers and pytest
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            reason = f"ended after {limit:.0f} s"
    if reason:
        nothing = {"row": row.name, "what": row.what, "dry": args.dry_run, "seconds": limit, "figures": {}}
        result = _read(path) or nothing
        status = "partial" if result["figures"] else "failed"
        path.write_text(json.dumps(result | {"status": status, "reason": reason}, indent=1))


def _environment(row: Row) -> dict[str, str]:
    """Return the environment: the package of this checkout, and JAX's share of the GPU memory."""
    paths = [str(SCRIPTS), str(SCRIPTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "XLA_CLIENT_MEM_FRACTION": str(row.memory)}


def machine(out: Path) -> dict[str, Any]:
    """Return the packages, device and driver that the figures apply to."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**(_read(out / "device.json") or {}), "driver": _driver(), "versions": versions}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi is not installed"


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
