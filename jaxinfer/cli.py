"""The command `jaxinfer`."""

import argparse
import sys
from collections.abc import Sequence

from jaxinfer import __version__
from jaxinfer.serve import cli as serve


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    parser = argparse.ArgumentParser(prog="jaxinfer", description="JAX inference for Hugging Face checkpoints.")
    parser.add_argument("--version", action="version", version=f"jaxinfer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = "serve a model over HTTP with the APIs of OpenAI and Anthropic"
    serve.add_arguments(commands.add_parser("serve", help=about, description=about))
    return serve.run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
