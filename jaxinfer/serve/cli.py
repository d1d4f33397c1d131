"""Command line of the server: `jaxinfer serve MODEL`."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jaxinfer._utils.checks import KV_CACHE_DTYPES, QUANTIZATIONS
from jaxinfer.commands.exit_status import complain
from jaxinfer.commands.option_words import logged_option_words
from jaxinfer.commands.overrides import SPECULATIVE, add_hf_overrides, read_template
from jaxinfer.errors import ConfigError, JaxInferError
from jaxinfer.serve import listening
from jaxinfer.serve.config import ServerConfig

KEY = "JAXINFER_API_KEY"
"""Environment variable of the key; a command line is visible to other users of the machine."""
ENGINE = ("dtype", "quantization", "tensor_parallel_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
ENGINE += ("kv_cache_dtype", "kv_cache_memory_bytes", "gpu_memory_utilization", "enable_prefix_caching", "seed")
ENGINE += ("tokenizer", "revision", "hf_overrides", "max_adapters", "max_adapter_rank")
ENGINE += ("speculative_config",)
"""Options that are arguments of `LLM`, passed on where they are given."""
LIMITS = {
    "max_body_bytes": "bytes of a request",
    "body_timeout": "seconds for a request to arrive",
    "write_timeout": "seconds that a stream may stay unread",
    "max_n": "samples of a request",
    "max_tokens": "new tokens of a sample",
    "max_concurrent_requests": "requests that are answered at a time",
    "max_queue_length": "waiting sequences above which requests are refused",
}
"""Options that are fields of `ServerConfig`, with their help."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the server to a parser."""
    add = parser.add_argument
    parser.usage = "jaxinfer serve MODEL [OPTIONS]"
    add("model", help="directory, GGUF file, Hub id, or smollm2")
    add("--served-model-name", metavar="NAME", help="name in requests; by default MODEL as given")
    server = parser.add_argument_group("server").add_argument
    server("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    server("--port", type=int, default=8000, help="port to listen on, 0 for any (%(default)s)")
    server("--api-key", metavar="KEY", help=f"key that requests must carry; or in the environment as {KEY}")
    server("--ssl-certfile", metavar="FILE", help="certificate for TLS")
    server("--ssl-keyfile", metavar="FILE", help="private key for TLS")
    server("--shutdown-timeout", type=int, default=30, metavar="S", help="for requests to end (%(default)s)")
    server("--warmup", action="store_true", help="compile first, but for JSON and embeddings")
    server("--access-log", action="store_true", help="log each request")
    server("--debug-cache", action="store_true", help="show blocks and requests at /debug/cache")
    server("--profile", metavar="DIR", help="traces by POST /start_profile and /stop_profile, written to DIR")
    limit = parser.add_argument_group("limits").add_argument
    defaults = {field.name: field.default for field in fields(ServerConfig)}
    for name, text in LIMITS.items():
        kind, metavar = (float, "S") if isinstance(defaults[name], float) else (int, "N")
        shown = "none" if defaults[name] is None else f"{defaults[name]:g}" if kind is float else defaults[name]
        limit(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=f"{text} ({shown})")
    engine = parser.add_argument_group("engine (see jaxinfer.EngineConfig)").add_argument
    engine("--dtype", choices=("auto", "float32", "bfloat16", "float16"))
    engine("--quantization", choices=QUANTIZATIONS, metavar="FORM", help="int8, fp8, dequantize, or its own format")
    for name in ("tensor-parallel-size", "max-model-len", "max-num-seqs", "max-num-batched-tokens"):
        engine(f"--{name}", type=int, metavar="N")
    engine("--kv-cache-dtype", choices=KV_CACHE_DTYPES, help="int8 and fp8: half the memory of keys and values")
    engine("--kv-cache-memory-bytes", type=int, metavar="N")
    engine("--gpu-memory-utilization", type=float, metavar="SHARE")
    engine("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=None)
    engine("--seed", type=int, metavar="N")
    engine("--tokenizer", metavar="DIR", help="tokenizer to use instead of the model's")
    engine("--revision", help="Git revision of the Hub id")
    engine("--chat-template", type=Path, metavar="FILE", help="Jinja source to use instead of the model's")
    engine("--adapter", action="append", metavar="NAME=DIR", help="LoRA adapter, a model by this name; repeatable")
    engine("--max-adapters", type=int, metavar="N", help="adapters at a time, also those added later")
    engine("--max-adapter-rank", type=int, metavar="R", help="largest rank of an adapter")
    engine("--speculative-config", **SPECULATIVE)
    add_hf_overrides(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m jaxinfer.serve`."""
    parser = argparse.ArgumentParser(prog="python -m jaxinfer.serve", description=__doc__)
    add_arguments(parser)
    return run(parser, parser.parse_args(argv))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Serve until a signal; return the exit status, 2 for bad input."""
    try:
        from jaxinfer.serve.server import make_server
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install 'jaxinfer[serve]'", file=sys.stderr)
        return 2

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("jaxinfer").setLevel(logging.INFO)
    try:
        key = args.api_key if args.api_key is not None else os.environ.get(KEY)
        _check(args)
        name = args.served_model_name or args.model
        config = ServerConfig(name, key, args.debug_cache, args.profile, **_given(args, tuple(LIMITS)))
        with logged_option_words(parser):
            llm = _load(args, _adapters(args.adapter or (), name))
    except (JaxInferError, ValueError, TypeError, OSError) as error:
        complain(error, parser)
        return 2
    except KeyboardInterrupt:
        return 130
    server = make_server(llm, config, args)
    # uvicorn raises the signals that ended it again: a graceful stop is no failure.
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, lambda *_: None)
    try:
        server.run()
    except SystemExit:  # another process took the port meanwhile; uvicorn has logged it
        return 1
    return 0 if server.started else 1


def _check(args: argparse.Namespace) -> None:
    """Check what would otherwise fail when the model is loaded; raises ConfigError."""
    listening.check_certificate(args.ssl_certfile, args.ssl_keyfile)
    listening.check_address(args.host, args.port)
    if args.shutdown_timeout < 0:
        raise ConfigError(f"--shutdown-timeout must be at least 0 seconds, got {args.shutdown_timeout}")
    if args.profile is not None:
        try:
            Path(args.profile).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--profile {args.profile!r} cannot be made a folder: {error.strerror}") from None


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the options that the command line sets."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _adapters(given: Sequence[str], model: str) -> dict[str, str] | None:
    """Return the folders of adapters by name.

    Raises:
        ConfigError: an option is not NAME=DIR, or a name occurs twice.
    """
    found: dict[str, str] = {}
    for one in given:
        name, equals, folder = one.partition("=")
        if not name or not equals or not folder:
            raise ConfigError(f"--adapter must be NAME=DIR, got {one!r}")
        if name in found or name == model:
            raise ConfigError(f"--adapter {one!r}: {name!r} is the name of another model; choose a name of its own")
        found[name] = folder
    return found or None


def _load(args: argparse.Namespace, adapters: dict[str, str] | None) -> Any:
    """Load the model and, with `--warmup`, compile its steps."""
    from jaxinfer.async_llm import AsyncLLM
    from jaxinfer.llm import LLM

    template = read_template(args.chat_template)
    llm = LLM(args.model, chat_template=template, adapters=adapters, **_given(args, ENGINE))
    if args.warmup:
        llm.warmup()
    return AsyncLLM.of(llm)
