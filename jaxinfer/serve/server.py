"""uvicorn server of the HTTP API that waits for running requests when it is stopped."""

import argparse
import asyncio
from typing import Any

import uvicorn

from jaxinfer.async_llm import AsyncLLM
from jaxinfer.serve import profile
from jaxinfer.serve.app import create_app
from jaxinfer.serve.config import ServerConfig
from jaxinfer.serve.connection import protocol

CLOSING = 5
"""Seconds to send the responses of requests that the shutdown aborts."""


def make_server(llm: AsyncLLM, config: ServerConfig, args: argparse.Namespace) -> uvicorn.Server:
    """Return uvicorn's server of the API; it closes the LLM when it stops. `args`: see `serve.cli.add_arguments`."""
    app = create_app(llm, config)
    options = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        http=protocol(config.body_timeout),
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        timeout_graceful_shutdown=args.shutdown_timeout + CLOSING,
        access_log=args.access_log,
        ws="none",
        lifespan="on",
    )

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            """Wait for running requests; those that take too long end with an error of the API, not uvicorn's."""
            closing = asyncio.ensure_future(_close_after(llm, args.shutdown_timeout))
            await super().shutdown(sockets)
            closing.cancel()
            profile.end(app)
            await llm.close()

    return Server(options)


async def _close_after(llm: AsyncLLM, seconds: float) -> None:
    await asyncio.sleep(seconds)
    await llm.close()
