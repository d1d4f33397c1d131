"""The server as an ASGI application."""

import hmac

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxinfer.async_llm import AsyncLLM
from jaxinfer.serve import anthropic, audio, chat, completions, metrics, models, responses
from jaxinfer.serve.config import ServerConfig
from jaxinfer.serve.context import Context
from jaxinfer.serve.errors import APIError, endpoint, on_error, response

ROUTES = (
    ("GET", "/health", models.health),
    ("GET", "/metrics", metrics.metrics),
    ("GET", "/v1/models", models.models),
    ("GET", "/v1/models/{name:path}", models.model),
    ("POST", "/tokenize", models.tokenize),
    ("POST", "/detokenize", models.detokenize),
    ("POST", "/v1/completions", completions.completions),
    ("POST", "/v1/chat/completions", chat.chat_completions),
    ("POST", "/v1/responses", responses.responses),
    ("POST", "/v1/embeddings", models.embeddings),
    ("POST", "/v1/audio/transcriptions", audio.transcriptions),
    ("POST", "/v1/audio/translations", audio.translations),
    ("POST", "/v1/messages", anthropic.messages),
    ("POST", "/v1/messages/count_tokens", anthropic.count_tokens),
)
"""Method, path and handler of each endpoint."""
OPEN = ("/health",)
"""Paths that need no key: load balancers ask them."""


class KeyCheck:
    """Middleware that refuses requests without the server's key, before their body is read."""

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
        if scope["type"] != "http" or scope["path"] in OPEN or self._right(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        error = APIError(
            "Incorrect API key provided: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
            status=401,
            code="invalid_api_key",
        )
        await response(error, anthropic=scope["path"].startswith("/v1/messages"))(scope, receive, send)

    def _right(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        keys = [given.strip()] if scheme.lower() == "bearer" else []
        keys.append(headers.get("x-api-key", ""))
        return any(hmac.compare_digest(key.encode("latin-1", "replace"), self._key) for key in keys)


def create_app(llm: AsyncLLM, config: ServerConfig) -> Starlette:
    """Return the application that serves a model, which stays open when the server stops.

    Args:
        llm: model and engine.
        config: settings of the server.
    """
    checks = [] if config.api_key is None else [Middleware(KeyCheck, key=config.api_key)]
    app = Starlette(
        routes=[Route(path, endpoint(handler), methods=[method]) for method, path, handler in ROUTES],
        middleware=checks,
        exception_handlers={HTTPException: on_error},
    )
    app.state.context = Context(llm, config)
    app.state.registry = metrics.registry(app.state.context)
    return app
