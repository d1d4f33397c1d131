"""The three subcommands: each makes its work, has it done, and reports."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import trace as traces
from benchmarks.measure import agreement, alternate
from benchmarks.peer import Peer
from benchmarks.report import Report
from benchmarks.trace import Trace
from benchmarks.work import Work, spread

Measured = dict[str, list[Trace]]


@dataclass(frozen=True)
class Subject:
    """The model that is measured."""

    folder: Path
    vocab: int
    title: str


def throughput(args: argparse.Namespace, model: Subject) -> Report:
    """All requests at once; medians over the passes."""
    inputs = (args.min_input_len, args.max_input_len)
    work = spread(args.num_prompts, inputs, (args.output_len, args.output_len), vocab=model.vocab, seed=args.seed)
    report = Report({"command": "throughput", **work.describe(), "repeats": args.repeats})
    with _systems(args, model, [work]) as (ours, peers):
        measured = alternate(ours, peers, work, repeats=args.repeats)
        figures = _figures(measured, ours, lambda runs: _medians(traces.throughput, work, runs))
        report.add(figures, ours.name, fast="output_tokens_per_second")
        _finish(report, model, ours, peers)
    return report


def latency(args: argparse.Namespace, model: Subject) -> Report:
    """One batch of equal requests, again and again."""
    lengths = (args.input_len, args.input_len), (args.output_len, args.output_len)
    work = spread(args.batch_size, *lengths, vocab=model.vocab, seed=args.seed)
    report = Report({"command": "latency", **work.describe(), "repeats": args.num_iters})
    with _systems(args, model, [work]) as (ours, peers):
        measured = alternate(ours, peers, work, repeats=args.num_iters, warmup=args.num_iters_warmup)
        report.add(_figures(measured, ours, traces.latency), ours.name, fast="p50_latency", invert=True)
        _finish(report, model, ours, peers)
    return report


def serving(args: argparse.Namespace, model: Subject) -> Report:
    """Requests that arrive as others finish, at each concurrency; medians over the passes."""
    works = [_served(args, concurrency, model.vocab) for concurrency in args.concurrency]
    report = Report({"command": "serving", "scale": args.scale, "repeats": args.repeats})
    with _systems(args, model, works, online=True) as (ours, peers):
        for work in works:
            label = f"@{work.concurrency}"
            report.work[f"requests{label}"] = work.describe()
            measured = alternate(ours, peers, work, repeats=args.repeats)
            figures = _figures(measured, ours, lambda runs, work=work: _medians(traces.serving, work, runs))
            report.add(figures, ours.name, fast="output_tokens_per_second", label=label)
        _finish(report, model, ours, peers)
    return report


def _served(args: argparse.Namespace, concurrency: int, vocab: int) -> Work:
    """Lengths around their scaled means, so that requests fall out of step as real ones do."""

    def around(mean: int) -> tuple[int, int]:
        size = max(2, round(mean * args.scale))
        return max(1, round(size * (1 - args.length_spread))), max(1, round(size * (1 + args.length_spread)))

    count = args.requests_per_client * concurrency
    return spread(
        count, around(args.input_len), around(args.output_len), vocab=vocab, seed=args.seed, concurrency=concurrency
    )


@contextmanager
def _systems(
    args: argparse.Namespace, model: Subject, works: Sequence[Work], *, online: bool = False
) -> Iterator[tuple[Any, list[Peer]]]:
    """jaxinfer and the peers, each with the model loaded; all closed in the end."""
    from benchmarks import ours  # after the command line was understood: it imports jax

    settings = {"max_model_len": max(work.longest for work in works)}
    if online:
        settings["max_num_seqs"] = max(work.at_once for work in works)
    settings |= args.settings
    opened: list[Any] = []
    try:
        for name in args.peer:
            opened.append(Peer(name, args.peer_python, model.folder, args.peer_dtype))
        opened.append((ours.Online if online else ours.Offline)(model.folder, settings))
        yield opened[-1], opened[:-1]
    finally:
        for system in opened:
            system.close()


def _figures(
    measured: Measured, ours: Any, of: Callable[[list[Trace]], dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Each system's, and how far the peers' tokens are jaxinfer's."""
    figures = {name: of(runs) for name, runs in measured.items()}
    for name, runs in measured.items():
        if name != ours.name:
            figures[name]["same_tokens"] = agreement(measured[ours.name], runs)
    return figures


def _medians(of: Callable[[Work, Trace], dict[str, float]], work: Work, runs: list[Trace]) -> dict[str, float]:
    return traces.medians([of(work, run) for run in runs])


def _finish(report: Report, model: Subject, ours: Any, peers: Sequence[Peer]) -> None:
    """What is not in the figures: compilation, settings, versions."""
    import jax

    steps, seconds = ours.compiled()
    report.jaxinfer |= {"compiled_steps": steps, "compile_seconds": seconds}
    report.work |= {
        "model": model.title, "settings": ours.settings,
        "versions": {"jax": jax.__version__, "device": jax.devices()[0].device_kind, **{
            peer.name: " ".join(f"{key} {value}" for key, value in peer.versions.items()) for peer in peers}},
    }  # fmt: skip
