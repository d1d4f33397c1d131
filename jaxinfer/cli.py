"""The command `jaxinfer`."""

import argparse
import functools
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from jaxinfer import __version__
from jaxinfer.commands.exit_status import end

COMMANDS = {
    "serve": ("jaxinfer.serve.cli", "serve a model over HTTP with the APIs of OpenAI and Anthropic"),
    "generate": ("jaxinfer.commands.generate.cli", "generate from prompts, images or audio files"),
    "chat": ("jaxinfer.commands.chat", "chat with a model in the terminal"),
    "bench": ("jaxinfer.commands.bench.cli", "measure a model on this machine, or a server"),
    "plan": ("jaxinfer.commands.plan.cli", "print where a model's weights lie and what fits, without loading it"),
}
"""Subcommands with the module of each, which has `add_arguments(parser)` and `run(parser, args)`, and its help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    parser, args = parse(argv)
    return _module(args.command).run(parser, args)


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Parse the command line; return the subcommand's parser, for errors, and the arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="jaxinfer", description="JAX inference for Hugging Face checkpoints.")
    parser.add_argument("--version", action="version", version=f"jaxinfer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {
        name: commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            usage=f"jaxinfer {name} [OPTIONS]",
            formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=32),
        )
        for name, (_, about) in COMMANDS.items()
    }
    if words and words[0] in COMMANDS:  # only that one is imported: `--help` needs no JAX
        _module(words[0]).add_arguments(parsers[words[0]])
    args, unknown = parser.parse_known_args(words)
    own = getattr(args, "parser", parsers[args.command])
    if unknown:
        own.error(f"unrecognized arguments: {' '.join(unknown)}")
    return parsers[args.command], args


def _module(command: str) -> ModuleType:
    return importlib.import_module(COMMANDS[command][0])


def command() -> None:
    """Run a subcommand and end the process with its exit status."""
    end(main())


if __name__ == "__main__":
    command()
