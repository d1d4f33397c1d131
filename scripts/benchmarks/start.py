"""Measure new processes from start to first token, with an empty and then a filled compilation cache."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("start_child.py")
STATES = ("empty", "filled")
"""States of the compilation cache."""


def checkpoint() -> Path:
    """Return the packaged checkpoint's folder."""
    from jaxinfer import demo

    return demo.path()


def measure(folder: Path, settings: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """Measure `repeats` pairs of processes, each pair with its own cache; return seconds by state and phase."""
    found: dict[str, list[float]] = {}
    for round_ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="jaxinfer-cache-") as cache:
            for state in STATES:
                phases = run(folder, settings, Path(cache))
                print(
                    f"pair {round_ + 1}: {state} cache, first token after {phases['first_token']:.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
                for phase, seconds in phases.items():
                    found.setdefault(f"{state}_{phase}_seconds", []).append(seconds)
    return found


def run(folder: Path, settings: dict[str, Any], cache: Path) -> dict[str, float]:
    """Run one new process; return the seconds of its phases, and from its start to the first token.

    Raises:
        RuntimeError: the process failed; its messages are on stderr.
    """
    started = time.time()
    done = subprocess.run(
        [sys.executable, str(CHILD), str(folder), json.dumps(settings)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | _cache_in(cache),
    )
    if done.returncode:
        raise RuntimeError(f"a fresh process ended with code {done.returncode}, see above")
    at = json.loads(done.stdout.splitlines()[-1])
    return {
        "interpreter": at["started"] - started,
        "import": at["imported"] - at["started"],
        "load": at["loaded"] - at["imported"],
        "first_step": at["first_token"] - at["loaded"],
        "first_token": at["first_token"] - started,
        "answer": at["answer"] - started,
    }


def _cache_in(folder: Path) -> dict[str, str]:
    """Return environment variables that store all compiled programs in `folder`, including quickly compiled ones."""
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
