"""Command line of `jaxinfer bench`."""

import argparse
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfer.commands.bench import offline, serving
from jaxinfer.commands.exit_status import status_of

COMMANDS = {
    "throughput": (offline, "requests and tokens per second of a model on this machine, all requests at once"),
    "latency": (offline, "seconds that a model on this machine takes for one batch, repeatedly"),
    "serve": (serving, "throughput and latencies of a running server with OpenAI's API"),
}
"""Subcommands with the module of each, and what it measures."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their options to a parser."""
    parser.usage = "jaxinfer bench COMMAND [OPTIONS]"
    commands = parser.add_subparsers(dest="bench", required=True, metavar="COMMAND")
    for name, (module, about) in COMMANDS.items():
        made = commands.add_parser(
            name,
            help=about,
            description=f"Measure {about}.",
            prog=f"jaxinfer bench {name}",
            usage=f"jaxinfer bench {name} [OPTIONS]",
            formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=32),
        )
        getattr(module, f"add_{name}")(made)
        made.add_argument("--json", action="store_true", help="print the figures as one JSON object")
        made.add_argument("--output-json", type=Path, metavar="FILE", help="also write that object to a file")
        made.set_defaults(parser=made)


def run(_: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run a subcommand; return 0, 1 if the measurement failed, or 2 for bad input."""
    return status_of(lambda: _run(args), args.parser)


def _run(args: argparse.Namespace) -> int:
    """Measure and print the figures."""
    if args.output_json is not None and not args.output_json.parent.is_dir():
        raise ValueError(f"--output-json {args.output_json}: {args.output_json.parent} is not a directory")
    module, _ = COMMANDS[args.bench]
    try:
        figures = getattr(module, args.bench)(args)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = json.dumps(figures)
    print(text if args.json else table(figures))
    if args.output_json is not None:
        args.output_json.write_text(f"{text}\n", encoding="utf-8")
    if figures.get("failed"):
        print(f"error: {figures['failed']} requests failed, the first with: {figures['error']}", file=sys.stderr)
        return 1
    return 0


def table(figures: Mapping[str, Any]) -> str:
    """Format figures one a line."""
    width = max(map(len, figures))
    shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in figures.items()}
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())
