"""Messages of bad input: the names of options in place of those of arguments."""

import argparse
import logging

import pytest

from jaxinfer import cli
from jaxinfer.commands.option_words import logged_option_words, option_words


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    words = {"serve": ["serve", "DIR"], "plan": ["plan"], "generate": ["generate"], "chat": ["chat"]}
    return {name: cli.parse(given)[0] for name, given in words.items()}


@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        ("serve", "max_num_seqs must be in [1, 16384], got 0", "--max-num-seqs must be in [1, 16384], got 0"),
        ("chat", "seed must be at least 0, got -1.", "--seed must be at least 0, got -1."),
        ("chat", "lower max_model_len.", "lower --max-model-len."),
        ("serve", "model='/no where': there is none", "MODEL '/no where': there is none"),
        ("chat", "pass chat_template= (Jinja source)", "pass --chat-template (Jinja source)"),
        ("plan", "model='/nowhere': there is none", "--model /nowhere: there is none"),
        ("generate", "pass dtype='bfloat16' to keep its dtype", "pass --dtype bfloat16 to keep its dtype"),
        ("serve", "make it with max_adapters=N or seed=3", "make it with --max-adapters N or --seed 3"),
        ("serve", "with enable_prefix_caching=False, or True", "with --no-enable-prefix-caching, or True"),
        ("plan", "or pad to 10 with pad_heads=True", "or pad to 10 with --pad-heads"),
        ("plan", "with placement={'layers.*.mlp': 'replicate'}", "with --placement 'layers.*.mlp=replicate'"),
        ("generate", "pass hf_overrides={'a': ['B']}", """pass --hf-overrides '{"a": ["B"]}'"""),
        ("plan", "mesh: axis 'foo' is unknown", "--mesh: axis 'foo' is unknown"),
        ("generate", "top_p must be in (0, 1], got 3.0.", "--top-p must be in (0, 1], got 3.0."),
        ("generate", "generation_config.json: top_k must be", "generation_config.json: top_k must be"),
        ("generate", "this model has no 'max_tokens'", "this model has no 'max_tokens'"),
        ("generate", "config.max_tokens, the model of a seed", "config.max_tokens, the model of a seed"),
    ],
)
def test_arguments_are_named_as_options(command, message, expected, parsers):
    assert option_words(message, parsers[command]) == expected
    assert option_words(expected, parsers[command]) == expected, "written already"


def test_log_records_name_options_while_a_command_runs(parsers, capsys, monkeypatch):
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    with logged_option_words(parsers["chat"]):
        logging.getLogger("jaxinfer").warning("pass dtype='bfloat16'")
    logging.getLogger("jaxinfer").warning("pass dtype='bfloat16'")
    assert capsys.readouterr().err.splitlines() == ["WARNING pass --dtype bfloat16", "WARNING pass dtype='bfloat16'"]
