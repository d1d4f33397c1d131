"""The server as an ASGI application."""

import base64
import hmac

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxinfer.async_llm import AsyncLLM
from jaxinfer.serve import (
    anthropic,
    audio,
    chat,
    completions,
    debug,
    embeddings,
    metrics,
    models,
    openapi,
    profile,
    responses,
)
from jaxinfer.serve.config import ServerConfig
from jaxinfer.serve.context import Context
from jaxinfer.serve.errors import APIError, endpoint, on_error, response

ROUTES = (
    ("GET", "/health", models.health),
    ("GET", "/metrics", metrics.metrics),
    ("GET", "/openapi.json", openapi.openapi),
    ("GET", "/v1/models", models.models),
    ("GET", "/v1/models/{name:path}", models.model),
    ("POST", "/tokenize", models.tokenize),
    ("POST", "/detokenize", models.detokenize),
    ("POST", "/v1/completions", completions.completions),
    ("POST", "/v1/chat/completions", chat.chat_completions),
    ("POST", "/v1/responses", responses.responses),
    ("POST", "/v1/embeddings", embeddings.embeddings),
    ("POST", "/v1/audio/transcriptions", audio.transcriptions),
    ("POST", "/v1/audio/translations", audio.translations),
    ("POST", "/v1/messages", anthropic.messages),
    ("POST", "/v1/messages/count_tokens", anthropic.count_tokens),
)
"""Method, path and handler of each endpoint."""
DEBUG_ROUTES = (("GET", debug.PATH, debug.page), ("GET", f"{debug.PATH}/data", debug.data))
"""Endpoints with `ServerConfig.debug_cache`."""
PROFILE_ROUTES = (("POST", "/start_profile", profile.start), ("POST", "/stop_profile", profile.stop))
"""Endpoints with `ServerConfig.profile_dir`; their names are vLLM's."""
OPEN = ("/health",)
"""Paths that need no key, for load balancers."""


class KeyCheck:
    """Middleware that refuses requests without the server's key, before their body is read."""

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A browser sends a key as the password of basic authentication, which it asks for.
        browsed = scope["path"].startswith(debug.PATH)
        if scope["path"] in OPEN or self._right(Headers(scope=scope), browsed):
            await self._app(scope, receive, send)
            return
        error = APIError(
            "Incorrect API key provided: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
            status=401,
            code="invalid_api_key",
        )
        refused = response(error, anthropic=scope["path"].startswith("/v1/messages"))
        if browsed:
            refused.headers["www-authenticate"] = 'Basic realm="jaxinfer: any name, the API key as password"'
        await refused(scope, receive, send)

    def _right(self, headers: Headers, browsed: bool) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        keys = [given.strip()] if scheme.lower() == "bearer" else []
        if browsed and scheme.lower() == "basic":
            keys.append(_password(given))
        keys.append(headers.get("x-api-key", ""))
        return any(hmac.compare_digest(key.encode("latin-1", "replace"), self._key) for key in keys)


def _password(given: str) -> str:
    """Return the password of basic authentication; an empty string if it is malformed."""
    try:
        return base64.b64decode(given, validate=True).decode("latin-1").partition(":")[2]
    except ValueError:
        return ""


def create_app(llm: AsyncLLM, config: ServerConfig) -> Starlette:
    """Return the application that serves a model, which stays open when the server stops.

    Args:
        llm: model and engine.
        config: settings of the server.
    """
    checks = [] if config.api_key is None else [Middleware(KeyCheck, key=config.api_key)]
    routes = ROUTES + (DEBUG_ROUTES if config.debug_cache else ())
    routes += PROFILE_ROUTES if config.profile_dir is not None else ()
    app = Starlette(
        routes=[Route(path, endpoint(handler), methods=[method]) for method, path, handler in routes],
        middleware=checks,
        exception_handlers={HTTPException: on_error},
    )
    app.state.context = Context(llm, config)
    app.state.watch = debug.Watch(llm)
    app.state.registry = metrics.registry(app.state.context)
    return app
