"""Run a benchmark peer in another process, possibly of another interpreter, that takes work as JSON lines."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxinfer.commands.bench.trace import Trace
from jaxinfer.commands.bench.work import Work

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Kind:
    """Kind of peer: its program, the flag that names its interpreter, and the packages it needs."""

    server: Path
    flag: str
    needs: str


_TRANSFORMERS = Kind(FOLDER / "hf_server.py", "--peer-python", "torch and transformers")
_OPENVINO = Kind(FOLDER / "openvino_server.py", "--openvino-python", "openvino-genai and optimum-intel")
PEERS = {
    "hf": _TRANSFORMERS,
    "hf-static": _TRANSFORMERS,
    "hf-cb": _TRANSFORMERS,
    "openvino": _OPENVINO,
    "openvino-int8": _OPENVINO,
}
"""Peers: transformers' `generate` with left padding, the same with a static cache, and its continuous batching;
openvino-genai, and the same with int8 weights."""


class Peer:
    """Peer process with the interface of `measure.System`; `more` are further arguments of its program."""

    def __init__(self, name: str, python: str, folder: Path, dtype: str, *more: str):
        self.name, self._kind = name, PEERS[name]
        try:
            self._process = subprocess.Popen(
                [python, str(self._kind.server), name, str(folder), dtype, *more],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise RuntimeError(f"peer {name}: cannot start {python}: {error}; see {self._kind.flag}") from error
        self.versions: Mapping[str, str] = self._read()["ready"]

    def run(self, work: Work) -> Trace:
        """Run one pass.

        Raises:
            RuntimeError: the peer failed, or returned a wrong number of tokens.
        """
        self._process.stdin.write(json.dumps(asdict(work)) + "\n")
        self._process.stdin.flush()
        trace = Trace.of(self._read())
        made = [len(tokens) for tokens in trace.tokens]
        if made != work.sample_lengths:
            raise RuntimeError(f"peer {self.name} made {made} tokens a request, not {work.sample_lengths}")
        return trace

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(
                f"peer {self.name} ended with code {code}, see above; it needs {self._kind.needs}: name an "
                f"interpreter that has them with {self._kind.flag}"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"peer {self.name}: {reply['error']}")
        return reply

    def close(self) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
