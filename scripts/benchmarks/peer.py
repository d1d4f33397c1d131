"""A peer under measurement: another process, perhaps of another interpreter, that takes work as lines of JSON."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.trace import Trace
from benchmarks.work import Work

SERVER = Path(__file__).with_name("hf_server.py")
PEERS = ("hf", "hf-cb")
"""transformers' `generate` with left padding; its continuous batching."""


class Peer:
    """The same `run` as jaxinfer's."""

    def __init__(self, name: str, python: str, folder: Path, dtype: str):
        self.name = name
        try:
            self._process = subprocess.Popen(
                [python, str(SERVER), name, str(folder), dtype],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        except OSError as error:
            raise RuntimeError(f"peer {name}: cannot start {python}: {error}; see --peer-python") from error
        self.versions: Mapping[str, str] = self._read()["ready"]

    def run(self, work: Work) -> Trace:
        """One pass.

        Raises:
            RuntimeError: it failed, or gave another number of tokens than was asked for.
        """
        self._process.stdin.write(json.dumps(asdict(work)) + "\n")
        self._process.stdin.flush()
        trace = Trace.of(self._read())
        made = [len(tokens) for tokens in trace.tokens]
        if made != work.lengths:
            raise RuntimeError(f"peer {self.name} made {made} tokens a request, not {work.lengths}")
        return trace

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(
                f"peer {self.name} ended with code {code}, see above; it needs torch and transformers: name an "
                "interpreter that has them with --peer-python"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"peer {self.name}: {reply['error']}")
        return reply

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
