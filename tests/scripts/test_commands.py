"""The command `jaxinfer` in this process, with the packaged checkpoint."""

import io
import json
import subprocess
import sys

import pytest

from jaxinfer import cli, demo
from jaxinfer.commands import chat
from jaxinfer.errors import EngineError
from jaxinfer.loading import weights
from jaxinfer.outputs import CompletionOutput, RequestOutput

pytestmark = pytest.mark.xdist_group("demo")


def exit_status(*words: str) -> int:
    """The status of a command line, also where the parser ends it."""
    try:
        return cli.main(words)
    except SystemExit as exit:
        return exit.code


def test_a_command_line_without_a_command_is_refused_without_importing_jax():
    program = "import sys; from jaxinfer import cli\ntry: cli.main({})\nfinally: assert 'jax' not in sys.modules"
    for words, status, text in (
        (["--version"], 0, "jaxinfer "),
        ([], 2, "COMMAND"),
        (["chatter"], 2, "invalid choice"),
    ):
        run = subprocess.run([sys.executable, "-c", program.format(words)], capture_output=True, text=True)
        assert run.returncode == status and text in run.stdout + run.stderr


def test_a_plan_is_printed_or_refused_in_one_line(capsys, tmp_path):
    assert exit_status("plan", "--tensor-parallel-size", "2") == 0
    assert "layers.{0..2}.attention.qkv.weight" in capsys.readouterr().out
    assert exit_status("plan", "--model", str(tmp_path / "missing")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "missing" in error and error.count("\n") == 1


def test_a_chat_reads_lines_and_answers_each(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 17 plus 25?\n\n/clear\nWhat is the capital of France?\n"))
    assert exit_status("chat", "--temperature", "0", "--max-tokens", "32") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "17 plus 25 is 42" in first and "Paris" in second


@pytest.mark.parametrize("words", [("chat",), ("generate", "--chat", "--prompt", "x")], ids=["chat", "generate"])
def test_a_missing_chat_template_is_noticed_before_weights_are_read(words, capsys, monkeypatch, tmp_path):
    for file in demo.path().iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    known = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").unlink()
    known.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(known))
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("weights were read"))
    assert exit_status(*words, "--model", str(tmp_path)) == 2
    expected = "error: the tokenizer has no chat template: pass --chat-template (Jinja source)"
    assert expected in capsys.readouterr().err


def output(text: str, reason: str | None) -> RequestOutput:
    """An update of a stream."""
    return RequestOutput("0", None, [], [CompletionOutput(0, text, [], finish_reason=reason)], reason is not None)


@pytest.fixture
def talk(monkeypatch):
    """Run a chat with scripted answers, each a list of texts, ends or errors; return what each turn was asked."""

    def run(lines: str, answers: list[list[object]], interactive: bool = False) -> tuple[int, list[list[dict]]]:
        asked = []

        def answer(messages):
            asked.append(list(messages))
            for part in answers[len(asked) - 1]:
                if isinstance(part, BaseException):
                    raise part
                text, reason = part if isinstance(part, tuple) else (part, None)
                yield RequestOutput(
                    "0", None, [], [CompletionOutput(0, text, [], finish_reason=reason)], reason is not None
                )

        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return chat.converse(answer, "Be brief.", interactive), asked

    return run


def test_a_turn_carries_the_conversation_and_clear_ends_it(talk, capsys):
    status, asked = talk("a\nb\n/clear\nc\n/exit\nd\n", [["A", (".", "stop")], [("B", "length")], [("C", "stop")]])
    system = {"role": "system", "content": "Be brief."}
    turns = [("user", "a"), ("assistant", "A."), ("user", "b")]
    assert asked[1] == [system, *({"role": role, "content": text} for role, text in turns)]
    assert asked[2] == [system, {"role": "user", "content": "c"}] and len(asked) == 3
    out, err = capsys.readouterr()
    assert status == 0 and out == "A.\nB\nC\n" and err == "[the limit of tokens was reached]\n"


def test_a_turn_that_fails_is_taken_back(talk, capsys):
    answers = [[ValueError("the prompt is too long")], ["half", ("", "error")], [("C", "stop")]]
    for interactive, expected in ((False, 1), (True, 0)):
        status, asked = talk("a\nb\nc\n", answers, interactive)
        assert status == expected and [len(messages) for messages in asked] == [2, 2, 2]
        err = capsys.readouterr().err
        assert "error: the prompt is too long\n" in err and "error: the answer ended because" in err


def test_an_interrupt_keeps_the_text_so_far(talk, capsys):
    status, asked = talk("a\nb\n", [["half ", KeyboardInterrupt()], [("B", "stop")]])
    assert status == 0 and asked[1][2] == {"role": "assistant", "content": "half "}
    assert "[stopped]" in capsys.readouterr().err


def test_an_error_of_the_engine_is_a_public_error():
    with pytest.raises(EngineError, match="its log describes"):
        chat._show(text for text in [output("", "error")])


COMPILING = """
import sys, threading, time
from jaxinfer.commands.exit_status import end
from jaxinfer.engine.runner import programs

def compile():
    time.sleep(float(sys.argv[1]))
    print("compiled", flush=True)

thread = threading.Thread(target=compile, daemon=True)
programs._compiling.add(thread)
print("begun")
thread.start()
"""
"""A process that ends while a program is compiled."""


@pytest.mark.parametrize(
    ("seconds", "ending", "status", "out"),
    [
        ("600", "end(3)", 3, "begun\n"),
        ("0.5", "", 0, "begun\ncompiled\n"),
        ("0.5", "sys.exit(4)", 4, "begun\ncompiled\n"),
    ],
)
def test_a_command_ends_while_a_program_compiles_and_python_waits_for_it(seconds, ending, status, out):
    run = subprocess.run(
        [sys.executable, "-c", COMPILING + ending, seconds], capture_output=True, text=True, timeout=300
    )
    assert (run.returncode, run.stdout) == (status, out)
