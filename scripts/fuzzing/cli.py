"""Command line of `scripts/fuzz.py`."""

import argparse
import logging
import sys
import time
from collections.abc import Sequence

from fuzzing import configs, templates, tokenizers, weights
from fuzzing.part import Failure, Part, run

PARTS: tuple[Part, ...] = (*configs.PARTS, *weights.PARTS, *tokenizers.PARTS, *templates.PARTS)
"""All parts; a new module adds its `PARTS` here."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if an input was not handled correctly."""
    args = parse(argv)
    logging.disable(logging.WARNING)
    parts = [part for part in PARTS if args.part in (None, part.name)]
    if args.case is not None:
        failures, count = [found for part in parts if (found := run(part, args.seed, args.case))], len(parts)
    else:
        failures, count = loop(parts, args.seed, args.seconds)
    for failure in failures:
        again = f"--part {failure.part} --seed {args.seed} --case {failure.case}"
        print(f"{again} ({failure.seconds:.1f} s):\n{failure.report}", flush=True)
    print(f"{count} inputs, {len(failures)} not handled", file=sys.stderr)
    return 1 if failures else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="fuzz.py", description="Feed broken checkpoint files to their readers.")
    add = parser.add_argument
    add("--seconds", type=float, default=30.0, help="for all parts together (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the inputs (default: %(default)s)")
    names = [part.name for part in PARTS]
    add("--part", choices=names, metavar="PART", help=f"this kind of file alone: {', '.join(names)}")
    add("--case", type=int, metavar="N", help="the Nth input alone")
    args = parser.parse_args(argv)
    if args.case is not None and args.part is None:
        parser.error("--case needs --part")
    return args


def loop(parts: Sequence[Part], seed: int, seconds: float, most: int = 20) -> tuple[list[Failure], int]:
    """Run inputs of all parts in turn for `seconds`, or until `most` failures; return the failures and the number of
    inputs.

    The time starts after the first input of each part, which imports the modules that the part needs.
    """
    failures: list[Failure] = []
    end, case = float("inf"), 0
    while time.monotonic() < end and len(failures) < most:
        for part in parts:
            failures += [found] if (found := run(part, seed, case)) else []
        end = time.monotonic() + seconds if case == 0 else end
        case += 1
    return failures, case * len(parts)
