"""Options of `jaxinfer serve` that are refused before the model is loaded: status 2 and one line that names them."""

import socket

import pytest
from support.processes import free_port

from jaxinfer import cli
from jaxinfer.errors import ConfigError
from jaxinfer.serve.listening import check_address

pytest.importorskip("uvicorn")
MISSING = "/no/such/model"
"""The error would name the model if it was looked for first."""


@pytest.mark.parametrize(
    "options, message",
    [
        (["--port", "70000"], "--port must be between 0 (any free port) and 65535, got 70000"),
        (["--port", "-1"], "--port must be between"),
        (["--host", "203.0.113.9"], "cannot listen on --host '203.0.113.9'"),
        (["--host", "a..b"], "cannot listen on --host 'a..b'"),
        (["--ssl-certfile", "c"], "--ssl-certfile and --ssl-keyfile belong together"),
        (["--ssl-certfile", "/none", "--ssl-keyfile", "/none"], "--ssl-certfile '/none' and --ssl-keyfile '/none'"),
        (["--ssl-certfile", __file__, "--ssl-keyfile", __file__], "must be PEM files"),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout must be at least 0 seconds, got -1"),
        (["--profile", f"{__file__}/traces"], "--profile"),
        (["--chat-template", "/none"], "--chat-template '/none' cannot be read"),
        (["--api-key", ""], "error: --api-key cannot be empty"),
        (["--max-n", "0"], "error: --max-n must be an integer of at least 1"),
    ],
)
def test_a_wrong_option_is_refused_before_the_model_is_looked_for(options, message, capsys):
    assert cli.main(["serve", MISSING, "--port", "0", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error and MISSING not in error


def test_a_port_in_use_is_refused_and_a_free_one_is_not_taken():
    port = free_port()
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError, match=f"--port {port}: .*in use"):
        check_address("127.0.0.1", port)
    check_address("127.0.0.1", port)
    check_address("localhost", port)
    socket.create_server(("127.0.0.1", port)).close()
