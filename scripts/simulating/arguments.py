"""Options of `scripts/simulate.py`; imported before JAX, whose devices depend on them."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog="simulate.py",
        description="Replay a trace of requests through the real scheduler and cache with a model of step times.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="DIR", help="folder with config.json, or Hub id; default: the packaged checkpoint")
    add("--trace", type=Path, metavar="FILE", help="requests: .jsonl or .csv (docs/simulation.md)")
    add("--rate", type=float, default=1.0, metavar="X", help="play the trace X times as fast (%(default)s)")
    add("--limit", type=int, metavar="N", help="the first N requests of the trace only")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="engine settings, as of LLM")
    add("--max-num-seqs", type=int, metavar="N", help="the same as --set max_num_seqs=N")
    add("--json", action="store_true", help="print one JSON object")
    device = parser.add_argument_group("a device by its data sheet")
    add = device.add_argument
    add("--device", metavar="NAME", help="h100, h200, a100-80, a100-40, l40s, l4 or rtx4090")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="devices (%(default)s)")
    add("--memory", metavar="SIZE", help="of a device, in place of the data sheet's, e.g. 40GiB")
    add("--bandwidth", type=float, metavar="TB/S", help="of memory, in place of the data sheet's")
    add("--rate-tflops", type=float, metavar="TFLOP/S", help="of products, in place of the data sheet's")
    add("--step-memory", default="1GiB", metavar="SIZE", help="temporaries of steps (%(default)s)")
    measured = parser.add_argument_group("a device that is measured")
    add = measured.add_argument
    add("--measure", type=Path, metavar="OUT", help="measure step times of this machine into a file")
    add("--step-times", type=Path, metavar="FILE", help="simulate with measured step times")
    add("--check", action="store_true", help="also run the trace here in real time, and print the error")
    return parser


def simulated_devices(words: Sequence[str]) -> int:
    """Return the number of devices that the command line simulates; 0 if the engine runs on this machine's."""
    args, _ = make_parser().parse_known_args(list(words[1:]))
    return args.tensor_parallel_size if args.device else 0
