"""`scripts/bench.py` in this process on a toy model, and a peer that is a few lines of Python."""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from benchmarks import peer
from benchmarks.cli import main

from jaxinfer.commands.bench import measure

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 97,
    "max_position_embeddings": 256,
}
FAKE = """
import json, sys
print(json.dumps({"ready": {"fake": "1"}}), flush=True)
for line in sys.stdin:
    work = json.loads(line)
    tokens = [[0] * (n + EXTRA) for n in work["lengths"] for _ in range(work["samples"])]
    print(json.dumps({"seconds": 100.0, "tokens": tokens, "arrivals": [0.0] * len(work["lengths"]),
                      "times": [[50.0, 100.0]] * len(tokens)}), flush=True)
"""
"""Needs 100 s for anything, by its own account."""

Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def sizes() -> dict[str, int]:
    """Of the toy."""
    return SIZES


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the toy's checkpoint is kept."""
    return tmp_path_factory.mktemp("bench") / "toy"


@pytest.fixture(scope="session")
def bench(folder: Path) -> Bench:
    """A subcommand on the toy, in this process: exit code, stdout, stderr."""
    toy = [f"--{name.replace('_', '-')}={size}" for name, size in SIZES.items()] + ["--checkpoint-dtype=float32"]

    def run(*words: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([words[0], *toy, f"--checkpoint-dir={folder}", *words[1:]])
        return code, out.getvalue(), err.getvalue()

    return run


@pytest.fixture(scope="session")
def result(bench: Bench) -> Callable[..., dict]:
    """The one JSON object on stdout."""

    def run(*words: str) -> dict:
        code, out, err = bench(*words, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        found = json.loads(out)
        assert list(found) == ["work", "jaxinfer", "peers", "ratio"]
        return found

    return run


@pytest.fixture(scope="session", autouse=True)
def no_pauses() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "PAUSE", 0.0)
        yield


@pytest.fixture(scope="module")
def install_peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], None]]:
    """Puts a program in the place of transformers; without one, `FAKE`."""
    with pytest.MonkeyPatch.context() as patch:

        def install(program: str = FAKE.replace("EXTRA", "0")) -> None:
            path = tmp_path_factory.mktemp("peer") / "server.py"
            path.write_text(program)
            patch.setitem(peer.PEERS, "hf", replace(peer.PEERS["hf"], server=path))

        yield install


REAL_PEERS = dict(peer.PEERS)


@pytest.fixture
def real_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers themselves, whatever `install_peer` put in their place for the module."""
    for name, own in REAL_PEERS.items():
        monkeypatch.setitem(peer.PEERS, name, own)


@pytest.fixture(scope="session")
def fake_peer() -> str:
    """The program of a peer; EXTRA stands for tokens that it makes too many."""
    return FAKE
