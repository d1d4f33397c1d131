"""Command line of `scripts/placement.py`: that of `jaxinfer plan`, and `--tune`."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxinfer.commands.exit_status import status_of
from jaxinfer.commands.plan import cli as planning
from jaxinfer.commands.plan.cli import count, make
from jaxinfer.loading.plan import read_model_config
from jaxinfer.sharding.collectives import DECODE, ENCODE, PREFILL


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; only the result goes to stdout."""
    parser = argparse.ArgumentParser(prog="placement.py", description="Print the sharding plan of a model.")
    planning.add_arguments(parser)
    _measuring(parser.add_argument_group("measuring").add_argument)
    args = parser.parse_args(argv)
    if not args.tune:
        return planning.run(parser, args)
    if args.html or args.placement:
        parser.error("--tune proposes a placement and prints figures: no --html, no --placement")
    planning.finish(parser, args)
    return status_of(lambda: tune(args), parser)


def _measuring(add: Callable[..., Any]) -> None:
    add("--tune", action="store_true", help="measure modules sharded and replicated; propose a placement")
    add("--batch-sizes", type=count, nargs="+", default=[1, 8, 64], metavar="N", help="rows of the decode steps")
    add("--prefill-tokens", type=count, nargs="*", default=[512], metavar="N", help="of the prefill steps, if any")
    add("--images", type=count, nargs="*", default=[], metavar="N", help="of the steps of a vision tower, if any")
    add("--context", type=count, default=1024, metavar="N", help="tokens of each sequence that a decode step reads")
    add("--repeats", type=count, default=15, metavar="N", help="passes of each, in turns")
    add("--devices", type=count, metavar="N", help="make N virtual CPU devices")


def tune(args: argparse.Namespace) -> int:
    """Measure placements and print a proposal."""
    from benchmarks import steptime  # imported lazily: only measuring needs it

    from placements import tuned_table, tuning

    steptime.devices(args.devices)
    mesh = steptime.mesh_of(args.mesh, args.tensor_parallel_size)
    hf = read_model_config(planning.model(args), args.revision, args.hf_overrides)
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
        tuned_table.show(found)
    return 0
