"""Read JSON bodies with limits on size and time, and check their fields."""

import asyncio
import json
from collections.abc import Collection, Mapping
from typing import Any

from starlette.requests import Request

from jaxinfer._utils.checks import describe
from jaxinfer.serve.config import ServerConfig
from jaxinfer.serve.errors import APIError, wrong_type

LARGE = 1 << 16
"""Bytes above which a body is parsed on another thread, so that other requests go on meanwhile."""
KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
"""Types of fields, by what errors call them."""


async def read_bytes(request: Request, config: ServerConfig) -> bytes:
    """Read a request's body.

    Raises:
        APIError: it is too large, or did not arrive in time.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > config.max_body_bytes:
        raise _too_large(config)
    try:
        async with asyncio.timeout(config.body_timeout):
            found = bytearray()
            async for chunk in request.stream():
                found += chunk
                if len(found) > config.max_body_bytes:
                    raise _too_large(config)
            return bytes(found)
    except TimeoutError:
        raise APIError(
            f"the request body did not arrive within body_timeout = {config.body_timeout:g} s", status=408
        ) from None


def _too_large(config: ServerConfig) -> APIError:
    return APIError(
        f"the request body is larger than max_body_bytes = {config.max_body_bytes} of this server; send less",
        status=413,
        code="request_too_large",
    )


async def read_json(request: Request, config: ServerConfig) -> dict[str, Any]:
    """Read a request's body as a JSON object; raises APIError if it is something else."""
    data = await read_bytes(request, config)
    return await asyncio.to_thread(parse, data) if len(data) > LARGE else parse(data)


def parse(data: bytes) -> dict[str, Any]:
    """Parse a JSON object; raises APIError if the bytes are something else."""
    try:
        found = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise APIError(f"the request body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise APIError(f"the request body must be a JSON object, got {describe(found)}", code="invalid_json")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


class Fields:
    """Fields of a request body. Each is checked when it is read; null is the same as a missing field."""

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        self._values, self._prefix = values, prefix

    def check_known(self, known: Collection[str], neutral: Mapping[str, Collection[Any]]) -> None:
        """Refuse unknown fields, and fields that are not supported unless they have a value that changes nothing.

        Args:
            known: fields that are read or ignored.
            neutral: unsupported fields with their accepted values.

        Raises:
            APIError: names the field.
        """
        for name, value in self._values.items():
            if name in known or value is None:
                continue
            param = self._prefix + name
            if name not in neutral:
                raise APIError(
                    f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter"
                )
            if not any(value == accepted and type(value) is type(accepted) for accepted in neutral[name]):
                raise APIError(
                    f"{param} is not supported by this server, got {describe(value)}; leave it out",
                    param=param,
                    code="unsupported_parameter",
                )

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """Return a field of a JSON type; raises APIError if it has another type."""
        value = self._values.get(name)
        if value is None:
            return default
        right = isinstance(value, (int, float) if kind is float else kind)
        if not right or (isinstance(value, bool) and kind is not bool):
            raise wrong_type(self._prefix + name, KINDS[kind], value)
        return value

    def need(self, name: str, kind: type) -> Any:
        """Return a field that must be there; raises APIError if it is not."""
        value = self.get(name, kind)
        if value is None:
            raise APIError(
                f"Missing required parameter: '{self._prefix}{name}'.",
                param=self._prefix + name,
                code="missing_required_parameter",
            )
        return value

    def raw(self, name: str) -> Any:
        """Return a field of any type; None if it is missing."""
        return self._values.get(name)

    def within(self, name: str, kind: type, low: float, high: float, default: Any = None) -> Any:
        """Return a number within limits; raises APIError that names them."""
        value = self.get(name, kind, default)
        if value is not None and not low <= value <= high:
            raise APIError(f"{self._prefix}{name} must be between {low} and {high}, got {value}.", param=name)
        return value
