"""Fresh processes from their start to a first token, with an empty and then a filled compilation cache."""

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
"""Of the compilation cache."""


def checkpoint() -> Path:
    """The one that comes with the package."""
    from jaxinfer import demo

    return demo.path()


def measure(folder: Path, settings: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """Seconds of each phase by state and name: `repeats` pairs of processes, each pair with a cache of its own."""
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
    """One fresh process: seconds of its phases, and from its start to the first token.

    Raises:
        RuntimeError: it failed; what it said is on stderr.
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
    """What makes a process keep its compiled programs in `folder`, the quickly compiled ones too."""
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
