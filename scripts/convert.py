#!/usr/bin/env python
"""Convert a checkpoint to weights that are fused, sharded and quantised as on the devices, for a faster start.

    python scripts/convert.py --model DIR --out DIR2 --tensor-parallel-size 8

`LLM(DIR2, tensor_parallel_size=8)` loads each shard directly to its device. The conversion runs on a CPU and needs none
of the devices.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxinfer.commands.exit_status import status_of
from jaxinfer.commands.help import Paragraphs
from jaxinfer.commands.overrides import add_hf_overrides

if TYPE_CHECKING:
    from jaxinfer.checkpoint.manifest import Manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = parse(argv)
    # Read by JAX at start: one virtual device per shard, and no GPU is used.
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={args.tensor_parallel_size}"
    return status_of(
        lambda: verify(args.verify) if args.verify else convert(args), interrupted="interrupted; nothing was written"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Paragraphs)
    add = parser.add_argument
    add("--model", help="a checkpoint's directory, GGUF file or Hub id")
    add("--out", type=Path, metavar="DIR", help="the folder to write, which must not be there yet")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="devices to divide the weights over")
    add(
        "--placement",
        nargs="+",
        default=[],
        metavar="PATTERN=TACTIC",
        help="modules by patterns of their paths: shard or replicate, such as '*.attention=replicate'",
    )
    add("--pad-heads", action="store_true", help="add heads of zeroes where the model's do not divide")
    add("--quantization", default=None, choices=("int8",), help="keep the matrices in int8")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="auto: the checkpoint's")
    add_hf_overrides(parser)
    add(
        "--verify", type=Path, metavar="DIR", help="check every byte of a converted folder against its manifest instead"
    )
    args = parser.parse_args(argv)
    if (args.verify is None) == (args.model is None and args.out is None) or (args.model is None) != (args.out is None):
        parser.error("give --model and --out, or --verify alone")
    if not 1 <= args.tensor_parallel_size <= 4096:
        parser.error(f"--tensor-parallel-size must be from 1 to 4096, got {args.tensor_parallel_size}")
    for given in args.placement:
        if "=" not in given:
            parser.error(f"--placement: {given!r} is not PATTERN=TACTIC")
    return args


def convert(args: argparse.Namespace) -> int:
    """Convert the checkpoint and print a summary of the folder."""
    from jaxinfer.checkpoint.hub import resolve_model
    from jaxinfer.loading import convert as converting
    from jaxinfer.sharding import make_mesh
    from jaxinfer.sharding.policy import Placement

    start = time.perf_counter()
    manifest = converting.convert(
        resolve_model(args.model),
        args.out,
        make_mesh(args.tensor_parallel_size),
        dtype=args.dtype,
        quantization=args.quantization,
        pad_heads=args.pad_heads,
        overrides=args.hf_overrides,
        placement=Placement(dict(given.rsplit("=", 1) for given in args.placement)),
    )
    print(f"{args.out}: {describe(manifest)}; {time.perf_counter() - start:.1f} s")
    return 0


def verify(folder: Path) -> int:
    """Check every file of a converted folder against its manifest."""
    from jaxinfer.checkpoint.manifest import NAME, Manifest
    from jaxinfer.errors import CheckpointError

    manifest = Manifest.read(folder)
    if manifest is None:
        raise CheckpointError(f"{folder} has no {NAME}: it is not a converted checkpoint")
    manifest.check_files(folder, contents=True)
    print(f"{folder}: {describe(manifest)}; as it was written")
    return 0


def describe(manifest: "Manifest") -> str:
    """Summarise a converted folder in one line."""
    size = sum(size for size, _ in manifest.files.values())
    kept = manifest.dtype if manifest.quantization is None else f"{manifest.quantization} and {manifest.dtype}"
    shards = f"{manifest.tensor_parallel_size} shard{'s' if manifest.tensor_parallel_size > 1 else ''}"
    files = f"{size / 2**30:.3g} GiB in {len(manifest.files)} files"
    return f"{len(manifest.parameters)} parameters in {kept}, {shards}, {files}"


if __name__ == "__main__":
    sys.exit(main())
