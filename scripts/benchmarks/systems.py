"""Load one model in jaxinfer and the peers, and report settings and versions beside the figures."""

import argparse
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peer import Peer
from benchmarks.report import Report
from jaxinfer.commands.bench.measure import agreement
from jaxinfer.commands.bench.trace import Trace
from jaxinfer.commands.bench.work import Work


@dataclass(frozen=True)
class Subject:
    """Model under measurement."""

    folder: Path
    vocab: int
    title: str


@contextmanager
def systems(
    args: argparse.Namespace, model: Subject, works: Sequence[Work], *, online: bool = False
) -> Iterator[tuple[Any, list[Peer]]]:
    """Yield jaxinfer and the peers with the model loaded; close all of them at exit."""
    from jaxinfer.commands.bench import ours  # imported when the command line has been checked: it imports jax

    settings = {"max_model_len": max(work.longest for work in works)}
    if online:
        settings["max_num_seqs"] = max(work.at_once * work.samples for work in works)
    settings |= args.settings
    opened: list[Any] = []
    try:
        for name in args.peer:
            opened.append(_peer(name, args, model))
        opened.append((ours.Online if online else ours.Offline)(model.folder, settings))
        yield opened[-1], opened[:-1]
    finally:
        for system in opened:
            system.close()


def _peer(name: str, args: argparse.Namespace, model: Subject) -> Peer:
    if not name.startswith("openvino"):
        return Peer(name, args.peer_python, model.folder, args.peer_dtype)
    dtype = args.checkpoint_dtype if args.peer_dtype == "auto" and args.model is None else args.peer_dtype
    digest = hashlib.sha256(str(model.folder.resolve()).encode()).hexdigest()[:12]
    exported = args.openvino_model or Path(tempfile.gettempdir()) / f"jaxinfer-bench-openvino-{digest}"
    return Peer(name, args.openvino_python, model.folder, dtype, str(exported))


def compare(
    measured: Mapping[str, list[Trace]], ours: Any, of: Callable[[list[Trace]], dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Return each system's figures, with the share of the peers' tokens that equal jaxinfer's."""
    figures = {name: of(runs) for name, runs in measured.items()}
    for name, runs in measured.items():
        if name != ours.name:
            figures[name]["same_tokens"] = agreement(measured[ours.name], runs)
    return figures


def finish(report: Report, model: Subject, ours: Any, peers: Sequence[Peer]) -> None:
    """Add compilation, settings and versions to the report."""
    steps, seconds = ours.compiled()
    report.jaxinfer |= {"compiled_steps": steps, "compile_seconds": seconds}
    report.work |= {"model": model.title, "settings": ours.settings}
    report.work |= versions(
        {peer.name: " ".join(f"{key} {value}" for key, value in peer.versions.items()) for peer in peers}
    )


def versions(peers: Mapping[str, str] | None = None) -> dict[str, dict[str, str]]:
    """Return the versions of hardware and software that the figures apply to."""
    import jax

    return {"versions": {"jax": jax.__version__, "device": jax.devices()[0].device_kind, **(peers or {})}}
