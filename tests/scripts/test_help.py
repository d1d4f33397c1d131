"""The help of every command: `jaxinfer`, its subcommands and the scripts, found by following the parsers."""

import argparse
import runpy
import sys

import pytest
from support import scripts

from jaxinfer import __version__, cli
from jaxinfer.serve import cli as serve

pytestmark = pytest.mark.xdist_group("demo")
WIDTH, HEIGHT = 80, 60
"""Columns of a terminal, and lines of a tall one."""
SCRIPTS = sorted(path.stem for path in scripts.SCRIPTS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


def helps(run, words: tuple[str, ...], monkeypatch) -> dict[tuple[str, ...], str]:
    """Return the help of a command line and of its subcommands."""
    shown: list[argparse.ArgumentParser] = []
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "print_help", lambda parser, file=None: shown.append(parser))
        with pytest.raises(SystemExit) as end:
            run([*words, "--help"])
    assert end.value.code in (0, None) and len(shown) == 1
    found = {words: shown[0].format_help()}
    for action in shown[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in action.choices:
                found |= helps(run, (*words, name), monkeypatch)
    return found


def script(name: str, monkeypatch):
    """Return a function that runs a script with arguments, as its file does when it is called."""

    def run(words: list[str]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [f"{name}.py", *words])
            runpy.run_path(str(scripts.SCRIPTS / f"{name}.py"), run_name="__main__")

    return run


@pytest.mark.parametrize("command", ["jaxinfer", "jaxinfer.serve", *SCRIPTS])
def test_help_of_every_command_fits_a_screen(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setattr(sys, "executable", f"/tmp/{'a-long-path/' * 8}bin/python")
    run = {"jaxinfer": cli.main, "jaxinfer.serve": serve.main}.get(command) or script(command, monkeypatch)
    found = helps(run, (), monkeypatch)
    if command == "jaxinfer":
        assert {(), *((name,) for name in cli.COMMANDS), ("bench", "serve")} <= set(found)
    sizes = {words: (max(map(len, text.splitlines())), len(text.splitlines())) for words, text in found.items()}
    large = {words: size for words, size in sizes.items() if size[0] > WIDTH or size[1] > HEIGHT}
    assert not large, {words: found[words] for words in large}


@pytest.mark.parametrize("command", ["jaxinfer", *SCRIPTS])
def test_an_unknown_option_ends_with_status_2_and_one_line_after_the_usage(command, monkeypatch, capsys):
    run = cli.main if command == "jaxinfer" else script(command, monkeypatch)
    with pytest.raises(SystemExit) as end:
        run(["--no-such-option"])
    assert end.value.code == 2
    *usage, error = capsys.readouterr().err.strip().splitlines()
    assert "error: " in error and usage[0].startswith("usage: ")
    assert all(line.startswith("  ") for line in usage[1:])


@pytest.mark.parametrize(
    ("words", "program"),
    [
        (["generate", "--modle", "x"], "jaxinfer generate: error: unrecognized arguments: --modle x"),
        (
            ["bench", "serve", "--num-promts", "1"],
            "jaxinfer bench serve: error: unrecognized arguments: --num-promts 1",
        ),
        (["bench", "serve", "--num-prompts", "0"], "jaxinfer bench serve: error: argument --num-prompts: '0'"),
        (["generate", "--prompt", ""], "jaxinfer generate: error: --prompt is empty"),
        (["generate", "--chat-template", "x"], "jaxinfer generate: error: --chat-template goes with --chat"),
    ],
)
def test_errors_name_the_subcommand(words, program, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2 and program in capsys.readouterr().err.splitlines()[-1]


def test_the_package_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxinfer", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("jaxinfer", run_name="__main__")
    assert end.value.code in (0, None) and capsys.readouterr().out == f"jaxinfer {__version__}\n"
