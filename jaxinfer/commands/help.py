"""Formats of a command's help, which fits a terminal of 80 columns."""

import argparse
import sys
import textwrap


class Paragraphs(argparse.HelpFormatter):
    """Formatter that wraps each paragraph of a description, and keeps indented ones, which are commands."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.strip().split("\n\n")
        return "\n\n".join(
            one if one.startswith("    ") else textwrap.fill(" ".join(one.split()), width) for one in parts
        )


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Formatter that adds the defaults that say something, and has short names of values.

    The path of the interpreter is left out: help is as long on every machine.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, [], sys.executable) else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.dest.rpartition("_")[2].upper()
