"""Command line of `scripts/bench.py`: parse arguments, run a subcommand, print its report."""

import argparse
import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import checkpoint, commands, families, flags
from benchmarks.gpu import cli as gpu
from benchmarks.gpu import compiled
from benchmarks.systems import Subject

WITHOUT_MODEL = (
    "host",
    "startup",
    "soak",
    "placement",
    "growth",
    "sharing",
    "projections",
    "cross",
    "structured",
    "speculative",
)
"""Subcommands that need no random checkpoint, because they use a model of their own or the packaged one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return 0 on success; only the result goes to stdout. `--work W1 ...` is an alias of `work
    W1 ...`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--work"]:
        words[0] = "work"
    if words[:1] == ["gpu"]:
        return gpu.main(words[1:])
    if words[:1] == ["compiled"]:
        return compiled.main(words[1:])
    if words[:1] == ["families"]:
        return families.main(words[1:])
    args = flags.make_parser().parse_args(words)
    args.settings = dict(args.settings)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as own:
            report = getattr(commands, args.command)(args, _subject(args, Path(own)))
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report.as_dict()) if args.json else report.as_table())
    return 0


def _subject(args: argparse.Namespace, own: Path) -> Subject | None:
    """Return the model of `--model`, or the random one, created if needed; None if the subcommand needs none.

    With `--hf-overrides`, `own` becomes the model's folder, so that peers read the overrides too.
    """
    if args.hf_overrides is not None and args.model is None:
        raise ValueError("--hf-overrides goes with --model")
    if args.model is not None:
        if args.hf_overrides is not None:
            args.model = checkpoint.laid_over(args.model, args.hf_overrides, own)
        config = json.loads((args.model / "config.json").read_text())
        return Subject(args.model, config["vocab_size"], str(args.model))
    if args.command in WITHOUT_MODEL:
        return None
    config = flags.random_config(args)
    folder = checkpoint.kept(config, args.seed, args.checkpoint_dir)
    millions = checkpoint.parameters(config) / 1e6
    return Subject(folder, config["vocab_size"], f"random Llama, {millions:.4g} M parameters, {config['dtype']}")
