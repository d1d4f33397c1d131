"""Print the sharding plan of a model from its config.json alone: `jaxinfer plan`."""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxinfer import demo
from jaxinfer._utils.checks import KV_CACHE_DTYPES, QUANTIZATIONS
from jaxinfer.commands.exit_status import status_of
from jaxinfer.commands.overrides import SPECULATIVE, add_hf_overrides
from jaxinfer.commands.plan import table
from jaxinfer.sharding import Plan, plan
from jaxinfer.sharding.placement_html import page

UNITS = {"": 1, "B": 1} | {
    f"{letter}{end}": base**power for power, letter in enumerate("KMGT", 1) for end, base in (("B", 1000), ("iB", 1024))
}
"""Factors of memory size units, in bytes."""


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command with parsed arguments and return its exit status; only the result goes to stdout."""
    finish(parser, args)
    if "JAX_PLATFORMS" not in os.environ:  # a plan needs no device, and must not take a GPU's memory
        jax.config.update("jax_platforms", "cpu")
    return status_of(lambda: show(args), parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    add = parser.add_argument
    add("--model", default=None, help="a folder with a config.json, or a Hub id; by default the packaged checkpoint")
    add(
        "--tensor-parallel-size",
        type=count,
        metavar="N",
        help="devices that share the weights; by default 1, to measure all there are",
    )
    add("--mesh", type=_axis, nargs="+", metavar="AXIS=N", help="instead of it: a mesh, for instance data=2 model=4")
    add(
        "--placement",
        type=_pattern,
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN=TACTIC",
        help="shard or replicate the modules of a pattern, for instance '*.attention=replicate'",
    )
    add("--pad-heads", action="store_true", help="add attention heads of zeroes where they do not divide")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--quantization", choices=QUANTIZATIONS, metavar="METHOD", help=", ".join(QUANTIZATIONS))
    add("--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES, help="of keys and values")
    add("--block-size", type=count, default=16, metavar="N", help="tokens of a block of the cache")
    add(
        "--memory",
        type=parse_size,
        default=None,
        metavar="SIZE",
        help="of a device, for instance 80GiB: says what fits",
    )
    add(
        "--step-memory",
        type=parse_size,
        default=0,
        metavar="SIZE",
        help="of a device, for steps while they run: an engine logs what it has measured",
    )
    add("--revision", default=None, help="of the Hub id")
    add_hf_overrides(parser)
    add("--speculative-config", **SPECULATIVE)
    shown = parser.add_argument_group("what is shown").add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print it as one JSON object")
    shown.add_argument("--html", type=Path, metavar="FILE", help="write it as an HTML page")


def finish(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Turn the pairs of `--placement` and `--mesh` into dictionaries, refusing contradictions."""
    args.placement = _placement(parser, args.placement)
    if args.mesh is not None:
        args.mesh = dict(args.mesh)


def show(args: argparse.Namespace) -> int:
    """Print the plan, or write it as HTML."""
    made = make(args)
    if args.json:
        print(json.dumps(made.as_dict()))
    elif args.html is not None:
        args.html.write_text(page(made), encoding="utf-8")
        print(f"{args.html}: {made.model}, {len(made.rows)} parameters", file=sys.stderr)
    else:
        table.show(made)
    return 0


def make(args: argparse.Namespace, hf: Mapping[str, Any] | None = None, **changes: Any) -> Plan:
    """Make the plan of the command line; `changes` replace its arguments, `hf` replaces the model's config.json."""
    settings = {
        "tensor_parallel_size": args.tensor_parallel_size,
        "mesh": args.mesh,
        "placement": args.placement,
        "memory": args.memory,
        "step_bytes": args.step_memory,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "kv_cache_dtype": args.kv_cache_dtype,
        "block_size": args.block_size,
        "pad_heads": args.pad_heads,
        "revision": args.revision,
        "speculative_config": args.speculative_config,
    }
    if hf is None:
        settings["hf_overrides"] = args.hf_overrides
    return plan(model(args) if hf is None else hf, **settings | changes)


def model(args: argparse.Namespace) -> str | Path:
    """Return the model to plan for."""
    return demo.path() if args.model is None else args.model


def _placement(parser: argparse.ArgumentParser, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    for index, (pattern, tactic) in enumerate(pairs):
        if dict(pairs[:index]).get(pattern, tactic) != tactic:
            parser.error(f"--placement: {pattern!r} is given twice, and differently")
    return dict(pairs)


def _pattern(text: str) -> tuple[str, str]:
    pattern, found, tactic = text.rpartition("=")
    if not found or not pattern:
        raise argparse.ArgumentTypeError(f"{text!r} must be PATTERN=TACTIC, for instance '*.attention=replicate'")
    return pattern, tactic


def _axis(text: str) -> tuple[str, int]:
    name, found, size = text.partition("=")
    if not found or not name:
        raise argparse.ArgumentTypeError(f"{text!r} must be AXIS=N, for instance model=4")
    return name, count(size)


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def parse_size(text: str) -> int:
    """Parse a size such as 80GiB to bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if found is None or found[2] not in UNITS or not int(float(found[1]) * UNITS[found[2]]):
        raise argparse.ArgumentTypeError(f"{text!r} must be a size such as 80GiB, 24GB or a number of bytes")
    return int(float(found[1]) * UNITS[found[2]])
