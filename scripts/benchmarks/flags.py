"""Command-line flags of `scripts/bench.py`."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import commands
from benchmarks.peer import PEERS
from benchmarks.standard import STANDARDS
from jaxinfer.commands.help import Defaults
from jaxinfer.commands.overrides import add_hf_overrides

SIZES = {
    "hidden_size": (1024, "M of the random Llama"),
    "num_hidden_layers": (16, "its layers"),
    "num_attention_heads": (16, "its query heads"),
    "num_key_value_heads": (4, "its key and value heads"),
    "intermediate_size": (2816, "its feed-forward width"),
    "vocab_size": (32000, "its vocabulary"),
    "max_position_embeddings": (8192, "its longest sequence"),
}
"""Flags of the random model with their defaults and help texts; the defaults give 0.25 B parameters."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="bench.py", description="Figures of jaxinfer and of peers, in one run.")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = _common()

    for flags in (
        _throughput,
        _latency,
        _serving,
        _work,
        _deterministic,
        _host,
        _startup,
        _soak,
        _roofline,
        _profile,
        _placement,
        _growth,
        _sharing,
        _projections,
        _cross,
        _structured,
        _speculative,
    ):
        name = flags.__name__.removeprefix("_")
        what = getattr(commands, name).__doc__
        flags(
            subcommands.add_parser(
                name,
                parents=[common],
                help=what,
                description=what,
                usage=f"bench.py {name} [OPTIONS]",
                formatter_class=partial(Defaults, max_help_position=32),
            )
        )
    return parser


def _throughput(parser: argparse.ArgumentParser) -> None:
    _positive(
        parser,
        {
            "num_prompts": (32, "requests, all at once"),
            "min_input_len": (16, "tokens of the shortest prompt"),
            "max_input_len": (256, "tokens of the longest"),
            "output_len": (48, "new tokens of each"),
            "repeats": (3, "passes of each system"),
        },
    )


def _latency(parser: argparse.ArgumentParser) -> None:
    _positive(
        parser,
        {
            "batch_size": (8, "requests"),
            "input_len": (32, "tokens of each prompt"),
            "output_len": (128, "new tokens"),
            "num_iters": (10, "passes of each system"),
            "num_iters_warmup": (2, "passes that do not count"),
        },
    )


def _serving(parser: argparse.ArgumentParser) -> None:
    _positive(
        parser,
        {
            "input_len": (4000, "mean tokens of a prompt, before scaling"),
            "output_len": (1000, "mean new tokens, before scaling"),
            "requests_per_client": (3, "requests, as a multiple of the concurrency"),
            "repeats": (1, "passes of each system"),
        },
    )
    parser.add_argument("--concurrency", type=_count, nargs="+", default=[8, 32, 128], help="requests in flight")
    parser.add_argument("--scale", type=float, default=0.02, help="multiplies the input and output lengths")
    parser.add_argument("--length-spread", type=float, default=0.25, help="lengths vary by this share of their mean")


def _work(parser: argparse.ArgumentParser) -> None:
    what = "; ".join(f"{name}: {standard.what}" for name, standard in STANDARDS.items())
    parser.add_argument("works", nargs="*", type=_one_of(*STANDARDS), default=list(STANDARDS), metavar="W", help=what)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all lengths; 1: the works as they are")
    _positive(parser, {"repeats": (5, "passes of each system")})


def _deterministic(parser: argparse.ArgumentParser) -> None:
    _work(parser)
    parser.set_defaults(works=["W2", "W3", "W5"])


def _host(parser: argparse.ArgumentParser) -> None:
    _positive(parser, {"rows": (256, "running sequences"), "steps": (96, "decode steps that count")})
    parser.add_argument("--lengths", type=_count, nargs="+", default=[100, 4000], help="tokens of each sequence")
    parser.add_argument(
        "--queued", type=int, default=0, metavar="N", help="prompts that wait for a row (default: %(default)s)"
    )


def _startup(parser: argparse.ArgumentParser) -> None:
    _positive(parser, {"repeats": (5, "pairs of fresh processes")})


def _soak(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=10.0, help="that the workload runs after the warm-up")


def _roofline(parser: argparse.ArgumentParser) -> None:
    _work(parser)
    _positive(
        parser,
        {
            "mebibytes": (512, "size of what is read and copied"),
            "matmul_size": (2048, "K and N of the product, of 512 rows, whose rate is measured"),
        },
    )


def _profile(parser: argparse.ArgumentParser) -> None:
    _positive(
        parser,
        {
            "batch_size": (8, "sequences"),
            "input_len": (128, "tokens of each prompt"),
            "steps": (16, "decode steps"),
        },
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the trace; xprof and perfetto read it")


def _placement(parser: argparse.ArgumentParser) -> None:
    _positive(
        parser,
        {
            "devices": (8, "virtual CPU devices over which the model is divided"),
            "batch_size": (8, "rows of the step"),
            "context": (512, "tokens of each sequence"),
            "repeats": (15, "passes of each placement, in turns"),
        },
    )


def _growth(parser: argparse.ArgumentParser) -> None:
    _positive(
        parser,
        {
            "batch_size": (8, "rows"),
            "input_len": (3072, "tokens of each prompt"),
            "output_len": (1024, "new tokens of each"),
            "lengths": (9, "that are measured, of those that the rows have on the way"),
            "step": (128, "positions by which the read length of the contiguous cache grows"),
            "repeats": (7, "passes of each method at each length, in turns"),
        },
    )
    parser.add_argument("--small", action="store_true", help="a quarter of the lengths and of the layers")
    parser.add_argument("--dtype", default="auto", help="auto is the checkpoint's")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="step time against length; needs matplotlib")


def _structured(parser: argparse.ArgumentParser) -> None:
    _positive(
        parser,
        {
            "batch_size": (64, "rows, each with a schema of its own"),
            "output_len": (64, "new tokens of each"),
            "repeats": (3, "passes with structure and without, in turns"),
        },
    )


def _speculative(parser: argparse.ArgumentParser) -> None:
    sizes = {
        "output_len": (160, "new tokens of each prompt"),
        "repeats": (3, "passes with drafts and without, in turns"),
    }
    _positive(parser, sizes)


def _sharing(parser: argparse.ArgumentParser) -> None:
    names = ("gemma3", "gpt_oss", "kimi_linear", "qwen3_5")
    what = f"{', '.join(names)}: their layers, small"
    parser.add_argument("models", nargs="*", type=_one_of(*names), default=list(names), metavar="MODEL", help=what)
    _positive(
        parser,
        {
            "samples": (16, "of one prompt"),
            "requests": (64, "of a prefix workload"),
            "pool_requests": (8, "of them that the cache has blocks for"),
            "repeats": (25, "passes with sharing and without, in turns"),
        },
    )
    parts = ("samples", "prefixes", "speed")
    parser.add_argument(
        "--parts", nargs="+", choices=parts, default=list(parts), help="what is measured, by default all of it"
    )
    what = "an eighth of the lengths and windows, a quarter of the requests"
    parser.add_argument("--small", action="store_true", help=what)


def _projections(parser: argparse.ArgumentParser) -> None:
    names = ("kda", "qkv", "gate_up")
    what = "kda: six projections, then two, of SGLang #17801; qkv, gate_up: of a Llama of 1.1 B parameters"
    parser.add_argument("groups", nargs="*", type=_one_of(*names), default=list(names), metavar="GROUP", help=what)
    parser.add_argument("--m", type=_count, nargs="+", help="rows; default: 1 8 64 512 4096, on a GPU also 8192 16384")
    _positive(
        parser,
        {"repeats": (7, "passes of each variant at each m, in turns, at least: as many as fit into three seconds")},
    )
    parser.add_argument("--small", action="store_true", help="an eighth of all widths")
    what = "count kernels of a decode step of Kimi-Linear's widths, compiled for an H100 without one"
    parser.add_argument("--h100", action="store_true", help=what)


def _cross(parser: argparse.ArgumentParser) -> None:
    parts = ("steps", "documents", "int8", "shared")
    what = (
        "steps: against projections padded to q, k and v of both streams; documents: tokens a second, beside peers; "
        "int8: the same with int8 weights; shared: encoder runs and blocks of samples and beams"
    )
    parser.add_argument("parts", nargs="*", type=_one_of(*parts), default=list(parts), metavar="PART", help=what)
    _positive(
        parser,
        {
            "batch_size": (8, "documents of a step"),
            "input_len": (256, "tokens of each"),
            "repeats": (5, "passes, in turns"),
            "num_prompts": (32, "documents, all at once"),
            "min_input_len": (64, "tokens of the shortest"),
            "max_input_len": (960, "tokens of the longest"),
            "output_len": (64, "new tokens of each"),
            "samples": (8, "of each document"),
            "beams": (4, "of each document"),
        },
    )
    what = "a small model, an eighth of the lengths, a quarter of the documents"
    parser.add_argument("--small", action="store_true", help=what)


def _common() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, help="a checkpoint's folder instead of the random Llama")
    add_hf_overrides(model)
    model.add_argument("--checkpoint-dir", type=Path, help="keeps the random Llama; by default a temporary folder")
    model.add_argument(
        "--checkpoint-dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="its dtype"
    )
    _positive(model, SIZES)
    peers = parser.add_argument_group("peers")
    peers.add_argument("--peer", choices=PEERS, action="append", default=[], help="measured beside; may be repeated")
    peers.add_argument(
        "--peer-python", default=sys.executable, help="one with torch and transformers; by default this one"
    )
    peers.add_argument("--openvino-python", default=sys.executable, help="one with openvino-genai and optimum-intel")
    peers.add_argument("--openvino-model", type=Path, help="keeps the exported models; by default a temporary folder")
    peers.add_argument("--peer-dtype", default="auto", help="auto is the checkpoint's")
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="NAME=VALUE",
        type=_setting,
        action="append",
        default=[],
        help="a field of EngineConfig, such as max_num_seqs=16; may be repeated",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, everything else on stderr")
    return parser


def _positive(group: Any, flags: Mapping[str, tuple[int, str]]) -> None:
    """Add flags of positive counts, given as name, default and help text."""
    for name, (default, text) in flags.items():
        group.add_argument("--" + name.replace("_", "-"), type=_count, default=default, help=text)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _one_of(*names: str) -> Callable[[str], str]:
    """Return a parser for one of these names; argparse's `choices` refuse the default of an optional positional
    argument.
    """

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, got {text!r}")
        return text

    return parse


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def random_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return the config.json of the random Llama."""
    sizes = {name: getattr(args, name) for name in SIZES}
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise ValueError(
            f"--hidden-size {sizes['hidden_size']} is not divided by --num-attention-heads "
            f"{sizes['num_attention_heads']}"
        )
    return sizes | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"],
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "dtype": args.checkpoint_dtype,
    }
