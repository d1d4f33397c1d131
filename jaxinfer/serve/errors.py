"""Errors of the API, in OpenAI's form, and in Anthropic's for its endpoints."""

import functools
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from jaxinfer._utils.checks import describe
from jaxinfer.errors import EngineClosedError, EngineError
from jaxinfer.results import tracing
from jaxinfer.sampling_params import SamplingParams

log = logging.getLogger(__name__)

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
"""Type of an error by its HTTP status; the names are those of Anthropic's API, most of which are OpenAI's too."""


CHAT = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
"""Arguments of `LLM.chat` that are fields of requests by the same names."""


ONLY_PROMPT = "prompt 0"
"""How errors of the engine's input processing name the only prompt of a call."""


class APIError(Exception):
    """An error that is returned to the client.

    Args:
        message: names the field, the value, the limit and the remedy.
        status: HTTP status.
        param: field of the request that is wrong, if one is.
        code: machine-readable reason, as in OpenAI's API.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code


class Json(JSONResponse):
    """JSON response in ASCII: errors may quote text of the client that is not Unicode (lone surrogates)."""

    def render(self, content: Any) -> bytes:
        """Return the bytes of the body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def body_of(error: APIError, anthropic: bool = False) -> dict[str, Any]:
    """Return the JSON of an error."""
    kind = TYPES.get(error.status, "invalid_request_error")
    if anthropic:
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def as_api_error(error: BaseException) -> APIError:
    """Convert an exception of the engine or the input processing to an error for the client.

    Exceptions that the request cannot have caused become a status of 500 without details, and are logged.
    """
    if isinstance(error, APIError):
        return error
    if isinstance(error, HTTPException):
        return APIError(str(error.detail), status=error.status_code)
    if isinstance(error, ClientDisconnect):
        return APIError("the client has disconnected", status=499)
    if isinstance(error, (EngineClosedError, EngineError)):
        return APIError("the engine has stopped; ask the operator of this server", status=503)
    if isinstance(error, (TypeError, ValueError)):  # how jaxinfer reports invalid input
        message = str(error)
        return APIError(message, param=_field(message))
    log.error("a request failed", exc_info=error)
    return APIError("the server failed on this request; its log has the reason", status=500)


def _field(message: str) -> str | None:
    """Return the field that a message of jaxinfer begins with, if it begins with one."""
    first = message.split(" ", 1)[0].split("[", 1)[0]
    return first if first in SamplingParams.__dataclass_fields__ or first in CHAT else None


@contextmanager
def about(field: str, index: int | None = None, *, before: int = 0) -> Iterator[None]:
    """Make errors about a prompt or a message name the field of the request that it comes from.

    Args:
        field: field with the prompt or the messages.
        index: place of the prompt in it; None if it is the field's only one.
        before: number of messages that come before those of the field.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        message = str(error)
        own = field if index is None else f"{field}[{index}]"
        if message.startswith(ONLY_PROMPT):
            raise APIError(own + message.removeprefix(ONLY_PROMPT), param=field) from None
        named = re.match(r"messages(?:\[(\d+)\])?", message)
        if named is None or int(named[1] or before) < before:
            raise
        place = "" if named[1] is None else f"[{int(named[1]) - before}]"
        raise APIError(field + place + message[named.end() :], param=field) from None


def response(error: BaseException, anthropic: bool = False) -> Json:
    """Return the HTTP response of an error."""
    found = as_api_error(error)
    headers = {"retry-after": "1"} if found.status in (429, 503) else None
    return Json(body_of(found, anthropic), found.status, headers)


def endpoint(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Wrap a handler of requests, so that its exceptions become responses."""

    @functools.wraps(handler)
    async def safe(request: Request) -> Response:
        try:
            with tracing.within(request.headers):
                return await handler(request)
        except Exception as error:
            return await on_error(request, error)

    return safe


async def on_error(request: Request, error: Exception) -> Json:
    """Return the response of an exception."""
    found = response(error, anthropic=request.url.path.startswith("/v1/messages"))
    if isinstance(error, HTTPException):
        found.headers.update(error.headers or {})  # those of a wrong method name the right ones
    return found


def wrong_type(param: str, expected: str, value: Any) -> APIError:
    """Return the error for a field of the wrong type."""
    return APIError(f"{param} must be {expected}, got {describe(value)}.", param=param)
