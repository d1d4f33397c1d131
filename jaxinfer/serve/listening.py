"""Check where a server is to listen before a model is loaded, which takes minutes."""

import errno
import socket
import ssl
from typing import Any

from jaxinfer.errors import ConfigError

MAX_PORT = 65535


def check_address(host: str, port: int) -> None:
    """Check that an address can be listened on, by binding it for a moment.

    Raises:
        ConfigError: names host and port, and the reason.
    """
    if not 0 <= port <= MAX_PORT:
        raise ConfigError(f"--port must be between 0 (any free port) and {MAX_PORT}, got {port}")
    refused: Exception | None = None
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in places:
            try:
                _bind(family, address)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                refused = error  # asyncio passes over such an address too, as where a host has no IPv6
            else:
                return
    except (OSError, UnicodeError) as error:
        refused = error
    raise ConfigError(
        f"cannot listen on --host {host!r}, --port {port}: {refused}; give an address of this machine and a port that "
        "is free"
    )


def _bind(family: int, address: Any) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tried.bind(address)


def check_certificate(certificate: str | None, key: str | None) -> None:
    """Check that TLS's certificate and key can be read and belong together; None for both is no TLS.

    Raises:
        ConfigError: names the files, and the reason.
    """
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        raise ConfigError("--ssl-certfile and --ssl-keyfile belong together: give both")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"--ssl-certfile {certificate!r} and --ssl-keyfile {key!r} cannot be used: {error}; both must be PEM "
            "files, the key without a passphrase"
        ) from None
