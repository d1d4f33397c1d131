"""Command line of `bench.py gpu`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import suite
from benchmarks.gpu.rows import ROWS

SECONDS = 460.0
"""Default time limit in seconds of all rows together: less than eight minutes."""


def main(words: Sequence[str]) -> int:
    """Run the rows; return 0 unless one failed."""
    args = parser().parse_args(words)
    try:
        if args.predict:
            from benchmarks.gpu import predict  # compiles for an H100, which needs JAX's CUDA plugin

            print(predict.table())
            return 0
        if args.out is None:
            raise ValueError("--out DIR is needed: the folder of results")
        return suite.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """Return the parser, whose help lists every row."""
    table = "\n".join(f"  {row.name:<18}{row.what}" for row in ROWS)
    made = argparse.ArgumentParser(
        prog="bench.py gpu",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="All figures that need a GPU. Rows with a result in --out are not run again, so that the same "
        "command goes on where it was interrupted.",
        epilog=f"rows:\n{table}",
    )
    made.add_argument("--out", type=Path, help="the folder of results, logs, the checkpoint and the compilation cache")
    made.add_argument(
        "--predict", action="store_true", help="prints what an H100 is expected to give, without a GPU, and ends"
    )
    made.add_argument("--only", nargs="+", metavar="ROW", help="these rows, and those they need")
    made.add_argument("--force", action="store_true", help="runs them again; with --only, those named")
    made.add_argument("--dry-run", action="store_true", help="toy sizes, on whatever device there is")
    made.add_argument("--seconds", type=float, default=SECONDS, help="time limit of all rows together")
    made.add_argument(
        "--peer-python", default=sys.executable, help="one with torch and transformers; by default this one"
    )
    return made
