"""Command line of `scripts/placement.py`."""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ending import status_of
from overrides import add_hf_overrides

from jaxinfer import demo
from jaxinfer.loading.plan import read_model_config
from jaxinfer.sharding import Plan, plan
from jaxinfer.sharding.collectives import DECODE, ENCODE, PREFILL
from jaxinfer.sharding.placement_html import page
from placements import table

UNITS = {"": 1, "B": 1} | {
    f"{letter}{end}": base**power for power, letter in enumerate("KMGT", 1) for end, base in (("B", 1000), ("iB", 1024))
}
"""Factors of memory size units, in bytes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; only the result goes to stdout."""
    args = parse(argv)
    return status_of(lambda: tune(args) if args.tune else show(args))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    what = "Where the weights of a model lie, before they are loaded."
    parser = argparse.ArgumentParser(prog="placement.py", description=what)
    add = parser.add_argument
    add("--model", default=None, help="a folder with a config.json, or a Hub id; by default the packaged checkpoint")
    add(
        "--tensor-parallel-size",
        type=_count,
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
    add("--quantization", default=None, choices=("int8",))
    add("--block-size", type=_count, default=16, metavar="N", help="tokens of a block of the cache")
    add("--memory", type=_size, default=None, metavar="SIZE", help="of a device, for instance 80GiB: says what fits")
    add(
        "--step-memory",
        type=_size,
        default=0,
        metavar="SIZE",
        help="of a device, for steps while they run: an engine logs what it has measured",
    )
    add("--revision", default=None, help="of the Hub id")
    add_hf_overrides(parser)
    shown = parser.add_argument_group("what is shown").add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="all of it as one object, to stdout")
    shown.add_argument("--html", type=Path, metavar="FILE", help="a picture of it, as a page of its own")
    _measuring(parser.add_argument_group("measuring").add_argument)
    args = parser.parse_args(argv)
    args.placement = _placement(parser, args.placement)
    if args.mesh is not None:
        args.mesh = dict(args.mesh)
    if args.tune and (args.html or args.placement):
        parser.error("--tune proposes a placement and prints figures: no --html, no --placement")
    return args


def _measuring(add: Callable[..., Any]) -> None:
    add("--tune", action="store_true", help="measure modules sharded and replicated; propose a placement")
    add("--batch-sizes", type=_count, nargs="+", default=[1, 8, 64], metavar="N", help="rows of the decode steps")
    add("--prefill-tokens", type=_count, nargs="*", default=[512], metavar="N", help="of the prefill steps, if any")
    add("--images", type=_count, nargs="*", default=[], metavar="N", help="of the steps of a vision tower, if any")
    add("--context", type=_count, default=1024, metavar="N", help="tokens of each sequence that a decode step reads")
    add("--repeats", type=_count, default=15, metavar="N", help="passes of each, in turns")
    add("--devices", type=_count, metavar="N", help="make N virtual CPU devices")


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
        "block_size": args.block_size,
        "pad_heads": args.pad_heads,
        "revision": args.revision,
    }
    if hf is None:
        settings["hf_overrides"] = args.hf_overrides
    return plan(model(args) if hf is None else hf, **settings | changes)


def model(args: argparse.Namespace) -> str | Path:
    """Return the model to plan for."""
    return demo.path() if args.model is None else args.model


def tune(args: argparse.Namespace) -> int:
    """Measure placements and print a proposal."""
    from benchmarks import steptime  # imported lazily: only measuring needs it

    from placements import tuning

    steptime.devices(args.devices)
    mesh = steptime.mesh_of(args.mesh, args.tensor_parallel_size)
    hf = read_model_config(model(args), args.revision, args.hf_overrides)
    how = {"quantization": args.quantization, "pad_heads": args.pad_heads}
    steps = [steptime.Step(DECODE, rows, args.context) for rows in args.batch_sizes]
    steps += [steptime.Step(PREFILL, tokens) for tokens in args.prefill_tokens]
    steps += [steptime.Step(ENCODE, count) for count in args.images]
    with contextlib.redirect_stdout(sys.stderr):
        found = tuning.tune(
            hf,
            lambda short: steptime.Model(short, mesh, dtype=args.dtype, **how),
            lambda of, placement: make(args, of, placement=placement, mesh=mesh, tensor_parallel_size=None),
            steps,
            args.repeats,
        )
    if args.json:
        print(json.dumps(found.as_dict()))
    else:
        table.show_tuned(found)
    return 0


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
    return name, _count(size)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if found is None or found[2] not in UNITS or not int(float(found[1]) * UNITS[found[2]]):
        raise argparse.ArgumentTypeError(f"{text!r} must be a size such as 80GiB, 24GB or a number of bytes")
    return int(float(found[1]) * UNITS[found[2]])
