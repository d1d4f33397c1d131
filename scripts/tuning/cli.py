"""Command line of `scripts/tune.py`."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tuning.problems import COMMON, KERNELS, Load, Shape

H100 = "90:132"


def main(words: Sequence[str] | None = None) -> int:
    """Tune, or compile only; return the exit status."""
    args = _parser().parse_args(words)
    try:
        calls = dict.fromkeys((kernel, tuple(shape.items())) for kernel, shape in _calls(args))
        target = _target(args)
    except (ValueError, OSError) as error:
        print(f"tune.py: {error}", file=sys.stderr)
        return 2
    load = Load(args.sequences, args.positions, args.tokens)
    return (_show if args.compile_only else _tune)([(k, dict(shape)) for k, shape in calls], target, load, args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tune.py", description="Measure tile sizes of Triton kernels.")
    parser.add_argument(
        "--layers", nargs="+", choices=COMMON, metavar="NAME", help=f"common layers: {', '.join(COMMON)} (default all)"
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="only these")
    parser.add_argument("--model", metavar="DIR", help="tune the calls of this model's steps; reads config.json alone")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs of the model")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", metavar="N", default=[1, 8, 64], help="decode steps of the model"
    )
    parser.add_argument(
        "--sequences", type=int, metavar="N", default=64, help="sequences of a decode call (default 64)"
    )
    parser.add_argument(
        "--positions", type=int, metavar="N", default=4096, help="cached positions of each (default 4096)"
    )
    parser.add_argument("--tokens", type=int, metavar="N", default=2048, help="tokens of a prefill call (default 2048)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the table, named after the GPU")
    parser.add_argument("--force", action="store_true", help="measure shapes that the table has again")
    parser.add_argument("--compile-only", action="store_true", help="print what candidates need; needs no GPU")
    parser.add_argument("--estimated", action="store_true", help="of --compile-only: no tiles but the estimated ones")
    parser.add_argument("--target", default=H100, help=f"of --compile-only: capability:cores (default {H100}, an H100)")
    return parser


def _calls(args: argparse.Namespace) -> Iterable[tuple[str, Shape]]:
    """Return kernels and shapes to tune."""
    if args.model is None:
        found = [call for name in args.layers or COMMON for call in COMMON[name]]
    else:
        from tuning.model import calls_of

        found = calls_of(Path(args.model), args.tensor_parallel_size, args.batch_sizes, args.tokens)
    return [(kernel, shape) for kernel, shape in found if kernel in args.kernels]


def _target(args: argparse.Namespace) -> Any:
    from jaxinfer.kernels.triton import triton_launch
    from jaxinfer.sharding import make_mesh

    if (reason := triton_launch.lacking()) is not None:
        raise ValueError(reason)
    if args.compile_only:
        numbers = args.target.split(":")
        if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
            raise ValueError(f"--target must be capability:cores such as {H100}, got {args.target!r}")
        return triton_launch.Target(*map(int, numbers))
    if args.out is None:
        raise ValueError("--out DIR is missing: the folder of the table")
    found = triton_launch.target(make_mesh(1))
    if found is None:
        raise ValueError("there is no NVIDIA GPU of compute capability 8.0 or more; --compile-only needs none")
    return found


def _show(calls: Sequence[tuple[str, Shape]], target: Any, load: Load, args: argparse.Namespace) -> int:
    """Print what each candidate needs."""
    from tuning.candidates import Call

    for kernel, shape in calls:
        call = Call(kernel, shape, target, load)
        print(_title(kernel, shape), flush=True)
        for entry in [call.estimated] if args.estimated else call.candidates():
            mark = "*" if entry == call.estimated else " "
            print(f"  {mark} {_text(entry)}: {_needs(call, entry)}", flush=True)
    print("* estimated from the shape")
    return 0


def _tune(calls: Sequence[tuple[str, Shape]], target: Any, load: Load, args: argparse.Namespace) -> int:
    """Measure the candidates of each call, and write the table after each."""
    import jax

    from jaxinfer.kernels.triton import tuned
    from tuning.candidates import Call

    path = args.out / tuned.file_name(target.kind)
    tiles = tuned.read(path) if path.exists() else {}
    for kernel, shape in calls:
        known = tiles.setdefault(kernel, {})
        if tuned.shape_text(shape) in known and not args.force:
            continue
        call = Call(kernel, shape, target, load)
        found, unfit = _measure(call)
        if not found:
            print(f"{_title(kernel, shape)}: no candidate runs", flush=True)
            continue
        best, least = min(found, key=lambda one: one[1])
        estimated = next((seconds for entry, seconds in found if entry == call.estimated), None)
        figures = {"us": least, "estimated_us": estimated} if estimated is not None else {"us": least}
        known[tuned.shape_text(shape)] = best | {name: round(1e6 * value, 2) for name, value in figures.items()}
        print(
            f"{_title(kernel, shape)}: {1e6 * least:.1f} us with {_text(best)}; estimated tiles "
            f"({_text(call.estimated)}) {'do not run' if estimated is None else f'{1e6 * estimated:.1f} us'}; "
            f"{len(found)} candidates, {unfit} do not fit",
            flush=True,
        )
        args.out.mkdir(parents=True, exist_ok=True)
        table = {"device": target.kind, "jax": jax.__version__, "tiles": tiles}
        path.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{path}: set JAXINFER_TUNED_TILES={args.out} for jaxinfer to read it")
    return 0


def _measure(call: Any) -> tuple[list[tuple[dict[str, int], float]], int]:
    """Return the candidates that fit, with their seconds, and the number of those that do not."""
    found, unfit = [], 0
    for entry in call.candidates():
        try:
            if not call.needs(entry).fits:
                unfit += 1
                continue
            found.append((dict(entry), call.seconds(entry)))
        except Exception as error:  # the compiler or the device refuses it; the other candidates still count
            unfit += 1
            print(f"    {_text(entry)}: {type(error).__name__}: {str(error)[:120]}", flush=True)
    return found, unfit


def _needs(call: Any, entry: Any) -> str:
    try:
        return str(call.needs(entry))
    except Exception as error:  # Triton refuses some combinations
        return f"{type(error).__name__}: {str(error)[:120]}"


def _title(kernel: str, shape: Shape) -> str:
    from jaxinfer.kernels.triton import tuned

    return f"{kernel} {tuned.shape_text(shape)}"


def _text(entry: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in entry.items())
