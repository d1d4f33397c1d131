"""The command `scripts/simulate.py`."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxinfer import demo
from jaxinfer._utils.units import size_text
from jaxinfer.commands.exit_status import status_of
from jaxinfer.commands.plan.cli import parse_size
from simulating import engines, replay, trace
from simulating.arguments import make_parser
from simulating.times import DEVICES, Device, Measured
from simulating.trace import Arrival

FIGURES = (
    ("completed requests", "completed", "{:,.0f}"),
    ("refused requests", "refused", "{:,.0f}"),
    ("seconds", "duration", "{:,.1f}"),
    ("requests/s", "request_throughput", "{:,.3f}"),
    ("new tokens/s", "output_throughput", "{:,.1f}"),
    ("all tokens/s", "total_token_throughput", "{:,.1f}"),
    ("time to first token, mean, ms", "mean_ttft_ms", "{:,.1f}"),
    ("                      p50, ms", "p50_ttft_ms", "{:,.1f}"),
    ("                      p99, ms", "p99_ttft_ms", "{:,.1f}"),
    ("time per output token, mean, ms", "mean_tpot_ms", "{:,.2f}"),
    ("                        p99, ms", "p99_tpot_ms", "{:,.2f}"),
    ("gap between tokens, p99, ms", "p99_itl_ms", "{:,.2f}"),
    ("prefix cache hits, share of prompts", "prefix_cache_hit_rate", "{:.1%}"),
    ("preemptions", "preemptions", "{:,.0f}"),
    ("most requests running", "max_running", "{:,.0f}"),
    ("most sequences waiting", "max_waiting", "{:,.0f}"),
    ("largest share of the cache in use", "max_kv_cache_usage", "{:.1%}"),
    ("padding, share of computed tokens", "padding", "{:.1%}"),
)
"""Label, figure and format of each line."""


def main() -> int:
    """Run the command and return its exit status."""
    parser = make_parser()
    args = parser.parse_args()
    _check(parser, args)
    return status_of(lambda: _run(args), parser)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    modes = [name for name in ("device", "measure", "step_times") if getattr(args, name)]
    if len(modes) != 1:
        parser.error("give exactly one of --device, --measure and --step-times")
    if args.measure is None and args.trace is None:
        parser.error("--trace is needed; docs/simulation.md gives the formats")
    if args.check and not args.step_times:
        parser.error("--check compares with this machine, so it needs --step-times")
    if args.device is not None and args.device not in DEVICES:
        parser.error(f"--device {args.device!r} must be one of {', '.join(DEVICES)}")
    if args.device is None and (args.tensor_parallel_size != 1 or args.memory or args.bandwidth or args.rate_tflops):
        parser.error("--tensor-parallel-size, --memory, --bandwidth and --rate-tflops belong to --device")
    if args.tensor_parallel_size < 1:
        parser.error(f"--tensor-parallel-size must be at least 1, got {args.tensor_parallel_size}")
    for name in ("memory", "step_memory"):
        try:
            if getattr(args, name) is not None:
                setattr(args, name, parse_size(getattr(args, name)))
        except argparse.ArgumentTypeError as error:
            parser.error(f"--{name.replace('_', '-')}: {error}")
    for name in ("bandwidth", "rate_tflops"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name):g}")


def _run(args: argparse.Namespace) -> int:
    settings, model = _settings(args), demo.path() if args.model is None else args.model
    if args.measure is not None:
        return _measure(model, settings, args.measure)
    arrivals = trace.read(args.trace, args.rate, args.limit)
    if args.device is not None:
        made = engines.on_device(model, _device(args), args.tensor_parallel_size, args.step_memory, settings)
    else:
        made = engines.like_this_machine(model, Measured.read(args.step_times), settings)
    outcome = replay.simulated(made.engine, arrivals, made.clock)
    shown = {"simulated": outcome.figures()}
    if args.check:
        shown["real"] = _real(model, settings, arrivals)
    _print(args, made, arrivals, shown, outcome.refused)
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the engine settings of the command line."""
    found: dict[str, Any] = {}
    for word in args.set:
        name, is_pair, value = word.partition("=")
        if not is_pair:
            raise ValueError(f"--set {word!r} must be NAME=VALUE, for instance max_num_seqs=64")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found | ({} if args.max_num_seqs is None else {"max_num_seqs": args.max_num_seqs})


def _device(args: argparse.Namespace) -> Device:
    device = DEVICES[args.device]
    if args.memory is not None:
        device = replace(device, memory=args.memory)
    if args.bandwidth is not None:
        device = replace(device, bandwidth=args.bandwidth * 1e12)
    return device if args.rate_tflops is None else replace(device, rate=args.rate_tflops * 1e12)


def _measure(model: str | Path, settings: dict[str, Any], out: Path) -> int:
    """Measure the step times of this machine and write the fitted model."""
    with engines.real(model, settings) as llm:
        engine = llm._engine
        shapes, watch = engine.runner.shapes, replay.Stopwatch(engine)
        batches = replay.calibration(shapes.rows, shapes.max_length, shapes.prefill_buckets[-1])
        for batch in batches:
            replay.real(engine, batch, watch)
            engine.reset_prefix_cache()
    found = Measured.fit(str(model), watch.works, watch.seconds)
    found.write(out)
    print(f"{out}: {found.describe()}", file=sys.stderr)
    return 0


def _real(model: str | Path, settings: dict[str, Any], arrivals: list[Arrival]) -> dict[str, Any]:
    with engines.real(model, settings) as llm:
        return replay.real(llm._engine, arrivals).figures()


def _print(
    args: argparse.Namespace,
    made: engines.Simulated,
    arrivals: list[Arrival],
    shown: dict[str, dict[str, Any]],
    refused: list[str],
) -> None:
    shapes = made.engine.runner.shapes
    if args.json:
        about = {"step_times": made.times.describe(), "num_blocks": shapes.num_blocks, "rows": shapes.rows}
        print(json.dumps(about | shown, default=float))
        return
    print(f"{made.plan.model}: {len(arrivals)} requests over {arrivals[-1].at:,.1f} s")
    if args.device is not None:
        used = f"{size_text(made.plan.device_bytes)} of weights"
        print(f"{args.tensor_parallel_size} x {args.device}, {used} on each")
    print(f"cache of {shapes.num_blocks * shapes.block_size // shapes.groups:,} tokens, {shapes.rows} rows")
    print(f"step times: {made.times.describe()}")
    if refused:
        print(f"refused, the first: {refused[0]}")
    print()
    columns = list(shown)
    if len(columns) > 1:
        print(f"{'':36}{columns[0]:>14}{columns[1]:>14}{'error':>10}")
    for label, name, form in FIGURES:
        values = [figures.get(name) for figures in shown.values()]
        if None in values:
            continue
        line = f"{label:36}" + "".join(f"{form.format(value):>14}" for value in values)
        if len(values) > 1 and values[1]:
            line += f"{values[0] / values[1] - 1:>+10.1%}"
        print(line)
