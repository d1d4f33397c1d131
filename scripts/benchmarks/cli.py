"""The command line of `scripts/bench.py`."""

import argparse
import contextlib
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import checkpoint, commands
from benchmarks.commands import Subject
from benchmarks.peer import PEERS

SIZES = {
    "hidden_size": (1024, "M of the random Llama"),
    "num_hidden_layers": (16, "its layers"),
    "num_attention_heads": (16, "its query heads"),
    "num_key_value_heads": (4, "its key and value heads"),
    "intermediate_size": (2816, "its feed-forward width"),
    "vocab_size": (32000, "its vocabulary"),
    "max_position_embeddings": (8192, "its longest sequence"),
}
"""Flags, their defaults and what they say: 0.25 B parameters."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; 0 if it succeeded. stdout carries the result alone."""
    args = _parser().parse_args(argv)
    args.settings = dict(args.settings)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            report = getattr(commands, args.command)(args, _subject(args))
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report.as_dict()) if args.json else report.as_table())
    return 0


def _subject(args: argparse.Namespace) -> Subject:
    """The model of `--model`, or the random one, made if it is not there yet."""
    if args.model is not None:
        config = json.loads((args.model / "config.json").read_text())
        return Subject(args.model, config["vocab_size"], str(args.model))
    config = random_config(args)
    name = hashlib.sha256(json.dumps([config, args.seed]).encode()).hexdigest()[:12]
    folder = args.checkpoint_dir or Path(tempfile.gettempdir()) / f"jaxinfer-bench-{name}"
    checkpoint.write(folder, config, args.seed)
    millions = checkpoint.parameters(config) / 1e6
    return Subject(folder, config["vocab_size"], f"random Llama, {millions:.4g} M parameters, {config['dtype']}")


def random_config(args: argparse.Namespace) -> dict[str, Any]:
    """config.json of the random Llama."""
    sizes = {name: getattr(args, name) for name in SIZES}
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise ValueError(
            f"--hidden-size {sizes['hidden_size']} is not divided by --num-attention-heads "
            f"{sizes['num_attention_heads']}"
        )
    return sizes | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"], "rope_theta": 10000.0,
        "tie_word_embeddings": False, "dtype": args.checkpoint_dtype,
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.py", description="Figures of jaxinfer and of peers, in one run.")
    subcommands = parser.add_subparsers(dest="command", required=True)
    common = _common()

    def add(name: str, function: Any) -> argparse.ArgumentParser:
        return subcommands.add_parser(
            name, parents=[common], help=function.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    offline = add("throughput", commands.throughput)
    _positive(offline, {
        "num_prompts": (32, "requests, all at once"), "min_input_len": (16, "tokens of the shortest prompt"),
        "max_input_len": (256, "tokens of the longest"), "output_len": (48, "new tokens of each"),
        "repeats": (3, "passes of each system"),
    })  # fmt: skip
    batch = add("latency", commands.latency)
    _positive(batch, {
        "batch_size": (8, "requests"), "input_len": (32, "tokens of each prompt"), "output_len": (128, "new tokens"),
        "num_iters": (10, "passes of each system"), "num_iters_warmup": (2, "passes that do not count"),
    })  # fmt: skip
    served = add("serving", commands.serving)
    _positive(served, {
        "input_len": (4000, "mean tokens of a prompt, before scaling"),
        "output_len": (1000, "mean new tokens, before scaling"),
        "requests_per_client": (3, "requests, as a multiple of the concurrency"),
        "repeats": (1, "passes of each system"),
    })  # fmt: skip
    served.add_argument("--concurrency", type=_count, nargs="+", default=[8, 32, 128], help="requests in flight")
    served.add_argument("--scale", type=float, default=0.02, help="multiplies the input and output lengths")
    served.add_argument("--length-spread", type=float, default=0.25, help="lengths vary by this share of their mean")
    return parser


def _common() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, help="a checkpoint's folder instead of the random Llama")
    model.add_argument("--checkpoint-dir", type=Path, help="keeps the random Llama; by default a temporary folder")
    model.add_argument(
        "--checkpoint-dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="its dtype"
    )
    _positive(model, SIZES)
    peers = parser.add_argument_group("peers")
    peers.add_argument("--peer", choices=PEERS, action="append", default=[], help="measured beside; may be repeated")
    peers.add_argument("--peer-python", default=sys.executable, help="the interpreter with torch and transformers")
    peers.add_argument("--peer-dtype", default="auto", help="auto is the checkpoint's")
    parser.add_argument("--set", dest="settings", metavar="NAME=VALUE", type=_setting, action="append", default=[],
                        help="a field of EngineConfig, such as max_num_seqs=16; may be repeated")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, everything else on stderr")
    return parser


def _positive(group: Any, flags: Mapping[str, tuple[int, str]]) -> None:
    """Flags of counts: name, default, help."""
    for name, (default, text) in flags.items():
        group.add_argument("--" + name.replace("_", "-"), type=_count, default=default, help=text)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
