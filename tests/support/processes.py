"""Start several processes on this machine that serve one model, each with two virtual devices."""

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import compiler

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
SETTINGS = dict(
    tensor_parallel_size=4,
    max_num_seqs=8,
    max_model_len=256,
    max_num_batched_tokens=32,
    dtype="float32",
    kv_cache_memory_bytes=1 << 22,
    compilation_cache_dir=None,
)
WAIT = 500
"""Timeout for a process, in seconds; generous because the machine may be busy."""


def free_port() -> int:
    """Return a free TCP port, below those that systems give to connections: none takes it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Process:
    """Running process whose output is collected."""

    popen: subprocess.Popen
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._readers = [
            threading.Thread(target=into.extend, args=(stream,), daemon=True)
            for into, stream in ((self.out, self.popen.stdout), (self.err, self.popen.stderr))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def stdout(self) -> str:
        """Standard output so far."""
        return "".join(self.out)

    @property
    def stderr(self) -> str:
        """Standard error so far."""
        return "".join(self.err)

    def said(self) -> dict[str, Any]:
        """All JSON lines of standard output, merged to one mapping."""
        lines = [json.loads(line) for line in self.out if line.startswith("{")]
        return {name: value for line in lines for name, value in line.items()}

    def wait_for(self, text: str) -> None:
        """Wait until standard output contains `text`."""
        deadline = time.monotonic() + WAIT
        while text not in self.stdout:
            assert self.popen.poll() is None and time.monotonic() < deadline, self.stdout + self.stderr
            time.sleep(0.05)

    def wait(self) -> int:
        """Wait for the process to end and return its exit status."""
        status = self.popen.wait(WAIT)
        for reader in self._readers:
            reader.join(10)
        return status


def start(commands: Sequence[Sequence[str]]) -> list[Process]:
    """Start one Python process per list of arguments."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": compiler.flags(2),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    return [
        Process(
            subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
        for command in commands
    ]


def serve(models: Sequence[Path], acts: Sequence[str] = ("", ""), *, timeout: float = 120) -> list[Process]:
    """Start `worker.py` once per model folder, with its `act`."""
    address = f"127.0.0.1:{free_port()}"
    told = [
        dict(
            coordinator=address,
            count=len(models),
            process=i,
            timeout=timeout,
            model=str(model),
            act=act,
            settings=SETTINGS,
        )
        for i, (model, act) in enumerate(zip(models, acts, strict=True))
    ]
    return start([[str(WORKER), json.dumps(one)] for one in told])


def end(processes: Sequence[Process]) -> None:
    """End the processes that are still running."""
    for process in processes:
        if process.popen.poll() is None:
            process.popen.kill()
            process.popen.wait(30)
