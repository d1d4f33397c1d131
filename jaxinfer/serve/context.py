"""Shared state of the endpoints: the model, the settings and the count of accepted requests."""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import Request

from jaxinfer.async_llm import AsyncLLM
from jaxinfer.serve.config import ServerConfig
from jaxinfer.serve.errors import APIError


@dataclass
class Context:
    """State of a server."""

    llm: AsyncLLM
    config: ServerConfig
    created: int = field(default_factory=lambda: int(time.time()))
    """When the server was started, in seconds since 1970."""
    accepted: int = 0
    """Number of requests that are being answered."""
    profiling: bool = False
    """Whether a trace of JAX's profiler runs (`serve.profile`)."""

    def enter(self) -> Callable[[], None]:
        """Accept a request and return the function that ends it; may be called several times.

        Raises:
            APIError: too many requests are running or waiting.
        """
        most = self.config.max_concurrent_requests
        if self.accepted >= most:
            raise APIError(
                f"{self.accepted} requests are being answered, and max_concurrent_requests of this server is {most}; "
                "try again later",
                status=429,
                code="too_many_requests",
            )
        waiting, longest = self.llm.num_waiting, self.config.max_queue_length
        if waiting >= longest:
            raise APIError(
                f"{waiting} sequences are waiting, and max_queue_length of this server is {longest}; try again later",
                status=429,
                code="queue_full",
            )
        self.accepted += 1
        left = [1]

        def leave() -> None:
            self.accepted -= left.pop() if left else 0

        return leave

    @property
    def models(self) -> list[str]:
        """Names of the model and of its adapters."""
        own = self.config.model_name
        return [own, *(name for name in self.llm.adapters if name != own)]

    def check_model(self, name: str | None) -> str | None:
        """Check the model that a request names; None is the model that is served.

        Returns:
            The name of the adapter that the request asks for; None for the model itself.
        """
        there = self.models
        if name is None or name == there[0]:
            return None
        if name not in there:
            raise APIError(
                f"The model `{name[:200]}` does not exist; this server has `{'`, `'.join(there)}`.",
                status=404,
                param="model",
                code="model_not_found",
            )
        return name

    def check_samples(self, n: int, prompts: int = 1) -> None:
        """Check the number of samples of a request."""
        if n * prompts > self.config.max_n:
            of = "" if prompts == 1 else f" for {prompts} prompts, {n * prompts} samples"
            raise APIError(
                f"n is {n}{of}: this server draws at most max_n = {self.config.max_n} samples a request.",
                param="n" if prompts == 1 else "prompt",
            )


def of(request: Request) -> Context:
    """Return the context of a request's server."""
    return request.app.state.context


def new_id(prefix: str) -> str:
    """Return a new id of a response."""
    return f"{prefix}-{uuid.uuid4().hex}"
