"""Subcommands of `scripts/bench.py`: each runs a measurement and returns a report."""

import argparse
import json
from dataclasses import asdict, replace

from benchmarks.report import Report
from benchmarks.standard import STANDARDS
from benchmarks.systems import Subject, compare, finish, systems, versions
from jaxinfer.commands.bench import trace as traces
from jaxinfer.commands.bench.measure import agreement, alternate
from jaxinfer.commands.bench.trace import Trace
from jaxinfer.commands.bench.work import Work, random_work


def throughput(args: argparse.Namespace, model: Subject) -> Report:
    """Measure throughput with all requests submitted at once; medians over the passes."""
    inputs = (args.min_input_len, args.max_input_len)
    work = random_work(args.num_prompts, inputs, (args.output_len, args.output_len), vocab=model.vocab, seed=args.seed)
    report = Report({"command": "throughput", **work.describe(), "repeats": args.repeats})
    with systems(args, model, [work]) as (ours, peers):
        measured = alternate(ours, peers, work, repeats=args.repeats)
        figures = compare(measured, ours, lambda runs: _medians(traces.throughput, work, runs))
        report.add(figures, ours.name, fast="output_tokens_per_second")
        finish(report, model, ours, peers)
    return report


def latency(args: argparse.Namespace, model: Subject) -> Report:
    """Measure the latency of one batch of equal requests, repeatedly."""
    lengths = (args.input_len, args.input_len), (args.output_len, args.output_len)
    work = random_work(args.batch_size, *lengths, vocab=model.vocab, seed=args.seed)
    report = Report({"command": "latency", **work.describe(), "repeats": args.num_iters})
    with systems(args, model, [work]) as (ours, peers):
        measured = alternate(ours, peers, work, repeats=args.num_iters, warmup=args.num_iters_warmup)
        report.add(compare(measured, ours, traces.latency), ours.name, fast="p50_latency", invert=True)
        finish(report, model, ours, peers)
    return report


def serving(args: argparse.Namespace, model: Subject) -> Report:
    """Measure serving at each concurrency, where a request arrives whenever another finishes; medians over the
    passes.
    """
    works = [_served(args, concurrency, model.vocab) for concurrency in args.concurrency]
    report = Report({"command": "serving", "scale": args.scale, "repeats": args.repeats})
    with systems(args, model, works, online=True) as (ours, peers):
        for work in works:
            label = f"@{work.concurrency}"
            report.work[f"requests{label}"] = work.describe()
            measured = alternate(ours, peers, work, repeats=args.repeats)
            figures = compare(measured, ours, lambda runs, work=work: _medians(traces.serving, work, runs))
            report.add(figures, ours.name, fast="output_tokens_per_second", label=label)
        finish(report, model, ours, peers)
    return report


def _served(args: argparse.Namespace, concurrency: int, vocab: int) -> Work:
    """Return requests with lengths spread around their scaled means, so that they desynchronise as real ones do."""

    def around(mean: int) -> tuple[int, int]:
        size = max(2, round(mean * args.scale))
        return max(1, round(size * (1 - args.length_spread))), max(1, round(size * (1 + args.length_spread)))

    count = args.requests_per_client * concurrency
    return random_work(
        count, around(args.input_len), around(args.output_len), vocab=vocab, seed=args.seed, concurrency=concurrency
    )


def _medians(of: traces.Figures, work: Work, runs: list[Trace]) -> dict[str, float]:
    return traces.medians([of(work, run) for run in runs])


def work(args: argparse.Namespace, model: Subject) -> Report:
    """Measure the standard workloads W1 to W5, each with its own figures: median, minimum and maximum over the
    passes.
    """
    works = {name: STANDARDS[name].work(vocab=model.vocab, seed=args.seed, scale=args.scale) for name in args.works}
    report = Report({"command": "work", "scale": args.scale, "repeats": args.repeats})
    with systems(args, model, list(works.values()), online=True) as (ours, peers):
        for name, asked in works.items():
            report.work[name] = STANDARDS[name].what
            measured = alternate(ours, peers, asked, repeats=args.repeats)
            for figure in STANDARDS[name].figures:
                found = {
                    system: traces.span([figure.of(asked, run) for run in runs]) for system, runs in measured.items()
                }
                label = f"@{name}_{figure.name}"
                report.add(found, ours.name, fast="median", label=label, invert=figure.less_is_faster)
            if asked.temperature == 0:
                for peer in peers:
                    report.peers[peer.name][f"same_tokens@{name}"] = agreement(measured[ours.name], measured[peer.name])
        finish(report, model, ours, peers)
    return report


def deterministic(args: argparse.Namespace, model: Subject) -> Report:
    """Measure what deterministic=True costs: the standard workloads with and without it, in turns in one run."""
    from jaxinfer.commands.bench import ours

    works = {name: STANDARDS[name].work(vocab=model.vocab, seed=args.seed, scale=args.scale) for name in args.works}
    report = Report({"command": "deterministic", "scale": args.scale, "repeats": args.repeats})
    with systems(args, model, list(works.values()), online=True) as (default, _):
        fixed = ours.Online(model.folder, default.settings | {"deterministic": True})
        fixed.name = "deterministic"
        try:
            for name, asked in works.items():
                report.work[name] = STANDARDS[name].what
                measured = alternate(default, [fixed], asked, repeats=args.repeats, warmup=2)
                for figure in STANDARDS[name].figures:
                    found = {
                        system: traces.span([figure.of(asked, run) for run in runs])
                        for system, runs in measured.items()
                    }
                    label = f"@{name}_{figure.name}"
                    report.add(found, default.name, fast="median", label=label, invert=figure.less_is_faster)
                    share = 1 / report.ratio[f"{fixed.name}{label}"]
                    report.peers[fixed.name][f"share_of_default{label}"] = share
        finally:
            fixed.close()
        finish(report, model, default, [])
    return report


def roofline(args: argparse.Namespace, model: Subject) -> Report:
    """Measure the machine's bandwidth and matmul rate, and the share of them that the workloads' steps reach."""
    from benchmarks import machine, shares

    works = {name: STANDARDS[name].work(vocab=model.vocab, seed=args.seed, scale=args.scale) for name in args.works}
    report = Report({"command": "roofline", "scale": args.scale, "repeats": args.repeats})
    rates = machine.measure(args.mebibytes << 20, args.matmul_size, args.repeats)
    report.jaxinfer |= rates
    with systems(args, model, list(works.values()), online=True) as (ours, _):
        costs = shares.Costs.of(ours.llm)
        for name, asked in works.items():
            report.work[name] = STANDARDS[name].what
            runs = alternate(ours, [], asked, repeats=args.repeats)[ours.name]
            found = traces.medians([shares.of(asked, run, costs, rates) for run in runs])
            report.jaxinfer |= {f"{metric}@{name}": value for metric, value in found.items()}
        finish(report, model, ours, [])
    return report


def profile(args: argparse.Namespace, model: Subject) -> Report:
    """Trace N decode steps and the prefill before them, and break the time of a decode step down by category."""
    from benchmarks import breakdown

    lengths = (args.input_len, args.input_len), (args.steps + 1, args.steps + 1)
    asked = random_work(args.batch_size, *lengths, vocab=model.vocab, seed=args.seed)
    report = Report({"command": "profile", **asked.describe(), "steps": args.steps, "out": str(args.out)})
    with systems(args, model, [asked], online=True) as (ours, _):
        report.jaxinfer |= breakdown.profile(ours, asked, args.steps, args.out)
        finish(report, model, ours, [])
    return report


def host(args: argparse.Namespace, model: Subject | None) -> Report:
    """Measure Python's host time in a decode step, with a stubbed device; milliseconds over many steps."""
    from benchmarks import hosttime, pooltime

    report = Report(
        {
            "command": "host",
            "rows": args.rows,
            "layers": args.num_hidden_layers,
            "steps": args.steps,
            "queued": args.queued,
        }
    )
    for length in args.lengths:
        found = hosttime.measure(args.rows, length, args.steps, args.num_hidden_layers, args.queued)
        report.jaxinfer |= {f"{metric}@{length}": value for metric, value in found.items()}
    report.jaxinfer |= hosttime.text(args.rows, args.steps)
    for blocks in pooltime.POOLS:
        report.jaxinfer |= {f"{metric}@{blocks}": value for metric, value in pooltime.pool_times(blocks).items()}
    report.jaxinfer |= pooltime.blocked_head(args.rows)
    report.work |= versions()
    return report


def startup(args: argparse.Namespace, model: Subject | None) -> Report:
    """Measure seconds from the start of a process to its first token, with an empty and with a filled compilation
    cache.
    """
    from benchmarks import start

    folder = start.checkpoint() if model is None else model.folder
    report = Report({"command": "startup", "model": str(folder), "settings": args.settings, "repeats": args.repeats})
    found = start.measure(folder, args.settings, args.repeats)
    for name, values in found.items():
        report.jaxinfer |= {f"{kind}@{name}": value for kind, value in traces.span(values).items()}
    first = {state: report.jaxinfer[f"median@{state}_first_token_seconds"] for state in start.STATES}
    report.jaxinfer["filled_over_empty"] = first["filled"] / first["empty"]
    report.work |= versions()
    return report


def placement(args: argparse.Namespace, model: Subject | None) -> Report:
    """Compare a decode step on virtual CPU devices under four placements, in turns; ratios are to the fully sharded
    one.
    """
    from benchmarks import flags, placed

    hf = flags.random_config(args) if model is None else json.loads((model.folder / "config.json").read_text())
    named = "random Llama" if model is None else str(model.folder)
    shape = {"rows": args.batch_size, "context": args.context, "layers": hf.get("num_hidden_layers")}
    report = Report({"command": "placement", "model": named, "devices": args.devices, **shape, "repeats": args.repeats})
    report.jaxinfer |= placed.measure(hf, args.devices, args.batch_size, args.context, args.repeats)
    report.work |= versions()
    return report


def growth(args: argparse.Namespace, model: Subject | None) -> Report:
    """Compare a decode step as its cache grows: concatenated every step, contiguous, and paged; on the same work, in
    turns.
    """
    from benchmarks import flags, growth

    hf = flags.random_config(args) if model is None else json.loads((model.folder / "config.json").read_text())
    work = growth.Work(args.batch_size, args.input_len, args.output_len, args.step, args.lengths, args.repeats)
    if args.small:
        work = replace(work, prompt=max(1, work.prompt // 4), new=max(2, work.new // 4))
        hf |= {"num_hidden_layers": max(1, hf["num_hidden_layers"] // 4)}
    shape = {"layers": hf["num_hidden_layers"], "dtype": args.dtype, **asdict(work)}
    report = Report({"command": "growth", "model": "random weights of this shape", **shape})
    kernel = args.settings.get("attention_kernel", "auto")
    report.jaxinfer |= growth.measure(hf, work, dtype=args.dtype, seed=args.seed, kernel=kernel)
    if args.plot is not None:
        growth.plot(report.jaxinfer, work, args.plot)
    report.work |= versions()
    return report


def structured(args: argparse.Namespace, model: Subject | None) -> Report:
    """Measure structured output at a schema a row against free output: speed, and how long steps wait for masks."""
    from benchmarks import structured
    from jaxinfer import demo

    folder = demo.path() if model is None else model.folder
    work = structured.Work(args.batch_size, args.output_len, args.repeats)
    report = Report({"command": "structured", "model": str(folder), "settings": args.settings, **asdict(work)})
    report.jaxinfer |= structured.measure(str(folder), work, args.settings)
    report.work |= versions()
    return report


def speculative(args: argparse.Namespace, model: Subject | None) -> Report:
    """Measure decoding with drafts against decoding one token at a time, for three kinds of text."""
    from benchmarks import speculative
    from jaxinfer import demo

    folder = demo.path() if model is None else model.folder
    work = speculative.Work(args.output_len, args.repeats)
    report = Report({"command": "speculative", "model": str(folder), "settings": args.settings, **asdict(work)})
    report.jaxinfer |= speculative.measure(str(folder), work, args.settings)
    report.work |= versions()
    return report


def sharing(args: argparse.Namespace, model: Subject | None) -> Report:
    """Measure block sharing of hybrid models' samples, their prefix cache hits, and the cost of sharing."""
    from benchmarks import sharing

    work = replace(
        sharing.WORK, samples=args.samples, requests=args.requests, pool=args.pool_requests, repeats=args.repeats
    )
    work = sharing.smaller(work) if args.small else work
    report = Report({"command": "sharing", "dtype": args.checkpoint_dtype, "settings": args.settings, **asdict(work)})
    for name in args.models:
        report.work[f"model@{name}"] = hf = sharing.config(name, small=args.small)
        found = sharing.measure(hf, work, args.settings, args.parts, dtype=args.checkpoint_dtype, seed=args.seed)
        report.jaxinfer |= {f"{metric}@{name}": value for metric, value in found.items()}
    report.work |= versions()
    return report


def projections(args: argparse.Namespace, model: Subject | None) -> Report:
    """Compare fused and separate projections of one input, by number of rows, beside the figures of SGLang #17801."""
    from benchmarks import projections

    groups = {name: projections.GROUPS[name] for name in args.groups}
    if args.small:
        groups = {name: projections.smaller(group) for name, group in groups.items()}
    report = Report({"command": "projections", "dtype": args.checkpoint_dtype, "repeats": args.repeats})
    report.work |= {f"shape@{name}": str(group) for name, group in groups.items()}
    kernel = args.settings.get("matmul_kernel", "auto")
    seconds = projections.SECONDS / (projections.SMALL if args.small else 1)
    how = {"dtype": args.checkpoint_dtype, "kernel": kernel, "seconds": seconds}
    report.jaxinfer |= projections.measure(groups, args.m, args.repeats, **how)
    if args.h100:
        report.jaxinfer |= projections.h100()
    if "kda" in groups and not args.small:
        report.peers[projections.SOURCE] = projections.published(report.jaxinfer)
    report.work |= versions()
    return report


def cross(args: argparse.Namespace, model: Subject | None) -> Report:
    """Measure cross-attention of a bart-large-shaped model: savings of its projections, speed, and sharing."""
    from benchmarks import cross, documents

    hf = cross.config(args.checkpoint_dtype, small=args.small) if model is None else documents.config(model)
    work = cross.Work(args.batch_size, args.input_len, args.output_len, args.repeats)
    asked = documents.Work(args.num_prompts, (args.min_input_len, args.max_input_len), args.output_len)
    if args.small:
        work, asked = cross.smaller(work), documents.smaller(asked)
    report = Report({"command": "cross", "parts": args.parts, "repeats": args.repeats})
    if "steps" in args.parts:
        report.work["step"] = asdict(work)
        kernel = args.settings.get("matmul_kernel", "auto")
        report.jaxinfer |= cross.measure(hf, work, dtype=args.checkpoint_dtype, seed=args.seed, kernel=kernel)
    if {"documents", "int8", "shared"} & set(args.parts):
        documents.add(report, args, model or documents.subject(hf, args), asked)
    report.work |= versions()
    return report


def soak(args: argparse.Namespace, model: Subject | None) -> Report:
    """Run a random workload of every kind of request after a warm-up, and count the programs compiled during it."""
    from benchmarks import soaking, start

    folder = start.checkpoint() if model is None else model.folder
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    report = Report({"command": "soak", "model": str(folder), "settings": args.settings, "minutes": args.minutes})
    report.jaxinfer |= soaking.measure(folder, vocab, args.settings, 60 * args.minutes, args.seed)
    report.work |= versions()
    return report
